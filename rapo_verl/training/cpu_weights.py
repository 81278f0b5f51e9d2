"""Weight sync into vLLM's CPU worker, set by ``rollout.engine_kwargs.vllm.worker_extension_cls``."""

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

from rapo_verl.training.weights import RunWorkerExtension


class CpuWorkerExtension(RunWorkerExtension):
    """Loads new weights through vLLM's reload API, since its CPU backend prepacks them."""

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive all weights of the actor and reload the model with them.

        verl 0.9.1 workers/rollout/vllm_rollout/utils.py:180 writes into the live parameters instead, which the CPU
        backend has repacked at load time.

        Raises:
            RuntimeError: a LoRA adapter is sent, which the reload API does not take.
        """
        if peft_config is not None:
            raise RuntimeError("LoRA weight sync is not supported by the cpu platform; set model.lora_rank=0")
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), device=torch.device("cpu"), use_shm=use_shm)
        weights: list[tuple[str, torch.Tensor]] = []
        # Cloned: the bucket is shared memory that the sender writes again.
        receiver.receive_weights(lambda bucket, _last: weights.extend((name, t.clone()) for name, t in bucket))
        self.model_runner.reload_weights(weights_iterator=iter(weights))
