"""Our names in veRL: its platform here, the trainers in the task runner, the engines by `external_lib`.

Imported at the end of ``import verl`` in every process, through the ``verl.plugins`` entry point and, in a run of
ours, through ``VERL_USE_EXTERNAL_MODULES`` as well: veRL drops an entry point that raises with a DEBUG line
(verl/__init__.py:70), but not a module named there. Keep it light: it may add 0.2 s at most to ``import verl``.
"""

import functools
import os
import sys

from verl.plugin.platform.platform_manager import PlatformRegistry

from rapo_verl.training.cpu_platform import CpuPlatform, VllmCpuFinder

PlatformRegistry.register(platform="cpu")(CpuPlatform)


def _prepare_cpu_process() -> None:
    sys.meta_path.append(VllmCpuFinder())
    # verl 0.9.1 utils/distributed.py:87: composes the backend as "cpu:gloo,<device>:<backend>", here
    # "cpu:gloo,cpu:gloo", which torch refuses. The function takes a backend; its callers do not pass one.
    import verl.utils.distributed as distributed

    init = distributed.initialize_global_process_group_ray
    distributed.initialize_global_process_group_ray = functools.partial(init, backend="cpu:gloo")


def register_trainers() -> None:
    """Register our trainers, under veRL's own names too; called in the task runner."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from rapo_verl.training.trainer import TRAINERS

    # verl 0.9.1 trainer/ppo/v1/trainer_base.py:2005: refuses names that are taken, as veRL's own are.
    # veRL's own save, stop and refuse NaN as ours do then.
    TRAINER_REGISTRY.update(TRAINERS)


if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    _prepare_cpu_process()
