"""veRL's task runner with our trainers."""

from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1

from rapo_verl.training.plugin import register_trainers


class RapoTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """veRL's task runner, with our trainers registered in its process."""

    def run(self, config: DictConfig) -> None:
        """Run the training of ``config.trainer.v1.trainer_mode``."""
        register_trainers()
        super().run(config)
