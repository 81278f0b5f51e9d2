"""The process of a run that talks to Ray: veRL's `run_ppo` with our task runner. Started by `rapo_verl.run.launch`."""

import os
import sys
from pathlib import Path

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

from rapo_verl.run.names import COLLAPSED, COLLAPSED_FILE, CONFIG_FILE, PROCESS_VARIABLES, SAVED, STOPPED_FILE
from rapo_verl.run.processes import end_with_parent
from rapo_verl.training.plugin import register_trainers


class RapoTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """veRL's task runner, with our trainers registered in its process."""

    def run(self, config: DictConfig) -> None:
        """Run the training of ``config.trainer.v1.trainer_mode``."""
        register_trainers()
        super().run(config)


def main(run_dir: Path) -> None:
    """Train as the config in the run folder says; raises what the training raised."""
    config = OmegaConf.load(run_dir / CONFIG_FILE)
    # Ray processes on other nodes do not inherit this process's environment.
    variables = {name: os.environ[name] for name in PROCESS_VARIABLES if name in os.environ}
    OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.env_vars", variables, merge=True)
    if os.environ.get("RAY_ADDRESS"):
        # The cluster's own figures hold; Ray refuses others. It is exactly as large as the job.
        for name in ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard"):
            config.ray_kwargs.ray_init.pop(name, None)
    try:
        run_ppo(config, task_runner_class=ray.remote(num_cpus=1)(RapoTaskRunner))
    finally:
        ray.shutdown()
    for file, code in ((COLLAPSED_FILE, COLLAPSED), (STOPPED_FILE, SAVED)):
        if (run_dir / file).exists():
            sys.exit(code)


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
