"""The collapse alarm: rules over a run's metrics, and the listener that a trainer tells of each step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rapo_verl.run import signs
from rapo_verl.run.signs import GROUPS, PROBLEMS, UNBIASED, History, series

# Records in a row for which a rule must hold before it speaks.
PERSIST = 3
# What the rules read, beside the training groups and validation.
READ = ("critic/rewards/mean", "actor/entropy", "rapo/truncated", "rapo/reference_mass_sampled")
SENTENCES = {
    "unlearned": "The reward has fallen under half of its best, and stays there.",
    "noise": "Entropy is over twice its start while the reward falls: the policy turns into noise; a smaller "
    "entropy_coeff.",
    "runaway": "More than half of the responses are cut off, twice as many as at the start, and the reward falls.",
    "narrowed": "Entropy is under a fifth of its start and 30 % of the reference's mass is never sampled: modes are "
    "lost.",
    "sharpened": "pass@1 of the training groups rises, but where an answer fails, others help a quarter as often as at "
    "the start: a problem's answers become all right or all wrong.",
}
NAMES = (*SENTENCES, "breadth")


class Alarm(NamedTuple):
    """A rule that holds now: its name, the step from which on it has held, and why that is a collapse."""

    name: str
    since: int
    sentence: str


def alarms(history: History) -> list[Alarm]:
    """Return the rules of collapse that hold now and have held for `PERSIST` records or more."""
    reward, entropy, cut, mass = (_aligned(history, key) for key in READ)
    best = np.fmax.accumulate(reward) if len(reward) else reward
    low, falls = (best >= signs.LEAST_REWARD) & (reward < signs.UNLEARNED * best), reward < 0.8 * best
    once, helped = _helped(history)
    noise, narrow = entropy > signs.MELTED * _start(entropy), entropy < signs.NARROWED * _start(entropy)
    rules = {
        "unlearned": low,
        "noise": noise & falls,
        "runaway": (cut > signs.CUT_OFF) & (cut > 2 * _start(cut)) & falls,
        "narrowed": narrow & (mass < signs.MODES_LOST),
        "sharpened": (helped < 0.25 * _start(helped)) & (once > _start(once)),
    }
    held = {name: _held(holds) for name, holds in rules.items()}
    found = [Alarm(name, int(history[-n]["step"]), SENTENCES[name]) for name, n in held.items() if n >= PERSIST]
    return found + _breadth(history)


def _held(holds: np.ndarray) -> int:
    """Return for how many records up to the last a rule holds."""
    return len(holds) if holds.all() else int(np.argmin(holds[::-1]))


def _helped(history: History) -> tuple[np.ndarray, np.ndarray]:
    """Return pass@1 of the training groups, and of the answers that fail the share that n attempts make up for."""
    once, most = (_aligned(history, f"{GROUPS}{k}") for k in (1, signs.group_size(history)))
    # Where everything is right there is nothing to make up for.
    return once, (most - once) / np.where(once < 1, 1 - once, np.nan)


def _aligned(history: History, key: str) -> np.ndarray:
    """Return `smooth` of one metric at every record, (records,); NaN, of which no rule holds, where it is missing."""
    steps, values = series(history, key)
    place = dict(zip(steps, signs.smooth(values)))
    return np.array([place.get(record["step"], np.nan) for record in history], dtype=np.float64)


def _start(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[min(signs.WINDOW, len(known)) - 1]) if len(known) else np.nan


def _breadth(history: History) -> list[Alarm]:
    """Return the alarm of validation that has lost at many attempts, twice in a row.

    At half of the answers that it samples: at all of them one answer more decides on a problem.
    """
    attempts: dict[str, list[int]] = {}
    for key in signs.validated(history):
        source, _, last = key.removeprefix(UNBIASED).rpartition("/")
        if key.startswith(UNBIASED) and last.isdigit():
            attempts.setdefault(source, []).append(int(last))
    found = []
    for source, ks in attempts.items():
        k = sorted(ks)[-2 if len(ks) > 2 else -1]
        steps, values = series(history, f"{UNBIASED}{source}/{k}")
        held = _held(values < values[0] - signs.tolerance(history, source)) if len(values) else 0
        if held >= 2:
            told = f"{source}: pass@{k} fell from {values[0]:.3f} to {values[-1]:.3f}."
            found.append(Alarm("breadth", int(steps[-held]), told))
    return found


class Listener:
    """Told every step of a run that trains, it says which alarms hold and which have just begun.

    Args:
        past: what the run has logged before, in earlier starts too.
    """

    def __init__(self, past: History):
        self._history = [_read(record) for record in past]
        self._held = {alarm.name for alarm in alarms(self._history)}

    def hear(self, step: int, metrics: Mapping[str, Any]) -> tuple[list[Alarm], list[Alarm]]:
        """Return the alarms that hold after a step, and those of them that did not before."""
        self._history.append(_read({**metrics, "step": step}))
        held = alarms(self._history)
        begun = [alarm for alarm in held if alarm.name not in self._held]
        self._held = {alarm.name for alarm in held}
        return held, begun


def _read(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a step's metrics, a hundred and more, what the rules read."""
    return {
        key: value
        for key, value in record.items()
        if key in ("step", *READ) or key.startswith((GROUPS, UNBIASED, PROBLEMS))
    }
