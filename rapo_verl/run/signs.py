"""What a run's metrics mean now: a sentence for each of them. Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Records of a mean: short enough to speak of now, long enough for a batch's noise.
WINDOW = 5
# Of pass@k under its first validation: more than the noise of a hundred problems; of fewer, more.
LOST = 0.05
# What is bad enough for a warning here and, if it lasts, for an alarm: a reward under that share of its best (which was
# worth the name), entropy over and under so many times its start, so large a share of responses that are cut off, so
# little of the reference's mass that is still sampled.
LEAST_REWARD, UNLEARNED, MELTED, NARROWED, CUT_OFF, MODES_LOST = 0.05, 0.5, 2, 0.2, 0.5, 0.7
GROUPS, UNBIASED, PROBLEMS = "rapo/groups/pass@", "val/pass@k/", "val/problems/"
FINE, NOTE, WARN = "fine", "note", "warn"
History = Sequence[Mapping[str, Any]]


class Reading(NamedTuple):
    """One metric: its curve, and what it means now in one sentence; level is `FINE`, `NOTE` or `WARN`."""

    title: str
    unit: str
    steps: np.ndarray
    values: np.ndarray
    level: str
    sentence: str


class Trend(NamedTuple):
    """Means over `WINDOW` records: the first, the last and the highest; and which way the last two windows go."""

    start: float
    now: float
    best: float
    way: str


def series(history: History, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (S,) and values (S,) of one metric where it was recorded and is finite."""
    rows = [
        (record["step"], float(record[key]))
        for record in history
        if isinstance(record.get(key), int | float) and np.isfinite(record[key])
    ]
    return tuple(np.array(rows, dtype=np.float64).reshape(-1, 2).T)  # type: ignore[return-value]


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of the last `WINDOW` records, of fewer at the beginning; shape of the argument."""
    total, count = np.cumsum(np.insert(values, 0, 0.0)), np.arange(1, len(values) + 1)
    low = np.maximum(count - WINDOW, 0)
    return (total[count] - total[low]) / (count - low)


def trend(values: np.ndarray) -> Trend:
    """Return where a curve of one record or more began, is, was highest, and which way it goes.

    Rising or falling: the last window's mean is off the one before it by more than two standard errors, the noise of a
    record told from neighbours' differences.
    """
    mean = smooth(values)
    start = mean[min(WINDOW, len(values)) - 1]
    way = "level"
    if len(values) >= 2 * WINDOW:
        noise = np.diff(values[-4 * WINDOW :]).std() / np.sqrt(2)
        step = mean[-1] - mean[-1 - WINDOW]
        if abs(step) > 2 * noise * np.sqrt(2 / WINDOW) and abs(step) > 0.02 * abs(start):
            way = "rising" if step > 0 else "falling"
    return Trend(float(start), float(mean[-1]), float(mean[min(WINDOW, len(values)) - 1 :].max()), way)


def _reward(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.3g} now, {t.start:.3g} at the start, lately {t.way}"
    if t.best >= LEAST_REWARD and t.now < UNLEARNED * t.best:
        return WARN, f"{told}: less than half of its best ({t.best:.3g}); the policy has unlearned what it could."
    return FINE, f"{told}. It is measured on training problems and says nothing of many attempts."


def _entropy(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.3g} now, {t.start:.3g} at the start, lately {t.way}"
    if t.now > MELTED * t.start:
        return WARN, f"{told}: more than twice; tokens are drawn at random more and more, look at the samples."
    if t.now < NARROWED * t.start:
        return NOTE, f"{told}: under a fifth; fine while validation at many attempts holds, else modes are lost."
    return FINE, f"{told}: between a fifth and twice its start."


def _truncation(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.1%} of the responses are cut off ({t.start:.1%} at the start, lately {t.way})"
    if t.now > CUT_OFF:
        return WARN, f"{told}: more than half; a response that is cut before its answer earns nothing."
    if t.now > 0.1:
        return NOTE, f"{told}: over a tenth; a longer data.max_response_length, or look at what they say."
    return FINE, f"{told}."


def _length(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.4g} tokens now, {t.start:.4g} at the start, lately {t.way}"
    if t.now > 2 * t.start or t.now < 0.5 * t.start:
        return NOTE, f"{told}: by more than a factor of two; read a few samples to see of what."
    return FINE, f"{told}."


def _forward_kl(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.3g} nats a token from the reference to the policy, lately {t.way}"
    if t.now > 1:
        return WARN, f"{told}: over one nat; it gives the reference's tokens under 37 % of their mass (geometric mean)."
    return FINE, f"{told}; 0 would be the reference itself."


def _mass(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.2f} of the reference's mass is on tokens that the policy still samples"
    if t.now < MODES_LOST:
        return WARN, f"{told}: the rest belongs to modes it has dropped, on which no sampled term acts any more."
    if t.now < 0.9:
        return NOTE, f"{told}: it begins to drop modes."
    return FINE, f"{told}: it covers the reference (1 up to noise)."


def _surrogate_clips(t: Trend) -> tuple[str, str]:
    if t.now > 0.2:
        return NOTE, f"{t.now:.1%} of the tokens have left the clip range: the steps are large; a lower learning rate."
    return FINE, f"{t.now:.2%} of the tokens have left the clip range; under 20 % the steps are small enough."


def _bound_clips(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.2%} of the sampled tokens are beyond rho_max, where the pull stops growing"
    return (NOTE, f"{told}: the policy is far from the reference there.") if t.now > 0.02 else (FINE, f"{told}.")


def _gradient(t: Trend) -> tuple[str, str]:
    told = f"{t.now:.3g} now, {t.start:.3g} at the start"
    return (WARN, f"{told}: more than ten times.") if t.now > 10 * t.start else (FINE, f"{told}, lately {t.way}.")


# Metric, title, unit, rule.
RULES: tuple[tuple[str, str, str, Callable[[Trend], tuple[str, str]]], ...] = (
    ("critic/rewards/mean", "Reward", "", _reward),
    ("actor/entropy", "Entropy", "nats / token", _entropy),
    ("rapo/reference_mass_sampled", "Reference mass still sampled", "", _mass),
    ("rapo/forward_kl", "Forward KL(ref ‖ policy)", "nats / token", _forward_kl),
    ("rapo/truncated", "Truncated", "share", _truncation),
    ("response_length/mean", "Response length", "tokens", _length),
    ("actor/pg_clipfrac", "Outside the clip range", "share", _surrogate_clips),
    ("rapo/forward_kl_clipped_fraction", "Beyond rho_max", "share", _bound_clips),
    ("actor/grad_norm", "Gradient norm", "", _gradient),
)


def readings(history: History) -> list[Reading]:
    """Return what each metric that was recorded means now; validation at the end."""
    found = []
    for key, title, unit, rule in RULES:
        steps, values = series(history, key)
        if len(values):
            found.append(Reading(title, unit, steps, values, *rule(trend(values))))
    return found + _groups(history) + [_validation(history, key) for key in validated(history)]


def group_size(history: History) -> int:
    """Return the largest k of the training groups' pass@k in the last record; 0 without."""
    keys = [key for key in (history[-1] if history else ()) if key.startswith(GROUPS)]
    return max((int(key.removeprefix(GROUPS)) for key in keys), default=0)


def _groups(history: History) -> list[Reading]:
    """Return pass@1 and pass@n of the training groups, in which every step has other problems."""
    n = group_size(history)
    if not n:
        return []
    curves = {k: series(history, f"{GROUPS}{k}") for k in sorted({1, n})}
    trends = {k: trend(values) for k, (_, values) in curves.items()}
    flat = 1 - trends[n].now + trend(series(history, "rapo/groups/all_right")[1]).now
    found = []
    for k, (steps, values) in curves.items():
        told = f"{trends[k].now:.3f} now, {trends[k].start:.3f} at the start, lately {trends[k].way}"
        level, more = FINE, f"; {flat:.0%} of the groups have no spread and teach nothing." if k == n else "."
        if flat > 0.8 and k == n:
            level = NOTE
        found.append(Reading(f"Training groups: pass@{k}", "", steps, values, level, told + more))
    return found


def validated(history: History) -> list[str]:
    """Return the metrics of validation that are shown: unbiased pass@k, or else veRL's."""
    keys = {key for record in history for key in record if key.startswith((UNBIASED, "val-core/"))}
    unbiased = [key for key in keys if key.startswith(UNBIASED)]
    return sorted(unbiased or keys, key=lambda key: (key.rpartition("/")[0], len(key), key))


def tolerance(history: History, source: str) -> float:
    """Return how far under its first value pass@k of a validation must be to have lost: `LOST`, of 25 problems 0.1."""
    problems = series(history, f"{PROBLEMS}{source}")[1]
    return LOST * max(1.0, (100 / problems[-1]) ** 0.5) if len(problems) else LOST


def _validation(history: History, key: str) -> Reading:
    steps, values = series(history, key)
    _, source, k = key.rsplit("/", 2)
    title = f"Validation, {source}: pass@{k}" if key.startswith(UNBIASED) else f"Validation, {source}: {k}"
    if not len(values):
        return Reading(title, "", steps, values, NOTE, "Never a finite value.")
    told = f"{values[-1]:.3f} at step {steps[-1]:.0f}, {values[0]:.3f} at the first, best {values.max():.3f}"
    lost = values[-1] < values[0] - tolerance(history, source)
    return Reading(title, "", steps, values, *((WARN, f"{told}: lost since.") if lost else (FINE, f"{told}.")))
