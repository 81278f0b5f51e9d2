"""verl's own MegatronEngine on gloo, in a process per rank: `python tests/megatron_cpu.py SPEC.json`, run by its test.

Megatron-core and verl's Megatron engine are written for CUDA; here are, in one place, the stand-ins that let their own
code run on a processor. None of them touches what is tested: the model's arithmetic, the parallel layers, the pipeline
schedule, the log-probs, the loss and the optimizer are Megatron's and verl's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
    CudaIsCpu().__enter__()


def stand_in_for_transformer_engine() -> None:
    """Use Megatron-core's own layers, whose norms have names of their own and whose attention wants its mask."""
    from mbridge.core.llm_bridge import LLMBridge
    from mbridge.models.qwen2 import Qwen2Bridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def layer_spec(self: Any, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        return get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)

    LLMBridge._get_transformer_layer_spec = layer_spec
    Qwen2Bridge._OTHER_MAPPING = {
        "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
        "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
    }
    mapping = Qwen2Bridge._weight_name_mapping_mcore_to_hf

    def name_mapping(self: Any, name: str) -> list[str]:
        norm = name.endswith(("input_layernorm.weight", "pre_mlp_layernorm.weight"))
        return self._weight_name_mapping_other(name) if norm else mapping(self, name)

    Qwen2Bridge._weight_name_mapping_mcore_to_hf = name_mapping
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


def recipe_on_cpu(spec: dict) -> Any:
    """Return the 7B recipe's actor_rollout_ref with what only a GPU has left out."""
    from rapo_verl.compose import compose_config

    engine = "actor_rollout_ref.actor.megatron"
    config = compose_config(
        [
            "experiment=qwen2.5_7b_rapo",
            f"actor_rollout_ref.model.path={spec['model']}",
            "actor_rollout_ref.model.use_remove_padding=false",  # packing needs Transformer Engine's attention
            f"{engine}.tensor_model_parallel_size={spec['tensor']}",
            f"{engine}.pipeline_model_parallel_size={spec['pipeline']}",
            f"{engine}.vanilla_mbridge=true",  # Megatron-Bridge imports Transformer Engine
            f"{engine}.sequence_parallel=false",  # Transformer Engine's norms alone support it
            f"+{engine}.override_transformer_config.sequence_parallel=false",
            f"{engine}.override_transformer_config.attention_backend=unfused",
            f"+{engine}.override_transformer_config.use_cpu_initialization=true",
            *(
                f"+{engine}.override_transformer_config.{fused}=false"
                for fused in (
                    "masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion",
                    "gradient_accumulation_fusion", "persist_layer_norm", "apply_rope_fusion",
                )
            ),
            *spec["overrides"],
        ]
    )  # fmt: skip
    return config.actor_rollout_ref


def worker_of(config: Any, role: str) -> Any:
    """Return RAPO's worker with its model built."""
    from rapo_verl.reference_worker import RapoWorker

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


def main(spec_path: Path) -> None:
    """Run the reference pass, the log-prob pass and an update on this rank; ranks with outputs write them."""
    spec = json.loads(spec_path.read_text())
    stand_in_for_cuda()
    import verl  # noqa: F401

    stand_in_for_transformer_engine()
    in_fp32()
    from verl.utils import tensordict_utils as tu

    batch = torch.load(spec["batch"], weights_only=False)
    config = recipe_on_cpu(spec)
    reference, actor = worker_of(config, "ref"), worker_of(config, "actor")
    results: dict[str, Any] = {
        "count": sum(p.numel() for chunk in actor.actor.engine.module for p in chunk.parameters())
    }

    data = batch.copy()
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False, temperature=spec["temperature"])
    results["ref_log_prob"] = reference.compute_ref_log_prob(data)
    data = batch.copy()
    tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False, temperature=spec["temperature"])
    results["old_log_prob"] = actor.compute_log_prob(data)

    def update(poisoned: bool) -> Any:
        data = torch.load(spec["update"], weights_only=False)
        tu.assign_non_tensor(
            data, calculate_entropy=True, temperature=spec["temperature"], global_batch_size=len(data),
            mini_batch_size=len(data), epochs=1, seed=0, dataloader_kwargs={"shuffle": False},
        )  # fmt: skip
        if poisoned:
            data["advantages"].values()[0] = float("nan")
        return actor.update_actor(data)

    gradients = record_gradients(actor.actor.engine)
    results["update"] = update(poisoned=False)
    results["gradients"], results["weights"] = gradients[0], exported(actor.actor.engine)
    del actor.actor.engine.optimizer_step  # the recorder
    try:
        update(poisoned=True)
    except FloatingPointError as error:
        results["refused"] = str(error)
    results["weights_after_refusal"] = exported(actor.actor.engine)
    torch.save(results, Path(spec["out"]) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
