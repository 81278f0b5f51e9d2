"""What sampling hands to reporting: success counts of one model on one set of problems, and what may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapo_verl import Refused

# Key in `EvalResult.meta` that tells one draw from another. Two results with one draw seed may be one draw.
DRAW_SEED = "draw_seed"
# Two enumerations of one model agree to float32 rounding.
EXACT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class EvalResult:
    """How often one model solved each problem, checked when it is made.

    Attributes:
        name: The model, as reports show it.
        n: Samples a problem.
        ids: The P problem ids, all different.
        groups: The kind of each problem (P,), for example a family.
        correct: Right samples of each problem (P,), each in 0..n.
        sources: The set that each problem comes from (P,); empty where there is only one.
        exact: Enumerated success probability of each problem (P,), each in [0, 1], where it can be had.
        meta: Where the numbers come from. `DRAW_SEED` says which draw; "role" may be "base", "grpo" or "rapo".
    """

    name: str
    n: int
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    correct: tuple[int, ...]
    exact: tuple[float, ...] | None = None
    sources: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError with every fault at once."""
        faults = _faults(self)
        if faults:
            raise Refused(f"EvalResult {self.name!r}: " + "; ".join(faults))


def check_comparable(
    results: Sequence[EvalResult], hard_choice: EvalResult | None, *, force_same_draw: bool = False
) -> None:
    """Raise ValueError, with every fault at once, unless these results may stand in one table.

    Allowed: different names; one n; the same ids and groups in the same order, also in hard_choice; a draw seed
    everywhere; one result of hard_choice's model, with the same exact probabilities where both have them; and no result
    with hard_choice's draw seed or, for that model, its very counts, unless force_same_draw.
    """
    if not results:
        raise Refused("results must hold at least one EvalResult; got none")
    faults, first = [], results[0]
    names = [r.name for r in results]
    if len(set(names)) < len(names):
        faults.append(f"names must differ; got {names}")
    for r in results:
        if r.n != first.n:
            faults.append(f"n must be the same; got {first.n} for {first.name!r} and {r.n} for {r.name!r}")
    for r in (*results[1:], *([hard_choice] if hard_choice else [])):
        if (r.ids, r.groups) != (first.ids, first.groups):
            faults.append(f"ids and groups must be the same, in the same order; {r.name!r} differs from {first.name!r}")
    for r in (*results, *([hard_choice] if hard_choice else [])):
        if r.meta.get(DRAW_SEED) is None:
            faults.append(f"meta[{DRAW_SEED!r}] of {r.name!r} is missing: without it nobody can tell two draws apart")
    if hard_choice:
        faults += _hard_faults(results, hard_choice, force_same_draw)
    if faults:
        raise Refused("; ".join(faults))


def _hard_faults(results: Sequence[EvalResult], hard_choice: EvalResult, force_same_draw: bool) -> list[str]:
    faults = []
    names = [r.name for r in results]
    if names.count(hard_choice.name) != 1:
        faults.append(
            f"hard_choice is a draw of {hard_choice.name!r}: that name must be among the results; got {names}"
        )
    chosen = hard_choice.meta.get(DRAW_SEED)
    for r in results:
        if shares_draw(r, hard_choice) and not force_same_draw:
            faults.append(
                f"Hard must be chosen on a draw that scores no model; {r.name!r} (draw seed {r.meta.get(DRAW_SEED)!r}) "
                f"and hard_choice (draw seed {chosen!r}) share a draw: sample the base once more"
            )
        if r.name == hard_choice.name and r.exact and hard_choice.exact and r.ids == hard_choice.ids:
            gap = max(abs(p - q) for p, q in zip(r.exact, hard_choice.exact, strict=True))
            if gap > EXACT_TOLERANCE:
                faults.append(f"exact of {r.name!r} and of hard_choice differ by up to {gap:.3g}: not one model")
    return faults


def shares_draw(scored: EvalResult, hard_choice: EvalResult) -> bool:
    """Return whether a result may be the draw that chose Hard.

    It has the same draw seed, or is of the same model and agrees on every count although eight or more had room to
    differ.
    """
    chosen = hard_choice.meta.get(DRAW_SEED)
    if chosen is not None and scored.meta.get(DRAW_SEED) == chosen:
        return True
    free = sum(0 < c < scored.n for c in scored.correct)
    same = scored.n == hard_choice.n and scored.correct == hard_choice.correct and free >= 8
    return scored.name == hard_choice.name and same


def _faults(result: EvalResult) -> list[str]:
    """Return what is wrong with a result: what, got, allowed."""
    faults = []
    if not isinstance(result.name, str) or not result.name.strip():
        faults.append(f"name must be a non-empty string; got {result.name!r}")
    if not _is_int(result.n) or result.n < 1:
        return [*faults, f"n must be an integer of at least 1; got {result.n!r}"]
    for key in ("ids", "groups", "correct", "sources"):
        if not isinstance(getattr(result, key), tuple):
            return [*faults, f"{key} must be a tuple; got {type(getattr(result, key)).__name__}"]
    if not result.ids:
        faults.append("ids must hold at least one problem; got none")
    for key in ("ids", "groups", "sources"):
        odd = [(i, v) for i, v in enumerate(getattr(result, key)) if not isinstance(v, str)]
        if odd:
            return [*faults, f"{key}[{odd[0][0]}] must be a string; got {odd[0][1]!r}"]
    if len(set(result.ids)) < len(result.ids):
        faults.append(f"ids must differ; got {len(result.ids)} with {len(set(result.ids))} different")
    bad = [(i, c) for i, c in enumerate(result.correct) if not _is_int(c) or not 0 <= c <= result.n]
    faults += [f"correct[{i}] must be an integer in 0..{result.n}; got {c!r}" for i, c in bad[:1]]
    if result.exact is not None and not isinstance(result.exact, tuple):
        return [*faults, f"exact must be a tuple or None; got {type(result.exact).__name__}"]
    wrong = [(i, p) for i, p in enumerate(result.exact or ()) if not isinstance(p, float | int) or not 0 <= p <= 1]
    faults += [f"exact[{i}] must lie in [0, 1]; got {p!r}" for i, p in wrong[:1]]
    for key in ("groups", "correct", "exact", "sources"):
        values = getattr(result, key)
        if values is not None and (values or key != "sources") and len(values) != len(result.ids):
            faults.append(f"{key} must have one entry for each of the {len(result.ids)} ids; got {len(values)}")
    if not isinstance(result.meta, Mapping):
        faults.append(f"meta must be a mapping; got {type(result.meta).__name__}")
    return faults


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
