"""Which training problems a run has won and lost since it first saw them, from the groups that it noted."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rapo_verl.method.passk import Band, clopper_pearson, paired_difference
from rapo_verl.run.names import GROUPS_FILE

# Of the page: the clearest of either kind.
SHOWN = 8


class Visit(NamedTuple):
    """A problem's answers in one step."""

    step: int
    right: int
    n: int


class Change(NamedTuple):
    """A problem at its first visit and at its last, with the 95 % intervals of its success probability then."""

    problem: int
    first: Visit
    last: Visit
    before: tuple[float, float]
    now: tuple[float, float]


class Seen(NamedTuple):
    """The problems that a run has seen more than once.

    Attributes:
        problems: how many.
        gained: problems whose interval at the last visit lies above that at the first, the clearest first.
        lost: likewise, below.
        change: mean pass@1 and pass@n at the last visits less those at the first; None below three problems.
    """

    problems: int
    gained: list[Change]
    lost: list[Change]
    change: Band | None


def visits(run: Path) -> dict[int, list[Visit]]:
    """Return each problem's visits in order of steps; of a step that was made again, the last one."""
    steps: dict[int, dict] = {}
    path = run / GROUPS_FILE
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # half a line
            continue
        # A run that goes on from an earlier step has unlearned what came after it.
        steps = {step: old for step, old in steps.items() if step < record["step"]} | {record["step"]: record}
    found: dict[int, list[Visit]] = {}
    for step, record in steps.items():
        for problem, right, n in zip(record["problems"], record["right"], record["n"]):
            found.setdefault(problem, []).append(Visit(step, right, n))
    return found


def seen_again(run: Path) -> Seen | None:
    """Return what became of the problems that were seen more than once; None if there are none."""
    pairs = {p: (v[0], v[-1]) for p, v in visits(run).items() if v[-1].step > v[0].step}
    if not pairs:
        return None
    first, last = (np.array([(v.right, v.n) for v in side]) for side in zip(*pairs.values()))
    before, now = (np.stack(clopper_pearson(counts, n), axis=1) for counts, n in (first.T, last.T))
    # How far apart the intervals lie; above 0: they do not meet.
    up, down = now[:, 0] - before[:, 1], before[:, 0] - now[:, 1]
    changes = [Change(p, *v, *map(tuple, i)) for (p, v), *i in zip(pairs.items(), before.tolist(), now.tolist())]
    gained, lost = ([changes[i] for i in np.argsort(-apart) if apart[i] > 0] for apart in (up, down))
    n = int(min(first[:, 1].min(), last[:, 1].min()))
    same = (first[:, 1] == last[:, 1]).all() and len(pairs) > 2
    change = paired_difference(last[:, 0], first[:, 0], first[:, 1], sorted({1, n})) if same else None
    return Seen(len(pairs), gained, lost, change)


def told(seen: Seen) -> str:
    """Return what became of the problems in sentences."""
    counts = (
        f"{seen.problems} problems were seen again; {len(seen.gained)} were gained and {len(seen.lost)} lost, where "
        "the 95 % intervals of the first and of the last visit do not meet."
    )
    if seen.change is None:
        return counts
    band = zip(seen.change.ks, seen.change.mean, seen.change.low, seen.change.high)
    means = ", ".join(f"pass@{k} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for k, mean, low, high in band)
    return f"{counts} On average of all of them, last less first: {means}."
