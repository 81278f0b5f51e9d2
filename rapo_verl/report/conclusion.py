"""What a report says first: one plain sentence."""

import numpy as np

from rapo_verl.method import passk
from rapo_verl.report.statistics import Numbers
from rapo_verl.report.study import Study


def conclusion(numbers: Numbers) -> str:
    """Return one plain sentence: which model is ahead, from which k on, where curves cross, and what is significant."""
    study = numbers.study
    ks, top = study.ks, study.ks[-1]
    # Equal counts in another order differ by a rounding, which is no lead.
    curves = {
        r.name: [round(numbers.by_key["all", "full", r.name, k].pass_at_k, 12) for k in ks] for r in study.results
    }
    problems = len(study.base.ids)
    if not any(max(curve) for curve in curves.values()):
        bound = 1 - ((1 - study.level) / 2) ** (1 / problems)
        return (
            f"No model solved any of the {problems} problems in {study.n} samples each: pass@k is 0 at every k, and "
            f"so many problems leave room for a mean of up to {bound:.3f}."
        )
    if len(curves) == 1:
        (name, curve), row = *curves.items(), numbers.by_key["all", "full", study.base.name, 0]
        return f"{name} solved {row.solved} of {problems} problems at least once; pass@1 is {curve[0]:.3f}" + (
            f" and pass@{top} is {curve[-1]:.3f}." if top > 1 else "."
        )
    # Of models that are equal at one end, the one that is ahead at the other leads.
    first = max(curves, key=lambda name: (curves[name][0], curves[name][-1]))
    last = max(curves, key=lambda name: (curves[name][-1], curves[name][0]))
    if first == last:
        rival = max((name for name in curves if name != last), key=lambda name: curves[name][-1])
        return f"{_ahead(study, last, rival)}."
    crossing = max(i for i, _ in enumerate(ks) if curves[first][i] >= curves[last][i])
    return (
        f"At {_one(study, first, last, 0)}, at {_one(study, last, first, -1)}; their curves cross between "
        f"k = {ks[crossing]} and k = {ks[crossing + 1]}."
    )


def _difference(study: Study, a: str, b: str) -> passk.Band:
    """Return a's pass@k less b's, from the very draws of the table of differences, which has a pair one way round."""
    counts = {r.name: r.correct for r in study.results}
    turned = (b, a) in [(x.name, y.name) for x, y in study.pairs]
    x, y = (b, a) if turned else (a, b)
    band = passk.paired_difference(counts[x], counts[y], study.n, study.ks, **study.intervals)
    mean, low, high = (np.round(side, 12) for side in (band.mean, band.low, band.high))
    return passk.Band(band.ks, -mean, -high, -low) if turned else passk.Band(band.ks, mean, low, high)


def _one(study: Study, a: str, b: str, i: int) -> str:
    band = _difference(study, a, b)
    significant = "significant" if band.low[i] > 0 else "not significant"
    return f"k = {study.ks[i]} {a} is ahead of {b} by {band.mean[i]:.3f} ({significant})"


def _ahead(study: Study, a: str, b: str) -> str:
    band = _difference(study, a, b)
    if not band.mean.any():
        return f"{a} and {b} have the same pass@k at every k"
    not_there = [k for k, x in zip(study.ks, band.mean) if x <= 0]
    where = f"at every k from 1 to {study.ks[-1]}" + (f" but {', '.join(map(str, not_there))}" if not_there else "")
    sure = [k for k, low in zip(study.ks, band.low) if low > 0]
    if not sure:
        say = "nowhere significantly"
    elif len(sure) == len(study.ks):
        say = "everywhere significantly"
    elif sure == study.ks[-len(sure) :]:
        say = f"significantly from k = {sure[0]} on"
    elif sure == study.ks[: len(sure)]:
        say = f"significantly up to k = {sure[-1]}"
    else:
        say = f"significantly at k = {', '.join(map(str, sure))}"
    return f"{a} is ahead of {b} {where}, {say}"
