"""The process of a run that talks to Ray: veRL's `run_ppo` with our task runner. Started by `rapo_verl.run.launch`."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rapo_verl.run.names import (
    COLLAPSED,
    COLLAPSED_FILE,
    CONFIG_FILE,
    FORK_SERVER_VARIABLE,
    PROCESS_VARIABLES,
    SAVED,
    STOPPED_FILE,
)
from rapo_verl.run.processes import end_with_parent
from rapo_verl.training.fork_server import fork_server

# What the processes of a run import: without Ray, and with it.
IMPORTED = ("tensordict", "transformers", "datasets", "vllm.config")
IMPORTED_UNDER_RAY = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "rapo_verl.training.trainer",
    "rapo_verl.training.worker",
    "rapo_verl.training.rollout",
    "rapo_verl.reward.nursery",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
)


def main(run_dir: Path) -> None:
    """Train as the config in the run folder says; raises what the training raised."""
    config = OmegaConf.load(run_dir / CONFIG_FILE)
    assert isinstance(config, DictConfig)
    # Ray processes on other nodes do not inherit this process's environment.
    variables = {name: os.environ[name] for name in PROCESS_VARIABLES if name in os.environ}
    OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.env_vars", variables, merge=True)
    if os.environ.get("RAY_ADDRESS"):
        # The cluster's own figures hold; Ray refuses others. It is exactly as large as the job.
        for name in ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard"):
            config.ray_kwargs.ray_init.pop(name, None)
    here = config.trainer.device == "cpu" and not os.environ.get("RAY_ADDRESS")  # other nodes do not reach the server
    warm = here and os.environ.get(FORK_SERVER_VARIABLE) != "0"
    with fork_server(IMPORTED, IMPORTED_UNDER_RAY) if warm else nullcontext() as python:
        if python is not None:
            OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.py_executable", python)
        _train(config)
    for file, code in ((COLLAPSED_FILE, COLLAPSED), (STOPPED_FILE, SAVED)):
        if (run_dir / file).exists():
            sys.exit(code)


def _train(config: DictConfig) -> None:
    # After the fork server's start, which must not have Ray.
    import ray
    from verl.trainer.main_ppo import run_ppo

    from rapo_verl.training.task_runner import RapoTaskRunner

    try:
        run_ppo(config, task_runner_class=ray.remote(num_cpus=1)(RapoTaskRunner))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
