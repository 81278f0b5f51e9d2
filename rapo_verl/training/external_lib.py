"""Registers our engines and weight sender on import: veRL imports ``model.external_lib`` before it builds an engine."""

from verl.workers.engine import EngineRegistry, MegatronEngineWithLMHead
from verl.workers.rollout import base as rollouts

from rapo_verl.training.engine import CpuFSDPEngine, RapoFSDPEngine

# verl 0.9.1 workers/engine/base.py:413: a vendor is looked up first; under "cuda" alone its own engines stand already.
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor="nvidia")(RapoFSDPEngine)
EngineRegistry.register("language_model", "fsdp2", device="cpu")(CpuFSDPEngine)
if MegatronEngineWithLMHead is not None:  # None: megatron-core is not installed
    from rapo_verl.training.megatron import RapoMegatronEngine

    EngineRegistry.register("language_model", "megatron", device="cuda", vendor="nvidia")(RapoMegatronEngine)

# verl 0.9.1 workers/rollout/base.py:107: by name, so that vLLM is imported only in processes with a rollout.
rollouts._ROLLOUT_REGISTRY["vllm", "async"] = "rapo_verl.training.weights.RunServerAdapter"
