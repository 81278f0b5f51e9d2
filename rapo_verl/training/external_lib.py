"""Registers our engines and weight sender on import: veRL imports ``model.external_lib`` before it builds an engine."""

from verl.workers.engine import EngineRegistry, MegatronEngineWithLMHead
from verl.workers.rollout import base as rollouts

from rapo_verl.training.engine import CpuFSDPEngine, RapoFSDPEngine

# With a vendor, which veRL looks up first: under "cuda" alone its own engines are registered already.
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor="nvidia")(RapoFSDPEngine)
EngineRegistry.register("language_model", "fsdp2", device="cpu")(CpuFSDPEngine)
if MegatronEngineWithLMHead is not None:  # None: megatron-core is not installed
    from rapo_verl.training.megatron import RapoMegatronEngine

    EngineRegistry.register("language_model", "megatron", device="cuda", vendor="nvidia")(RapoMegatronEngine)

# By name: veRL imports it (and vLLM) only in processes with a rollout.
rollouts._ROLLOUT_REGISTRY["vllm", "async"] = "rapo_verl.training.weights.RunServerAdapter"
