"""The metrics of training runs that a report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# verl's and our metric names, in the order in which a report shows them: key, words, unit.
TRAINING_METRICS = (
    ("critic/rewards/mean", "Reward, batch mean", ""),
    ("actor/entropy", "Entropy of the policy", "nats / token"),
    ("rapo/forward_kl", "Forward KL(ref ‖ policy)", "nats / token"),
    ("rapo/phi_mean", "φ(reward), batch mean", ""),
    ("actor/grad_norm", "Gradient norm", ""),
    ("response_length/mean", "Response length, mean", "tokens"),
    ("timing_s/step", "Time of a step", "s"),
)


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (S,) and values (S,) of one metric where it was recorded and is finite."""
    rows = [(h["step"], float(h[key])) for h in history if h.get(key) is not None and math.isfinite(h[key])]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def summarise_training(name: str, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of steps, what was not finite, and each metric's mean over the last tenth of its records."""
    if any("step" not in record for record in history):
        raise ValueError(f'training history {name!r}: every record needs the key "step"')
    keys = [key for key, _, _ in TRAINING_METRICS]
    known = [h[key] for h in history for key in keys if h.get(key) is not None]
    final = {}
    for key in keys:
        values = series(history, key)[1]
        final[key] = float(values[-max(1, len(values) // 10) :].mean()) if len(values) else None
    return {
        "steps": len(history),
        "last_step": max((h["step"] for h in history), default=None),
        "not_finite": sum(not math.isfinite(value) for value in known),
        "final": final,
    }
