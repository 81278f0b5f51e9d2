"""veRL's task runner with our trainers."""

import logging

from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1

from rapo_verl.training.plugin import register_trainers


def log_apart_from_root() -> None:
    """Give our loggers a handler of their own."""
    # verl 0.9.1 utils/logging_utils.py:22: does so with its own; imports of this process set the root's to ERROR.
    log, handler = logging.getLogger("rapo_verl"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s:%(asctime)s:%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


class RapoTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """veRL's task runner, with our trainers registered in its process."""

    def run(self, config: DictConfig) -> None:
        """Run the training of ``config.trainer.v1.trainer_mode``."""
        log_apart_from_root()
        register_trainers()
        super().run(config)
