"""verl's own MegatronEngine on gloo, in a process per rank: `python tests/megatron_cpu.py SPEC.json`, run by its test.

Megatron-core and verl's Megatron engine are written for CUDA; here are, in one place, the stand-ins that let their own
code run on a processor. None of them touches what is tested: the model's arithmetic, the parallel layers, the pipeline
schedule, the log-probs, the loss and the optimizer are Megatron's and verl's.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

THREAD = threading.local()


class CudaIsCpu(TorchFunctionMode):
    """Every tensor asked for on "cuda" is made on the processor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        name = getattr(function, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "type" and len(args) == 1 and not kwargs:  # what the distributed optimizer tells dtypes by
            return function(args[0]).replace("torch.", "torch.cuda.")
        return function(*("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args), **kwargs)


def stand_in_for_cuda() -> None:
    """Give Megatron-core the few functions of torch.cuda that it calls without asking for a device."""
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def cuda_is_cpu_in_this_thread() -> None:
    """Turn `CudaIsCpu` on, which torch does for one thread, and leave it on."""
    if not hasattr(THREAD, "mode"):
        THREAD.mode = CudaIsCpu()
        THREAD.mode.__enter__()


def stand_in_for_transformer_engine() -> None:
    """Use Megatron-core's own layers, whose norms have names of their own and whose attention wants its mask."""
    from mbridge.core.llm_bridge import LLMBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def layer_spec(self: Any, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        return get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)

    LLMBridge._get_transformer_layer_spec = layer_spec
    LLMBridge._OTHER_MAPPING = {
        "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
        "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
    }
    mapping = LLMBridge._weight_name_mapping_mcore_to_hf

    def name_mapping(self: Any, name: str) -> list[str]:
        norm = name.endswith(("input_layernorm.weight", "pre_mlp_layernorm.weight"))
        return self._weight_name_mapping_other(name) if norm else mapping(self, name)

    LLMBridge._weight_name_mapping_mcore_to_hf = name_mapping
    attention = DotProductAttention.forward

    def causal(self: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        length, batch = query.shape[:2]
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None].expand(batch, 1, length, length)
        return attention(self, query, key, value, mask, *args, **kwargs)

    DotProductAttention.forward = causal


def in_fp32() -> None:
    """Compute in fp32, which verl's engine config does not offer, so that a tolerance can be small."""
    from verl.utils.torch_dtypes import PrecisionType

    PrecisionType.to_dtype = staticmethod(lambda precision: torch.float32)


def stand_in_for_fused_adam(engine: Any) -> None:
    """Let torch's Adam, which counts its steps per parameter, be loaded where Megatron-core expects NVIDIA's."""
    for chained in engine.optimizer.chained_optimizers:
        adam, set_states = chained.optimizer, chained._set_main_param_and_optimizer_states
        for p in (p for group in adam.param_groups for p in group["params"]):
            adam.state[p] = {"step": torch.tensor(0.0), "exp_avg": p.clone().zero_(), "exp_avg_sq": p.clone().zero_()}

        def with_step(model_param: Any, tensors: dict, chained: Any = chained, set_states: Any = set_states) -> None:
            group, order = chained.model_param_group_index_map[model_param]
            state = chained.optimizer.state[chained.optimizer.param_groups[group]["params"][order]]
            # load_state_dict has set one tensor for all parameters, which each of them would count on.
            state["step"] = state["step"].clone()
            set_states(model_param, {**tensors, "step": state["step"]})

        chained._set_main_param_and_optimizer_states = with_step


def recipe_on_cpu(spec: dict, *more: str) -> Any:
    """Return the 7B recipe's actor_rollout_ref with what only a GPU has left out."""
    from rapo_verl.run.compose import compose_config

    engine = "actor_rollout_ref.actor.megatron"
    transformer = f"{engine}.override_transformer_config"
    fused = ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion",
        "persist_layer_norm", "apply_rope_fusion")  # fmt: skip
    config = compose_config(
        [
            "experiment=qwen2.5_7b_rapo",
            f"actor_rollout_ref.model.path={spec['model']}",
            "actor_rollout_ref.model.use_remove_padding=false",  # packing needs Transformer Engine's attention
            f"{engine}.tensor_model_parallel_size={spec['tensor']}",
            f"{engine}.pipeline_model_parallel_size={spec['pipeline']}",
            f"{engine}.vanilla_mbridge=true",  # Megatron-Bridge imports Transformer Engine
            f"{engine}.sequence_parallel=false",  # Transformer Engine's norms alone support it
            f"+{transformer}.sequence_parallel=false",
            f"{transformer}.attention_backend=unfused",
            f"+{transformer}.use_cpu_initialization=true",
            *(f"+{transformer}.{name}=false" for name in fused),
            *spec["overrides"],
            *more,
        ]
    )
    return config.actor_rollout_ref


def worker_of(config: Any, role: str) -> Any:
    """Return RAPO's worker with its model built."""
    from rapo_verl.training.worker import RapoWorker

    worker = RapoWorker(config, role)
    worker.init_model()
    return worker


def exported(engine: Any) -> dict[str, torch.Tensor]:
    """Return the weights under their HF names, gathered from all ranks as for the sync with vLLM."""
    return {name: tensor.detach().clone() for name, tensor in engine.get_per_tensor_param()[0]}


def record_gradients(engine: Any) -> list[dict[str, torch.Tensor]]:
    """Let the engine leave its gradients, under HF names, in the list returned, before its optimizer steps."""
    found, step = [], engine.optimizer_step

    def recording_step() -> Any:
        parameters = [p for chunk in engine.module for p in chunk.parameters()]
        weights = [p.data.clone() for p in parameters]
        for p in parameters:
            p.data.copy_(p.main_grad)
        found.append(exported(engine))
        for p, weight in zip(parameters, weights):
            p.data.copy_(weight)
        return step()

    engine.optimizer_step = recording_step
    return found


class Rank:
    """What a rank of the trainer's worker group does, on the batches of the test."""

    def __init__(self, spec: dict):
        self.spec = spec

    def infer(self, method: Any, *, entropy: bool) -> Any:
        """Return the output of a pass without gradients, on the ranks that have one."""
        from verl.utils import tensordict_utils as tu

        data = torch.load(self.spec["batch"], weights_only=False)
        tu.assign_non_tensor(
            data, calculate_entropy=entropy, compute_loss=False, temperature=self.spec["temperature"]
        )  # fmt: skip
        return method(data)

    def update(self, actor: Any, fields: dict | None = None, *, poisoned: bool = False) -> Any:
        """Return the metrics of one update, on the ranks that have them."""
        from verl.utils import tensordict_utils as tu

        data = torch.load(self.spec["update"], weights_only=False)
        for name, value in (fields or {}).items():
            data[name] = value
        tu.assign_non_tensor(
            data, calculate_entropy=True, temperature=self.spec["temperature"], global_batch_size=len(data),
            mini_batch_size=len(data), epochs=1, seed=0, dataloader_kwargs={"shuffle": False},
        )  # fmt: skip
        if poisoned:
            data["advantages"].values()[0] = float("nan")
        return actor.update_actor(data)

    def one_update(self, actor: Any, fields: dict | None = None) -> dict:
        """Return the metrics of an update, its gradients and the weights after it."""
        gradients = record_gradients(actor.actor.engine)
        metrics = self.update(actor, fields)
        del actor.actor.engine.optimizer_step  # the recorder
        return {"metrics": metrics, "gradients": gradients[0], "weights": exported(actor.actor.engine)}

    def second_update(self, actor: Any) -> dict:
        """Return the log-probs of an actor that has one update behind it, and one more update."""
        log_probs = self.infer(actor.compute_log_prob, entropy=False)
        return {"log_prob": log_probs, **self.one_update(actor)}

    def estimator(self, *overrides: str) -> dict:
        """Return reference pass and update of an estimator that needs RAPO's head."""
        from rapo_verl.training.engine import FIELDS

        config = recipe_on_cpu(self.spec, *overrides)
        output = self.infer(worker_of(config, "ref").compute_ref_log_prob, entropy=False)
        everyone: list = [None] * int(os.environ["WORLD_SIZE"])
        torch.distributed.all_gather_object(everyone, output)  # what the trainer's queue does
        output = next(found for found in everyone if found is not None)
        fields = {name: output[name] for name in FIELDS}
        return {"reference": output, **self.one_update(worker_of(config, "actor"), fields)}

    def everything(self) -> dict[str, Any]:
        """Return every pass, the updates, a checkpoint saved and resumed, and a gradient refused."""
        config = recipe_on_cpu(self.spec)
        reference, actor = worker_of(config, "ref"), worker_of(config, "actor")
        engine = actor.actor.engine
        results: dict[str, Any] = {
            "count": sum(p.numel() for chunk in engine.module for p in chunk.parameters()),
            "engine": [cls.__name__ for cls in type(engine).__mro__],
            "ref_log_prob": self.infer(reference.compute_ref_log_prob, entropy=False),
            "old_log_prob": self.infer(actor.compute_log_prob, entropy=True),
            "sampled": self.one_update(actor),
        }
        reference.ref.engine.use_linear_head()
        results["linear_ref_log_prob"] = self.infer(reference.compute_ref_log_prob, entropy=False)
        actor.save_checkpoint(self.spec["checkpoint"], global_step=1)
        results["second"] = self.second_update(actor)
        results["resumed"] = self.resumed()
        for name, overrides in self.spec["estimators"].items():
            results[name] = self.estimator(*overrides)
        try:
            self.update(actor, poisoned=True)
        except FloatingPointError as error:
            results["refused"] = str(error)
        results["weights_after_refusal"] = exported(engine)
        return results

    def resumed(self) -> dict:
        """Return what follows in a new actor that goes on from the checkpoint."""
        actor = worker_of(recipe_on_cpu(self.spec), "actor")
        stand_in_for_fused_adam(actor.actor.engine)
        actor.load_checkpoint(self.spec["checkpoint"])
        return self.second_update(actor)


def main(spec_path: Path) -> None:
    """Do this rank's part of what the spec says and write what came of it."""
    spec = json.loads(spec_path.read_text())
    stand_in_for_cuda()
    cuda_is_cpu_in_this_thread()
    import verl  # noqa: F401

    stand_in_for_transformer_engine()
    in_fp32()
    rank = Rank(spec)
    results = rank.resumed() if spec["resume"] else rank.everything()
    torch.save(results, Path(spec["out"]) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
