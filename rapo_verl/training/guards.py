"""No step on a number that is none: stands before veRL's trainer, and keeps the batch (`rapo inspect-batch`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from rapo_verl.run.inspect import FIELDS
from rapo_verl.run.names import BAD_BATCHES_DIR

CONTEXT = ("prompts", "responses", "response_mask")


class NonFiniteError(ArithmeticError):
    """NaN or infinity where the update would read it."""


def non_finite_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the actor's and RAPO's metrics that are NaN or infinite."""
    return [
        f"{name} = {value}"
        for name, value in metrics.items()
        if name.startswith(("actor/", "rapo/")) and isinstance(value, int | float) and not math.isfinite(value)
    ]


def non_finite_fields(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return how many responses hold NaN or infinity at an unmasked token, of the fields where any does.

    Args:
        batch: fields of a batch and its ``response_mask``, jagged (batch, response). Read as they lie: a padded copy
            of a large batch takes gigabytes.
    """
    mask = batch["response_mask"]
    row = torch.repeat_interleave(torch.arange(len(mask)), mask.offsets().diff())
    found = {}
    for name, values in batch.items():
        bad = mask.values().bool() & ~torch.isfinite(values.values())
        if bad.any():
            found[name] = len(row[bad].unique())
    return found


def dump_batch(run_dir: Path, step: int, batch: Mapping[str, Tensor], why: str) -> Path:
    """Keep a batch, padded tensors by name, with the reason; return the file, readable without running pickles."""
    path = run_dir / BAD_BATCHES_DIR / f"step_{step}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"step": step, "why": why, **batch}, path)
    return path


class GuardMixin(PPOTrainer):
    """Refuses a batch before it is read, and a step after which a metric is NaN."""

    def _compute_ref_log_prob(self, batch: Any, metrics: dict) -> Any:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1695: the first to read a reward, of which RAPO makes phi.
        self._refuse_non_finite(batch, ("rm_scores",))
        return super()._compute_ref_log_prob(batch, metrics)

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1827: the last moment before the optimizer steps.
        self._refuse_non_finite(batch, FIELDS)
        batch = super()._update_actor(batch, metrics)
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:823: leaves out a step on a non-finite norm, and goes on.
        # Our Megatron engine raises before it.
        if bad := non_finite_metrics(metrics):
            self._stop_on(batch, f"after the update, {', '.join(bad)}")
        return batch

    def _refuse_non_finite(self, batch: Any, fields: tuple[str, ...]) -> None:
        if bad := non_finite_fields(_fetch(batch, (*fields, "response_mask"))):
            what = ", ".join(f"{name} in {rows} of {len(batch.keys)} responses" for name, rows in bad.items())
            self._stop_on(batch, f"before the update, NaN or infinity in {what}")

    def _stop_on(self, batch: Any, why: str) -> None:
        data = _fetch(batch, (*CONTEXT, *FIELDS)).to_padded_tensor()
        path = dump_batch(Path(self.config.run_dir), self.global_steps, dict(data.items()), why)
        raise NonFiniteError(
            f"step {self.global_steps}: {why}. Nothing of this step is saved. Look at it: rapo inspect-batch {path}"
        )


def _fetch(batch: Any, names: tuple[str, ...]) -> Any:
    """Return fields of a batch that is in the queue; it leaves out those that this run does not have."""
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))
