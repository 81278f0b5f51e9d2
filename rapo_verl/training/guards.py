"""Numbers that are none: found before the optimizer steps, with the batch kept for a look (`rapo inspect-batch`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def dump_batch(run_dir: Path, step: int, batch: Mapping[str, Tensor], why: str) -> Path:
    """Keep a batch, padded tensors by name, with the reason; return the file, readable without running pickles."""
    path = run_dir / BAD_BATCHES_DIR / f"step_{step}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"step": step, "why": why, **batch}, path)
    return path
