"""The numbers of a report: pass@k of several models, their differences, coverage, groups and training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rapo_verl.method import passk
from rapo_verl.report.responses import Responses
from rapo_verl.report.results import DRAW_SEED, EvalResult, check_comparable, shares_draw
from rapo_verl.report.solved import coverage_difference, hard_mask, sign_test
from rapo_verl.report.training_curves import summarise_training

HEADLINE_KS = (1, 16, 64)
ROLES = ("rapo", "grpo", "base")
# The enumerated curve goes on past n/2, where sampling stops being informative, for three more doublings.
EXACT_DOUBLINGS = 3


def role_of(name: str, meta: Mapping[str, Any] | None = None) -> str:
    """Return "rapo", "grpo", "base" or "other": meta's "role" if given, else the first of these words in the name."""
    stated = (meta or {}).get("role")
    if stated is not None:
        return stated if stated in ROLES else "other"
    return next((role for role in ROLES if role in name.casefold()), "other")


def summarise(
    results: Sequence[EvalResult],
    hard_choice: EvalResult | None,
    *,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, str],
    title: str,
    responses: Mapping[str, Responses] | None = None,
    force_same_draw: bool = False,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return everything a report says, as a dictionary that JSON can hold.

    Args:
        results: One `EvalResult` a model, on the same problems with the same n. All are scored, the base too.
        hard_choice: Another draw of the base (the result of the same name). It chooses Hard and scores nothing. None:
            there is no Hard, and the base is the first result of that role, or the first of all.
        histories: For each training run its metric dicts, one a step, with the key "step".
        settings: What was run: configuration, commit, versions, seeds, commands.
        title: The report's title.
        responses: What each model's responses look like, where that is known.
        force_same_draw: Let a scored draw choose Hard; the report then says so everywhere.
        level: Content of bands and intervals.
        draws: Bootstrap draws.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: The results may not be compared (`check_comparable`), or a training record lacks "step".
    """
    check_comparable(results, hard_choice, force_same_draw=force_same_draw)
    n = results[0].n
    boot = {"level": level, "draws": draws, "seed": seed}
    named = [r for r in results if hard_choice and r.name == hard_choice.name]
    base = [*named, *(r for r in results if role_of(r.name, r.meta) == "base"), results[0]][0]
    hard = hard_mask(hard_choice.correct) if hard_choice else np.zeros(len(base.ids), dtype=bool)
    weights = _hard_weights(base, hard_choice) if hard_choice else None
    known = responses or {}
    return {
        "title": title,
        "n": n,
        "problems": len(base.ids),
        "hard": _hard_set(results, hard_choice, hard, weights, level),
        "bootstrap": boot,
        "ks": list(passk.default_ks(n)),
        "headline_ks": _headline_ks(n),
        "exact_ks": _exact_ks(n),
        "base": base.name,
        "models": [_model(r, hard, weights, boot, known.get(r.name)) for r in results],
        "sets": [_set(results, base, hard, label, boot) for label in _sources(base)],
        "comparisons": [_comparison(a, b, hard, boot) for a, b in _pairs(results, base)],
        "groups": _groups(results, hard),
        "matrix": _matrix(results, hard, level),
        "histogram": {r.name: _histogram(r) for r in results},
        "training": {
            name: {"role": role_of(name), **summarise_training(name, history)} for name, history in histories.items()
        },
        "settings": dict(settings),
    }


def _headline_ks(n: int) -> list[int]:
    top = max(1, n // 2)
    return sorted({k for k in HEADLINE_KS if k <= top} | {top})


def _exact_ks(n: int) -> list[int]:
    ks = passk.default_ks(n)
    return [*ks, *(ks[-1] * 2**i for i in range(1, EXACT_DOUBLINGS + 1))]


def _hard_weights(base: EvalResult, hard_choice: EvalResult) -> np.ndarray | None:
    """Return (1 - p_base)^n, shape (P,): the probability that the choosing draw puts each problem into Hard."""
    p = hard_choice.exact if hard_choice.exact is not None else base.exact
    return None if p is None else (1 - np.asarray(p, dtype=np.float64)) ** hard_choice.n


def _hard_set(
    results: Sequence[EvalResult],
    hard_choice: EvalResult | None,
    hard: np.ndarray,
    weights: np.ndarray | None,
    level: float,
) -> dict[str, Any]:
    """Return how Hard was chosen, its ids, its expected size, and what "none of n" cannot rule out."""
    if hard_choice is None:
        return {"n": None, "draw_seed": None, "ids": [], "same_draw": False, "expected_size": None, "upper_bound": None}
    n = hard_choice.n
    return {
        "n": n,
        "draw_seed": hard_choice.meta[DRAW_SEED],
        "ids": [i for i, h in zip(hard_choice.ids, hard, strict=True) if h],
        "same_draw": any(shares_draw(r, hard_choice) for r in results),
        "expected_size": None if weights is None else float(weights.sum()),
        # The one-sided upper bound of p after 0 of n, 1 - (1 - level)^(1/n), taken to k = n / 2.
        "upper_bound": 1 - (1 - level) ** (max(1, n // 2) / n),
    }


def _model(
    result: EvalResult,
    hard: np.ndarray,
    weights: np.ndarray | None,
    boot: Mapping[str, Any],
    responses: Responses | None,
) -> dict[str, Any]:
    everything = np.ones(len(hard), dtype=bool)
    scopes = {
        "full": _scope(result, everything, everything.astype(np.float64), boot),
        "hard": _scope(result, hard, weights, boot),
    }
    for name, mask in (("full", everything), ("hard", hard)):
        for key, values in _beside(responses, mask, passk.default_ks(result.n)).items():
            scopes[name][key] = values
    return {
        "name": result.name,
        "role": role_of(result.name, result.meta),
        "draw_seed": result.meta[DRAW_SEED],
        "responses": None if responses is None else _response_rates(responses, result.n),
        **scopes,
    }


def _beside(responses: Responses | None, mask: np.ndarray, ks: Sequence[int]) -> dict[str, list[float] | None]:
    """Return majority@k and the guess baseline's pass@k on the masked problems, each over ks; None if not known."""
    if responses is None or not mask.any():
        return {"majority": None, "guess": None}
    return {
        "majority": responses.majority[mask].mean(axis=0).tolist(),
        "guess": [float(passk.exact_pass_at_k(responses.guess[mask], k).mean()) for k in ks],
    }


def _response_rates(responses: Responses, n: int) -> dict[str, Any]:
    """Return shares over all samples, and lengths in tokens (None: there is no such sample)."""
    samples = n * len(responses.truncated)
    lengths = {name: getattr(responses, f"length_{name}") for name in ("mean", "median", "95", "right", "wrong")}
    return {
        **{name: int(counts.sum()) / samples for name, counts in responses.verdicts.items()},
        "truncated": int(responses.truncated.sum()) / samples,
        "repeated": int(responses.repeated.sum()),
        "tokens": {name: None if math.isnan(value) else value for name, value in lengths.items()},
    }


def _sources(base: EvalResult) -> list[str]:
    """Return the sets in order of appearance if there are several, else none."""
    found = list(dict.fromkeys(base.sources))
    return found if len(found) > 1 else []


def _set(
    results: Sequence[EvalResult], base: EvalResult, hard: np.ndarray, label: str, boot: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the curves of one set by itself."""
    mask = np.array(base.sources) == label
    models = []
    for r in results:
        scopes = {"full": _scope(r, mask, None, boot), "hard": _scope(r, mask & hard, None, boot)}
        models.append({"name": r.name, "role": role_of(r.name, r.meta), **scopes})
    return {"label": label, "problems": int(mask.sum()), "hard": int((mask & hard).sum()), "models": models}


def _matrix(results: Sequence[EvalResult], hard: np.ndarray, level: float) -> list[dict[str, Any]]:
    """Return each problem with every model's right samples and Clopper-Pearson interval of its success probability."""
    bounds = [passk.clopper_pearson(r.correct, r.n, level=level) for r in results]
    return [
        {
            "id": results[0].ids[i],
            "group": results[0].groups[i],
            "hard": bool(hard[i]),
            "cells": [
                {"correct": r.correct[i], "low": float(low[i]), "high": float(high[i])}
                for r, (low, high) in zip(results, bounds, strict=True)
            ],
        }
        for i in range(len(hard))
    ]


def _histogram(result: EvalResult) -> list[int]:
    """Return how many problems were solved never, in (0, 10] %, ..., (90, 100) %, and always."""
    rate = np.asarray(result.correct) / result.n
    inner = rate[(rate > 0) & (rate < 1)]
    bins = np.ceil(inner * 10).astype(int) - 1
    return [int((rate == 0).sum()), *np.bincount(bins, minlength=10).tolist(), int((rate == 1).sum())]


def _scope(result: EvalResult, mask: np.ndarray, weights: np.ndarray | None, boot: Mapping[str, Any]) -> dict[str, Any]:
    """Return sampled means with bands (over "ks") on the masked problems, and enumerated means (over "exact_ks")."""
    counts = np.asarray(result.correct)[mask]
    scope: dict[str, Any] = {"problems": len(counts), "solved": int((counts > 0).sum())}
    scope |= dict.fromkeys(("mean", "low", "high", "exact"))
    if mask.any():
        band = passk.bootstrap_curve(counts, result.n, passk.default_ks(result.n), **boot)
        scope |= {"mean": band.mean.tolist(), "low": band.low.tolist(), "high": band.high.tolist()}
    if result.exact is not None and weights is not None and weights.sum() > 0:
        share = weights / weights.sum()
        scope["exact"] = [float(share @ passk.exact_pass_at_k(result.exact, k)) for k in _exact_ks(result.n)]
    return scope


def _pairs(results: Sequence[EvalResult], base: EvalResult) -> list[tuple[EvalResult, EvalResult]]:
    """Return (a, b) for b the base and then each GRPO model: every other model against it, once a pair."""
    references = [base, *(r for r in results if role_of(r.name, r.meta) == "grpo" and r is not base)]
    return [(a, b) for i, b in enumerate(references) for a in results if a is not b and a not in references[:i]]


def _comparison(a: EvalResult, b: EvalResult, hard: np.ndarray, boot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paired differences a - b on Full and Hard, and the problems that one of the two solved alone."""
    counts_a, counts_b = np.asarray(a.correct), np.asarray(b.correct)
    differences: dict[str, Any] = {"full": [], "hard": []}
    for scope, mask in (("full", np.ones(len(hard), dtype=bool)), ("hard", hard)):
        for k in _headline_ks(a.n) if mask.any() else ():
            got = passk.paired_bootstrap_difference(counts_a[mask], counts_b[mask], a.n, k, **boot)
            differences[scope].append({"k": k, **got._asdict()})
    coverage = coverage_difference(counts_a, counts_b, a.ids)
    return {
        "a": a.name,
        "b": b.name,
        **differences,
        "only_a": list(coverage.only_a),
        "only_b": list(coverage.only_b),
        "sign_test_p": sign_test(counts_a, counts_b).p_value,
    }


def _groups(results: Sequence[EvalResult], hard: np.ndarray) -> list[dict[str, Any]]:
    """Return for each group, in order of appearance, its size and every model's pass@1, pass@(n/2) and solved count."""
    labels = np.asarray(results[0].groups)
    top = _headline_ks(results[0].n)[-1]
    groups = []
    for label in dict.fromkeys(results[0].groups):
        mask = labels == label
        models = []
        for r in results:
            counts = np.asarray(r.correct)[mask]
            first, last = passk.pass_at_k_curve(counts, r.n, (1, top))
            solved, solved_hard = int((counts > 0).sum()), int((counts[hard[mask]] > 0).sum())
            row = {"name": r.name, "pass_at_1": float(first), "pass_at_top": float(last)}
            models.append(row | {"solved": solved, "solved_hard": solved_hard})
        groups.append({"group": label, "problems": int(mask.sum()), "hard": int((mask & hard).sum()), "models": models})
    return groups
