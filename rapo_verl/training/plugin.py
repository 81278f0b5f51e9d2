"""The one module that touches veRL's registries.

Imported at the end of ``import verl`` in every process, through the ``verl.plugins`` entry point and, in a run of
ours, through ``VERL_USE_EXTERNAL_MODULES`` as well: veRL drops an entry point that raises with a DEBUG line
(verl/__init__.py:70), but not a module named there. Keep it light: it may add 0.2 s at most to ``import verl``.
"""

import functools
import os

from verl.plugin.platform.platform_manager import PlatformRegistry

from rapo_verl.training.cpu_platform import CpuPlatform, VllmCpuFinder

PlatformRegistry.register(platform="cpu")(CpuPlatform)


def on_cpu() -> bool:
    """Whether this process was told to run veRL on the ``cpu`` platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def _prepare_cpu_process() -> None:
    VllmCpuFinder.install()
    # verl 0.9.1 utils/distributed.py:87 composes the backend as "cpu:gloo,<device>:<backend>", here
    # "cpu:gloo,cpu:gloo", which torch refuses. The function takes a backend; its callers do not pass one.
    import verl.utils.distributed as distributed

    init = distributed.initialize_global_process_group_ray
    if not isinstance(init, functools.partial):
        distributed.initialize_global_process_group_ray = functools.partial(init, backend="cpu:gloo")


def register_engines() -> None:
    """Register our engines and weight sender.

    Called when `rapo_verl.training.external_lib` is imported as ``model.external_lib`` in each worker.
    """
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead, MegatronEngineWithLMHead
    from verl.workers.rollout import base as rollouts

    from rapo_verl.training.cpu_engine import CpuFSDPEngine
    from rapo_verl.training.engine import FSDPHead, MegatronHead

    EngineRegistry.register("language_model", "fsdp2", device="cpu")(CpuFSDPEngine)
    # By name: veRL imports it (and vLLM) only in processes with a rollout.
    rollouts._ROLLOUT_REGISTRY["vllm", "async"] = "rapo_verl.training.weights.RunServerAdapter"

    # With a vendor, which veRL looks up first: under "cuda" alone its own engines are registered already.
    class RapoFSDPEngine(FSDPHead, FSDPEngineWithLMHead):
        """veRL's FSDP engine with RAPO's head."""

    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor="nvidia")(RapoFSDPEngine)
    if MegatronEngineWithLMHead is not None:  # None: megatron-core is not installed
        from rapo_verl.training.megatron import GuardedMegatronEngine

        class RapoMegatronEngine(MegatronHead, GuardedMegatronEngine):
            """veRL's Megatron engine with RAPO's head, which stops before a step on a gradient that is not finite."""

        EngineRegistry.register("language_model", "megatron", device="cuda", vendor="nvidia")(RapoMegatronEngine)


def register_trainers() -> None:
    """Register our trainers under their ``trainer.v1.trainer_mode`` names; called in the task runner."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, register_trainer

    from rapo_verl.training import trainer

    for ours in (trainer.RapoTrainerSync, trainer.RapoTrainerColocateAsync, trainer.RapoTrainerSeparateAsync):
        register_trainer(f"rapo_{ours.base_mode}")(ours)
    # veRL's own trainers too save, stop and refuse NaN as ours do; `register_trainer` would refuse the names.
    TRAINER_REGISTRY["sync"] = trainer.SafeTrainerSync
    TRAINER_REGISTRY["colocate_async"] = trainer.SafeTrainerColocateAsync
    TRAINER_REGISTRY["separate_async"] = trainer.SafeTrainerSeparateAsync


if on_cpu():
    _prepare_cpu_process()
