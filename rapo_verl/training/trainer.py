"""veRL's trainers with RAPO's worker in place of veRL's."""

from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from rapo_verl.training.survival import SafeTrainerMixin
from rapo_verl.training.validation import validation_pass_at_k
from rapo_verl.training.worker import RapoWorker

_MODEL_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy)


class RapoTrainerMixin(PPOTrainer):
    """What RAPO changes in any of veRL's v1 trainers: the worker class and the names of its metrics."""

    base_mode: str

    def __init__(self, config: DictConfig):
        # veRL compares this name to decide on buffers and checkpoints (trainer_base.py:153, 731, 902, 912, 1004,
        # 1499); ours ends with the lookup of the class.
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.base_mode
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:788-809 names its worker class here, with no setting for it;
        # trainer_separate_async.py:138 then another, of which RAPO's is a subclass too.
        super()._init_resource_pool_mgr()
        for role in _MODEL_ROLES:
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(RapoWorker)

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1852 puts "actor/" before every metric of the loss.
        batch = super()._update_actor(batch, metrics)
        for key in [key for key in metrics if key.startswith("actor/rapo/")]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)
        return batch

    def _val_metrics_update(
        self, data_sources: list, sample_uids: list, reward_extra_infos_dict: dict, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1342 logs best@k by resampling with replacement, which is biased.
        metrics = super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs)
        n = self.config.actor_rollout_ref.rollout.val_kwargs.n
        correct = reward_extra_infos_dict.get("acc") or reward_extra_infos_dict["reward"]
        return metrics | validation_pass_at_k(data_sources, sample_uids, correct, n)

    def _dump_generations(self, **kwargs: Any) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1331 dumps of training samples only their uid (_validate dumps
        # what the reward function returned); the batch is still in the queue.
        fields: dict = kwargs["reward_extra_infos_dict"]
        if kwargs["dump_path"] == self.config.trainer.get("rollout_data_dir") and set(fields) == {"uid"}:
            data = tq.kv_batch_get(keys=fields["uid"], partition_id="train", select_fields=["extra_fields"])
            records = [extra.get("reward_extra_info") or {} for extra in data["extra_fields"]]
            names = dict.fromkeys(name for record in records for name in record)
            kwargs["reward_extra_infos_dict"] = fields | {name: [r.get(name) for r in records] for name in names}
        super()._dump_generations(**kwargs)


class SafeTrainerSync(SafeTrainerMixin, PPOTrainerSync):
    """veRL's synchronous trainer itself (``trainer.v1.trainer_mode=sync``), watched over."""


class SafeTrainerColocateAsync(SafeTrainerMixin, PPOTrainerColocateAsync):
    """veRL's trainer that samples ahead on the same GPUs (``colocate_async``), watched over."""


class SafeTrainerSeparateAsync(SafeTrainerMixin, PPOTrainerSeparateAsync):
    """veRL's trainer that samples on GPUs of its own (``separate_async``), watched over."""


class RapoTrainerSync(RapoTrainerMixin, SafeTrainerMixin, PPOTrainerSync):
    """RAPO on veRL's synchronous trainer (``trainer.v1.trainer_mode=rapo_sync``)."""

    base_mode = "sync"


class RapoTrainerColocateAsync(RapoTrainerMixin, SafeTrainerMixin, PPOTrainerColocateAsync):
    """RAPO on veRL's trainer that samples ahead on the same GPUs (``rapo_colocate_async``)."""

    base_mode = "colocate_async"


class RapoTrainerSeparateAsync(RapoTrainerMixin, SafeTrainerMixin, PPOTrainerSeparateAsync):
    """RAPO on veRL's trainer that samples on GPUs of its own (``rapo_separate_async``)."""

    base_mode = "separate_async"
