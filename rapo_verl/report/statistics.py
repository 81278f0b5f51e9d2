"""The numbers of a report as tidy tables: one row a set, scope, model and k. Pure functions of a study."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from rapo_verl.method import passk
from rapo_verl.report.study import EvalResult, Study
from rapo_verl.run.signs import History, series

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
# Columns of a curve.
CURVES = ("pass_at_k", "low", "high", "exact", "majority_at_k", "guess_at_k")


class Coverage(NamedTuple):
    """Ids of the problems that only one of two models solved, and the exact two-sided sign test on their numbers."""

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    p: float


@dataclass(frozen=True)
class Numbers:
    """Everything that a report says in numbers.

    Attributes:
        curves: set, scope, model, k, pass_at_k, low, high, exact, majority_at_k, guess_at_k; NaN where not known. Rows
            beyond n/2 hold enumerated values alone.
        sizes: set, scope, model, problems, solved; a scope may hold no problem.
        differences: set, scope, a, b, k, difference, low, high; of a less b.
        problems: set, problem, group, hard, model, correct, n, low, high (Clopper-Pearson).
        groups: group, problems, hard, model, pass_at_1, pass_at_top, solved, solved_hard.
    """

    study: Study
    curves: pd.DataFrame
    sizes: pd.DataFrame
    differences: pd.DataFrame
    problems: pd.DataFrame
    groups: pd.DataFrame
    coverage: list[Coverage]

    @cached_property
    def by_key(self) -> dict[tuple[Any, ...], Any]:
        """Rows of curves and sizes by (set, scope, model, k), sizes with k = 0, and of differences by (.., a, b, k)."""
        found = {(r.set, r.scope, r.model, r.k): r for r in self.curves.itertuples()}
        found |= {(r.set, r.scope, r.model, 0): r for r in self.sizes.itertuples()}
        return found | {(r.set, r.scope, r.a, r.b, r.k): r for r in self.differences.itertuples()}

    @cached_property
    def training(self) -> dict[str, dict[str, Any]]:
        """Of each run the number of steps, what was not finite, and each metric over the last tenth of its records."""
        return {name: _training(history) for name, history in self.study.histories.items()}

    @cached_property
    def histogram(self) -> dict[str, list[int]]:
        """How many problems each model solved never, in (0, 10] %, ..., (90, 100) %, and always."""
        # In whole samples, for 7 of 70 must not be 0.1 and a rounding.
        place = -(-10 * self.problems.correct // self.problems.n) + (self.problems.correct == self.problems.n)
        table = pd.crosstab(self.problems.model, place).reindex(columns=range(12), fill_value=0)
        return {name: table.loc[name].tolist() for name in self.study.names}

    @cached_property
    def hard_bound(self) -> float:
        """The pass@k, k half of the choosing draw's n, that a problem unsolved in all of its samples may still have."""
        n = self.study.hard_choice.n if self.study.hard_choice else 1
        return 1 - (1 - self.study.level) ** (max(1, n // 2) / n)

    def as_json(self) -> dict[str, Any]:
        """Return the content of summary.json; what is not known is null."""
        study, chosen, weights = self.study, self.study.hard_choice, self.study.hard_weights
        hard = chosen and {
            "n": chosen.n,
            "draw": chosen.draw,
            "ids": [i for i, hard in zip(chosen.ids, study.hard) if hard],
            "same_draw": study.same_draw,
            "expected_size": None if weights is None else float(weights.sum()),
            "upper_bound": self.hard_bound,
        }
        tables = {name: getattr(self, name) for name in ("curves", "sizes", "differences", "problems", "groups")}
        return {
            "title": study.title,
            "n": study.n,
            "ks": study.ks,
            "headline_ks": study.headline_ks,
            "bootstrap": study.intervals,
            "base": study.base.name,
            "hard": hard,
            "sampled_differently": study.sampled_differently,
            "models": [
                {"name": r.name, "role": r.role, "draw": r.draw, **r.protocol, **r.meta, "responses": rates(r)}
                for r in study.results
            ],
            **{
                name: table.astype(object).where(table.notna(), None).to_dict("records")
                for name, table in tables.items()
            },
            "coverage": [one._asdict() for one in self.coverage],
            "histogram": self.histogram,
            "training": self.training,
            "settings": dict(study.settings),
        }


def compute(study: Study) -> Numbers:
    """Return the numbers of a study."""
    curves, sizes, differences = [], [], []
    for (label, scope), mask in study.parts.items():
        place = {"set": label, "scope": scope}
        for result in study.results:
            counts = np.asarray(result.correct)[mask]
            sizes.append(place | {"model": result.name, "problems": len(counts), "solved": int((counts > 0).sum())})
            curves.append(_curve(study, result, mask, _weights(study, label, scope)).assign(**place, model=result.name))
        for a, b in study.pairs if mask.any() else ():
            first, second = (np.asarray(r.correct)[mask] for r in (a, b))
            band = passk.paired_difference(first, second, study.n, study.ks, **study.intervals)
            values = {"k": study.ks, "difference": band.mean, "low": band.low, "high": band.high}
            differences.append(pd.DataFrame(place | {"a": a.name, "b": b.name} | values))
    empty = pd.DataFrame(columns=["set", "scope", "a", "b", "k", "difference", "low", "high"])
    problems = _problems(study)
    return Numbers(
        study,
        pd.concat(curves, ignore_index=True)[["set", "scope", "model", "k", *CURVES]],
        pd.DataFrame(sizes),
        pd.concat(differences, ignore_index=True) if differences else empty,
        problems,
        _groups(problems, study.ks[-1]),
        [_coverage(a, b) for a, b in study.pairs],
    )


def _weights(study: Study, label: str, scope: str) -> np.ndarray:
    """Return what each problem counts in an enumerated value: on Hard, its chance of being there; 0 if not known."""
    known = study.hard_weights if scope == "hard" else 1.0
    return study.sets[label] * (0.0 if known is None else known)


def _curve(study: Study, result: EvalResult, mask: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    """Return one curve, a row a k; what is not known at a k is NaN."""
    columns = {name: pd.Series(dtype=float) for name in CURVES}

    def sampled(values: Iterable[float]) -> pd.Series:
        return pd.Series(values, study.ks)

    if mask.any():
        band = passk.mean_band(np.asarray(result.correct)[mask], study.n, study.ks, **study.intervals)
        columns |= {"pass_at_k": sampled(band.mean), "low": sampled(band.low), "high": sampled(band.high)}
        if result.responses is not None:
            guess = result.responses.problems["guess"].to_numpy()[mask]
            columns["majority_at_k"] = sampled(result.responses.majority[mask].mean(axis=0))
            columns["guess_at_k"] = sampled([passk.exact_pass_at_k(guess, k).mean() for k in study.ks])
    if result.exact is not None and weights.any():
        share, ks = weights / weights.sum(), study.exact_ks
        columns["exact"] = pd.Series([share @ passk.exact_pass_at_k(result.exact, k) for k in ks], ks)
    return pd.DataFrame(columns).rename_axis("k").reset_index()


def _coverage(a: EvalResult, b: EvalResult) -> Coverage:
    first, second = (
        [i for i, x, y in zip(a.ids, p.correct, q.correct) if x > 0 and y == 0] for p, q in ((a, b), (b, a))
    )
    return Coverage(a.name, b.name, first, second, sign_test(len(first), len(second)))


def sign_test(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of so many problems that only a, and only b, solved: 6 to 0 gives 0.031."""
    return binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def _problems(study: Study) -> pd.DataFrame:
    """Return each problem with every model's right samples and interval, those of one problem adjacent."""
    base, frames = study.base, []
    place = {"set": base.sources or "all", "problem": base.ids, "group": base.groups, "hard": study.hard}
    for r in study.results:
        low, high = passk.clopper_pearson(r.correct, r.n, level=study.level)
        values = {"model": r.name, "correct": r.correct, "n": r.n, "low": low, "high": high}
        frames.append(pd.DataFrame(place | values))
    return pd.concat(frames).sort_index(kind="stable").reset_index(drop=True)


def _groups(problems: pd.DataFrame, top: int) -> pd.DataFrame:
    rows = []
    for (group, model), part in problems.groupby(["group", "model"], sort=False):
        first, last = passk.pass_at_k_curve(part.correct, part.n, (1, top))
        row = {"group": group, "problems": len(part), "hard": int(part.hard.sum()), "model": model}
        row |= {"pass_at_1": float(first), "pass_at_top": float(last), "solved": int((part.correct > 0).sum())}
        rows.append(row | {"solved_hard": int((part.correct[part.hard] > 0).sum())})
    return pd.DataFrame(rows)


def rates(result: EvalResult) -> dict[str, Any] | None:
    """Return shares over all samples, and lengths in tokens (None: there is no such sample); None if not known."""
    if result.responses is None:
        return None
    counts = result.responses.problems.drop(columns="guess").sum()
    return {
        **(counts / (result.n * len(result.ids))).to_dict(),
        "tokens": {name: None if math.isnan(value) else value for name, value in result.responses.tokens.items()},
    }


def _training(history: History) -> dict[str, Any]:
    final: dict[str, float | None] = {}
    for key, _, _ in TRAINING_METRICS:
        values = series(history, key)[1]
        final[key] = float(values[-max(1, len(values) // 10) :].mean()) if len(values) else None
    known = [h[key] for h in history for key in final if h.get(key) is not None]
    return {
        "steps": len(history),
        "last_step": max((h["step"] for h in history), default=None),
        "not_finite": sum(not math.isfinite(value) for value in known),
        "final": final,
    }
