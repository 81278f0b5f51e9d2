"""How a trainer hands its weights to vLLM: over a socket of its run, not of its machine; on a processor by a reload.

verl 0.9.1 names it by Ray's job id (workers/rollout/vllm_rollout/vllm_rollout.py:141, utils.py:416), which counts from
1 in every Ray cluster. Two runs on one machine, each with its own cluster, then share the path: the weights of one may
go to the other's vLLM, or one waits for ever (seen with two toy runs side by side). Both ends here add the run folder.
"""

import hashlib
import os
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rapo_verl.run.names import RUN_DIR_VARIABLE

VERL_PREFIX = "ipc:///tmp/rl-colocate-zmq-"


def socket_of_run(handle: str) -> str:
    """Return veRL's ``ipc:///tmp/rl-colocate-zmq-<job>-replica-<r>-rank-<k>.sock`` with a mark of this run in it."""
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if not handle.startswith(VERL_PREFIX) or not run_dir:
        raise RuntimeError(
            f"cannot name the weight socket: veRL's is {handle!r} (expected {VERL_PREFIX}...), {RUN_DIR_VARIABLE} is "
            f"{run_dir!r}; start runs with `rapo train`, and see `rapo doctor` for veRL's version"
        )
    return f"{VERL_PREFIX}{hashlib.sha256(run_dir.encode()).hexdigest()[:12]}-{handle.removeprefix(VERL_PREFIX)}"


class RunServerAdapter(ServerAdapter):
    """The trainer's end, in veRL's registry of rollouts (`rapo_verl.training.plugin`)."""

    zmq_handle: str

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # verl 0.9.1 workers/rollout/vllm_rollout/vllm_rollout.py:141: the trainer's end, named by Ray's job id.
        self.zmq_handle = socket_of_run(self.zmq_handle)


class RunWorkerExtension(vLLMColocateWorkerExtension):
    """vLLM's end, set by ``rollout.engine_kwargs.vllm.worker_extension_cls``."""

    def _get_zmq_handle(self) -> str:
        # verl 0.9.1 workers/rollout/vllm_rollout/utils.py:416: vLLM's end, named by the same.
        return socket_of_run(super()._get_zmq_handle())


class CpuWorkerExtension(RunWorkerExtension):
    """vLLM's end on a processor: loads new weights through vLLM's reload API, since its CPU backend prepacks them."""

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive all weights of the actor and reload the model with them; LoRA's adapters cannot be loaded so."""
        # verl 0.9.1 workers/rollout/vllm_rollout/utils.py:248: writes into the live parameters instead, which the CPU
        # backend has repacked at load time.
        if peft_config is not None:
            raise RuntimeError("LoRA weight sync is not supported by the cpu platform; set model.lora_rank=0")
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), device=torch.device("cpu"), use_shm=use_shm)
        weights: list[tuple[str, torch.Tensor]] = []
        # Cloned: the bucket is shared memory that the sender writes again.
        receiver.receive_weights(lambda bucket, _last: weights.extend((name, t.clone()) for name, t in bucket))
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        # A head tied to the embedding gets no weights of its own, so that vLLM 0.28's reload does not repack it
        # (model_executor/model_loader/reload/layerwise.py): it would sample from what it was packed from at the start.
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, VocabParallelEmbedding):
                layer.quant_method.process_weights_after_loading(layer)
