"""veRL's trainers with RAPO's worker in place of veRL's, complete checkpoints, and more to log."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from rapo_verl.method.passk import pass_at_k
from rapo_verl.run.combinations import MODES
from rapo_verl.run.reference_answers import answers_of_run
from rapo_verl.training.answers import AnswerRows
from rapo_verl.training.survival import SurvivalMixin
from rapo_verl.training.worker import RapoWorker

_MODEL_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy)
RAPO_PREFIX = "rapo_"


def validation_pass_at_k(
    data_sources: Sequence[str], uids: Sequence[str], correct: Sequence[float | None], n: int
) -> dict[str, float]:
    """Return ``val/pass@k/<data source>/<k>``, unbiased, for k = 1, 2, 4, ... up to n // 2, and for n.

    Beside it ``val/problems/<data source>``, which tells how far noise alone moves it.

    Args:
        data_sources: of each response.
        uids: of the prompt that each response answers.
        correct: 1.0 where it is right; None (the reward failed, which stops a run of ours) counts as wrong.
        n: responses asked for each prompt; one that is missing counts as wrong, as it does in veRL's own metrics.
    """
    solved: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for source, uid, right in zip(data_sources, uids, correct):
        solved[str(source)][str(uid)] += int((right or 0.0) >= 1.0)
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n // 2] + [n]
    problems = {f"val/problems/{source}": float(len(counts)) for source, counts in solved.items()}
    return problems | {
        f"val/pass@k/{source}/{k}": float(pass_at_k(np.array(list(counts.values())), n, k).mean())
        for source, counts in solved.items()
        for k in ks
    }


class RapoTrainerMixin(SurvivalMixin, PPOTrainer):
    """What every trainer of ours does in any of veRL's v1 trainers; RAPO itself where the mode's name asks for it.

    ``trainer.v1.trainer_mode=rapo_<mode>`` puts RAPO's worker in veRL's place, as ``rapo.head=fast`` does; ``<mode>``
    alone trains as veRL does.
    """

    def __init__(self, config: DictConfig):
        mode = config.trainer.v1.trainer_mode
        self._rapo = mode.startswith(RAPO_PREFIX) or config.rapo.head == "fast"
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:153, 731, 902, 912, 1004, 1499: compare this name to decide on
        # buffers and checkpoints; ours ends with the lookup of the class.
        with open_dict(config):
            config.trainer.v1.trainer_mode = mode.removeprefix(RAPO_PREFIX)
        super().__init__(config)
        answers = answers_of_run(config)
        self._answers = None if answers is None else AnswerRows(answers, config)

    def _init_resource_pool_mgr(self) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:788-809: names its worker class here, with no setting for it;
        # trainer/ppo/v1/trainer_separate_async.py:138 then another, of which RAPO's is a subclass too.
        super()._init_resource_pool_mgr()
        for role in _MODEL_ROLES:
            if self._rapo and role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(RapoWorker)

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        updated = batch
        if self._answers is not None:
            ranks = self.actor_rollout_wg._dispatch_info["actor"]  # as veRL asks for it in _balance_batch
            updated, found = self._answers.added(batch, self.global_steps, dp_size=max(ranks) + 1)
            metrics.update(found)
        super()._update_actor(updated, metrics)
        added = list(set(updated.keys) - set(batch.keys))
        if added:
            tq.kv_clear(keys=added, partition_id=batch.partition_id)
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1852: puts "actor/" before every metric of the loss.
        for key in [key for key in metrics if key.startswith("actor/rapo/")]:
            metrics[key.removeprefix("actor/")] = metrics.pop(key)
        return batch

    def _val_metrics_update(
        self, data_sources: list, sample_uids: list, reward_extra_infos_dict: dict, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1342: logs best@k by resampling with replacement, which is biased.
        metrics = super()._val_metrics_update(data_sources, sample_uids, reward_extra_infos_dict, *args, **kwargs)
        n = self.config.actor_rollout_ref.rollout.val_kwargs.n
        correct = reward_extra_infos_dict.get("acc") or reward_extra_infos_dict["reward"]
        return metrics | validation_pass_at_k(data_sources, sample_uids, correct, n)

    def _dump_generations(self, **kwargs: Any) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1262: dumps of training samples only their uid (_validate dumps
        # what the reward function returned); the batch is still in the queue.
        fields: dict = kwargs["reward_extra_infos_dict"]
        if kwargs["dump_path"] == self.config.trainer.get("rollout_data_dir") and set(fields) == {"uid"}:
            data = tq.kv_batch_get(keys=fields["uid"], partition_id="train", select_fields=["extra_fields"])
            records = [extra.get("reward_extra_info") or {} for extra in data["extra_fields"]]
            names = dict.fromkeys(name for record in records for name in record)
            kwargs["reward_extra_infos_dict"] = fields | {name: [r.get(name) for r in records] for name in names}
        super()._dump_generations(**kwargs)


# One class a mode, registered under veRL's name of it and under ours: RapoTrainerSync and so on.
TRAINERS = {
    prefix + mode: trainer
    for mode, theirs in zip(MODES, (PPOTrainerSync, PPOTrainerColocateAsync, PPOTrainerSeparateAsync))
    for trainer in [type(f"Rapo{theirs.__name__.removeprefix('PPO')}", (RapoTrainerMixin, theirs), {})]
    for prefix in ("", RAPO_PREFIX)
}
