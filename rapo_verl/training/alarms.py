"""What a step's groups and metrics say of the run: unbiased pass@k of the groups, and the alarms; no number changes."""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from rapo_verl.method.passk import pass_at_k_curve
from rapo_verl.plan.job import files_of
from rapo_verl.run.alarms import NAMES, Listener
from rapo_verl.run.folder import read_metrics
from rapo_verl.run.names import GROUPS_FILE

logger = logging.getLogger(__name__)


class Groups(NamedTuple):
    """A step's groups: the row of each one's problem in the training file, right answers, all answers; (groups,)."""

    problems: list[int]
    right: list[int]
    n: list[int]


def group_metrics(groups: Groups) -> dict[str, float]:
    """Return ``rapo/groups/pass@k``, unbiased, for k = 1, 2, 4, ... and n; and the share of groups all right.

    Those and the groups without any right answer, 1 - pass@n, have no spread of rewards: they teach nothing.
    """
    right, sizes = np.array(groups.right), np.array(groups.n)
    n = int(sizes.min())
    ks = sorted({n, *(2**i for i in range(n.bit_length()))})
    metrics = {f"rapo/groups/pass@{k}": float(p) for k, p in zip(ks, pass_at_k_curve(right, sizes, ks))}
    return metrics | {"rapo/groups/all_right": float((right == sizes).mean())}


def groups_of(batch: Any) -> Groups:
    """Return the groups of a batch that is in the queue; an answer is right where its ``acc``, or its reward, is 1."""
    rows = [key for key, tag in zip(batch.keys, batch.tags) if not tag.get("is_padding")]
    # A key is {group}_{answer}_{turn}: the last turn has the reward.
    last = {key.rpartition("_")[0]: key for key in sorted(rows, key=lambda key: int(key.rpartition("_")[2]))}
    fields = ["index", "extra_fields", "rm_scores"]
    data = tq.kv_batch_get(keys=list(last.values()), partition_id=batch.partition_id, select_fields=fields)
    problem: dict[str, int] = {}
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, index, extra, scores in zip(last, data["index"], data["extra_fields"], data["rm_scores"].unbind()):
        group = answer.rpartition("_")[0]
        accuracy = (extra.get("reward_extra_info") or {}).get("acc")
        problem[group] = int(index)
        right[group].append(float(scores.sum() if accuracy is None else accuracy) >= 1)
    return Groups(list(problem.values()), [sum(r) for r in right.values()], [len(r) for r in right.values()])


class AlarmMixin(PPOTrainer):
    """Adds ``rapo/groups/*`` and ``rapo/alarm/*`` to a step's metrics, and says once when an alarm begins."""

    # What the alarms say, once one holds and the run is to end then (`survival.stop_on_collapse`).
    _collapse: str | None = None
    _listener: Listener | None = None

    def _compute_metrics(self, batch: Any, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1868: the first to see a step's metrics whole, the last
        # to see its batch.
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        groups = groups_of(batch)
        metrics.update(group_metrics(groups))
        run_dir = Path(self.config.run_dir)
        # Rows of several files, and of a file without `extra_info.index`, cannot be told apart.
        if len(files_of(self.config, "train_files")) == 1 and len(set(groups.problems)) > 1:
            with (run_dir / GROUPS_FILE).open("a") as file:
                file.write(json.dumps({"step": global_steps, **groups._asdict()}, separators=(",", ":")) + "\n")
        if self._listener is None:
            # Of earlier starts, up to the step that this one went on from, and the validation before it.
            self._listener = Listener([r for r in read_metrics(run_dir) if r["step"] < global_steps])
        held, begun = self._listener.hear(global_steps, metrics)
        metrics.update({f"rapo/alarm/{name}": float(name in {alarm.name for alarm in held}) for name in NAMES})
        for alarm in begun:
            logger.warning("alarm %s, since step %d: %s (docs/watching.md)", alarm.name, alarm.since, alarm.sentence)
        if held and self.config.survival.stop_on_collapse:
            self._collapse = " ".join(f"{alarm.name}: {alarm.sentence}" for alarm in held)
