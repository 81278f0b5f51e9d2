"""Numbers that are none: found before the optimizer steps, with the batch kept for a look (`rapo inspect-batch`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Per-token fields of a batch that the update reads; those that a run does not have are left out.
FIELDS = ("rm_scores", "advantages", "returns", "old_log_probs", "ref_log_prob", "rollout_log_probs")
CONTEXT = ("prompts", "responses", "response_mask")
FOLDER = "bad_batches"


class NonFiniteError(ArithmeticError):
    """NaN or infinity where the update would read it."""


def non_finite_rows(fields: Mapping[str, Tensor], mask: Tensor) -> dict[str, list[int]]:
    """Return, of each field with NaN or infinity at an unmasked token, the rows that have one.

    Args:
        fields: (batch, response) each; what stands at masked positions does not count.
        mask: (batch, response), nonzero at response tokens.
    """
    bad = {name: (~torch.isfinite(values) & mask.bool()).any(dim=1) for name, values in fields.items()}
    return {name: rows.nonzero().flatten().tolist() for name, rows in bad.items() if rows.any()}


def non_finite_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the actor's and RAPO's metrics that are NaN or infinite."""
    return [
        f"{name} = {value}"
        for name, value in metrics.items()
        if name.startswith(("actor/", "rapo/")) and isinstance(value, int | float) and not math.isfinite(value)
    ]


def dump_batch(run_dir: Path, step: int, batch: Mapping[str, Tensor], why: str) -> Path:
    """Keep a batch, padded tensors by name, with the reason; return the file, readable without running pickles."""
    path = run_dir / FOLDER / f"step_{step}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"step": step, "why": why, **batch}, path)
    return path


def describe(path: Path, decode: Any = None, rows: int = 5) -> list[str]:
    """Return lines that say what is wrong in a dumped batch: fields, rows, tokens.

    Args:
        path: file of `dump_batch`.
        decode: from token ids to text, None to show ids.
        rows: how many of the bad rows to show.
    """
    batch = torch.load(path, weights_only=True)
    mask = batch["response_mask"].bool()
    fields = {name: batch[name] for name in FIELDS if name in batch}
    lines = [f"step {batch['step']}: {batch['why']}", f"{mask.shape[0]} responses, {int(mask.sum())} tokens"]
    for name, values in fields.items():
        kept = values[mask]
        good = kept[torch.isfinite(kept)]
        span = f"from {good.min():.6g} to {good.max():.6g}, mean {good.mean():.6g}" if good.numel() else "none finite"
        lines.append(f"  {name}: {kept.numel() - good.numel()} of {kept.numel()} not finite; {span}")
    bad = non_finite_rows(fields, mask)
    for row in sorted({row for found in bad.values() for row in found})[:rows]:
        lines.append(f"row {row}: {', '.join(name for name, found in bad.items() if row in found)}")
        for name in ("prompts", "responses"):
            if name in batch:
                ids = batch[name][row].tolist()
                lines.append(f"  {name}: {decode(ids) if decode else ids}")
        for name in bad:
            where = (~torch.isfinite(fields[name][row]) & mask[row]).nonzero().flatten().tolist()
            if where:
                lines.append(f"  {name} at tokens {where[:20]}")
    return lines
