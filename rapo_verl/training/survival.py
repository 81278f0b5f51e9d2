"""What every trainer of ours does beside training: complete checkpoints, a stop in time; it changes no number."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from rapo_verl import Refused
from rapo_verl.run.checkpoints import finish, identity, make_room, retain
from rapo_verl.run.files import write_atomic
from rapo_verl.run.inputs import too_few_epochs
from rapo_verl.run.names import COLLAPSED_FILE, RESUME_VARIABLE, STOPPED_FILE
from rapo_verl.run.stopping import Stopping
from rapo_verl.training.alarms import AlarmMixin
from rapo_verl.training.guards import GuardMixin
from rapo_verl.training.liveness import actors_watched

logger = logging.getLogger(__name__)


class SurvivalMixin(GuardMixin, AlarmMixin):
    """Stands before any of veRL's v1 trainers in the order of classes."""

    total_training_steps: int

    def __init__(self, config: DictConfig):
        # veRL's retention (utils/checkpoint/checkpoint_manager.py:166) removes before it saves, and counts only what
        # this process saved; ours (`retain`) takes its setting.
        self._keep = config.trainer.get("max_actor_ckpt_to_keep")
        with open_dict(config):
            config.trainer.max_actor_ckpt_to_keep = config.trainer.max_critic_ckpt_to_keep = None
        self._stopping = Stopping.from_environment()
        self._saved_step = self._resumed_step = 0
        self._step_started = 0.0
        super().__init__(config)

    def fit(self, agent_loop_manager: Any) -> None:
        """Train as veRL does; the run ends when one of its actors has died."""
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:467: its loop ends with the epochs, too, and saves nothing then.
        # What the filter of the data leaves is known only here.
        if problems := too_few_epochs(self.config, len(self.train_dataset)):
            raise Refused(problems)
        with actors_watched():
            super().fit(agent_loop_manager)

    def _load_checkpoint(self) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:850: trains from scratch where its tracker names a missing folder.
        super()._load_checkpoint()
        self._saved_step = self._resumed_step = self.global_steps
        expected = int(os.environ.get(RESUME_VARIABLE) or self.global_steps)
        if self.global_steps != expected:
            raise Refused(
                f"the run is to go on from step {expected}, but this node loaded step {self.global_steps} from "
                f"{self.config.trainer.default_local_dir}: is that folder on a filesystem that every node sees?"
            )

    def _save_checkpoint(self) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:948: its files are complete once this returns, and not before.
        started = time.monotonic()
        root = Path(self.config.trainer.default_local_dir)
        make_room(root, self.global_steps)
        super()._save_checkpoint()
        facts = {
            **identity(self.config),
            "rapo": OmegaConf.to_container(self.config.rapo),
            "wandb_run_id": os.environ.get("WANDB_RUN_ID"),
        }
        finish(root / f"global_step_{self.global_steps}", self.global_steps, facts)
        for step in retain(root, self._keep, never=self._resumed_step):
            logger.info("removed the checkpoint of step %d", step)
        self._saved_step = self.global_steps
        took = time.monotonic() - started
        self._stopping.note(save=took)
        self._step_started += took  # a step's own time is without its save

    def on_step_begin(self) -> None:
        """Start the clock of the step."""
        self._step_started = time.monotonic()
        super().on_step_begin()

    def on_validate_begin(self) -> None:
        """Start the clock of the validation."""
        self._validation_started = time.monotonic()
        super().on_validate_begin()

    def on_validate_end(self) -> None:
        """Remember how long it took: the time budget keeps room for it."""
        super().on_validate_end()
        self._stopping.note(validation=time.monotonic() - self._validation_started)

    def on_step_end(self) -> None:
        """Save and make this step the last one if the run is to stop."""
        self._stopping.note(step=time.monotonic() - self._step_started)
        reason = self._collapse or self._stopping.reason()
        if reason and self.global_steps < self.total_training_steps:
            # Before veRL wakes its inference engines: they take the memory that saving needs.
            if self._saved_step != self.global_steps:
                self._save_checkpoint()
            self.total_training_steps = self.global_steps  # read by veRL's loop only (trainer_base.py:450)
            file = COLLAPSED_FILE if self._collapse else STOPPED_FILE
            write_atomic(Path(self.config.run_dir) / file, f"step {self.global_steps}: {reason}\n")
            logger.warning("saved step %d and stopping: %s", self.global_steps, reason)
        super().on_step_end()
