"""`rapo figures`: the paper's Figures 1 and 2 from the closed forms, and the estimators' bias and variance."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax

from rapo_verl.report.figures import styled, write_figure
from rapo_verl.theory.estimator_table import ROWS, forward_kl, make_pair, quality
from rapo_verl.theory.optimum import FloatArray, forward_kl_optimum, rapo_optimum, reverse_kl_optimum

# One-dimensional landscape: the reference's two modes; two rewarded intervals, one on its support and one off it.
GRID = np.linspace(0.0, 10.0, 401)
MODES, WIDTH, SUPPORT = (2.0, 4.0), 0.55, 6.0
INSIDE, OUTSIDE = (4.6, 5.4), (7.6, 8.4)
ALPHA, BETA, PHI_MIN = 0.3, 0.08, 0.3
REFERENCE, REWARD, POLICY = "#6b7280", "#009e73", "#d55e00"
# Items of Figure 2, and how many of them the reference gives no mass.
ITEMS, EMPTY = 24, 8
DISTANCES = np.geomspace(0.03, 4.0, 15)
# The first nine rows: ours and veRL's.
ESTIMATOR_COLOURS = dict(
    zip(ROWS, ("#d55e00", "#e69f00", "#cc79a7", "#0072b2", "#222222", "#009e73", "#5b3a8e", "#56b4e9", "#6b7280"))
)


def landscape() -> tuple[FloatArray, FloatArray]:
    """Return reward and reference on `GRID`: the reference is exactly zero from `SUPPORT` on."""
    density = sum(np.exp(-0.5 * ((GRID - mode) / WIDTH) ** 2) for mode in MODES) * (GRID < SUPPORT)
    reward = (_within(INSIDE) | _within(OUTSIDE)).astype(np.float64)
    return reward, density / density.sum()


def _within(interval: tuple[float, float]) -> Any:
    return (interval[0] <= GRID) & (interval[1] >= GRID)


def panels() -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return for each panel of Figure 1 the reference its KL is taken to, and the optimal policy, on `GRID`."""
    reward, reference = landscape()
    # phi(r) pointwise, normalised over the whole set: here the paper's normaliser can be computed.
    flattened = reference ** (PHI_MIN + (1 - PHI_MIN) * reward)
    flattened /= flattened.sum()
    return {
        "reverse KL": (reference, reverse_kl_optimum(reward, reference, alpha=ALPHA).policy),
        "forward KL": (reference, forward_kl_optimum(reward, reference, alpha=ALPHA).policy),
        "forward KL, reference reweighted": (flattened, forward_kl_optimum(reward, flattened, alpha=ALPHA).policy),
        "RAPO: reweighted, with entropy": (flattened, rapo_optimum(reward, flattened, alpha=ALPHA, beta=BETA).policy),
    }


@styled
def landscape_figure() -> Figure:
    """Return Figure 1: what each objective's optimum makes of a rewarded region outside the reference's support."""
    figure = Figure(figsize=(9.4, 5.4), layout="constrained")
    step = GRID[1] - GRID[0]
    for axis, (title, (reference, policy)) in zip(figure.subplots(2, 2, sharex=True).ravel(), panels().items()):
        for interval in (INSIDE, OUTSIDE):
            axis.axvspan(*interval, color=REWARD, alpha=0.16, lw=0, label="reward 1" if interval is INSIDE else None)
        axis.fill_between(GRID, reference / step, color=REFERENCE, alpha=0.28, lw=0, label="reference of the KL")
        axis.plot(GRID, policy / step, color=POLICY, lw=1.6, label="optimal policy")
        axis.set_title(title)
        mass = ", ".join(f"{policy[_within(i)].sum():.3f}" for i in (INSIDE, OUTSIDE))
        axis.text(0.99, 0.94, f"mass on the rewarded regions: {mass}", transform=axis.transAxes, ha="right", fontsize=8)
        axis.set_ylim(0, 1.22 * max(policy.max(), reference.max()) / step)
        axis.set_yticks([])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def items() -> tuple[FloatArray, FloatArray]:
    """Return reward and reference of Figure 2: the last `EMPTY` items have no mass under the reference."""
    rng = np.random.default_rng(3)
    reference = np.sort(rng.dirichlet(np.full(ITEMS - EMPTY, 0.8)))[::-1]
    reward = (rng.random(ITEMS) < 0.35).astype(np.float64)
    return reward, np.concatenate([reference, np.zeros(EMPTY)])


def descend(reward: FloatArray, reference: FloatArray, *, steps: int = 3000, rate: float = 0.5) -> FloatArray:
    """Return where exponentiated gradient ascent on RAPO's objective ends, from a uniform start.

    log pi moves along the gradient in pi. (Along the gradient in the logits, which carries a factor pi, items of mass
    1e-7 would take 1e7 times as long.)
    """
    policy = np.full(len(reward), 1 / len(reward))
    for _ in range(steps):
        slope = reward + ALPHA * reference / policy - BETA * (np.log(policy) + 1)
        policy = softmax(np.log(policy) + rate * slope)
    return policy


@styled
def descent_figure() -> tuple[Figure, float]:
    """Return Figure 2, gradient descent against the closed form, and their distance in total variation."""
    reward, reference = items()
    optimum, found = rapo_optimum(reward, reference, alpha=ALPHA, beta=BETA).policy, descend(reward, reference)
    distance = float(0.5 * np.abs(optimum - found).sum())
    figure = Figure(figsize=(9.4, 3.8), layout="constrained")
    axis = figure.subplots()
    places = np.arange(ITEMS)
    axis.bar(places, reference, color=REFERENCE, alpha=0.4, width=0.8, label="reference")
    axis.plot(places, optimum, "o", ms=8, mfc="none", mec=POLICY, mew=1.6, label="closed form (Proposition 3.3)")
    axis.plot(places, found, "k+", ms=7, label="gradient ascent (exponentiated)")
    axis.axvspan(ITEMS - EMPTY - 0.5, ITEMS - 0.5, color="#56b4e9", alpha=0.14, lw=0, label="reference is zero")
    for place in places[reward > 0]:
        axis.annotate("r = 1", (place, optimum[place]), (0, 9), textcoords="offset points", ha="center", fontsize=7.5)
    axis.set(yscale="log", xlabel="item", ylabel="probability")
    axis.yaxis.set_major_formatter("{x:g}")  # the style has no mathematics, which the default would be
    axis.set_ylim(top=1)
    axis.set_title(f"RAPO's optimum, alpha = {ALPHA}, beta = {BETA}: total variation {distance:.1e}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, distance


@styled
def estimator_figure() -> Figure:
    """Return bias (error to the forward KL's gradient) and variance of each estimator over KL(ref ‖ pi)."""
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    pairs = [make_pair(float(distance)) for distance in DISTANCES]
    kl = [forward_kl(pair) for pair in pairs]
    for number, (name, colour) in enumerate(ESTIMATOR_COLOURS.items()):
        found = [quality(name, pair) for pair in pairs]
        for axis, values in zip(axes, ([x.forward for x in found], [x.variance for x in found])):
            # Rounding of an exact zero is not an error.
            shown = np.where(np.array(values) > 1e-9, values, np.nan)
            axis.plot(kl, shown, "o-", ms=2.5, lw=3.2 - 0.28 * number, color=colour, label=name)
    titles = "error to the forward KL's gradient (0: not drawn)", "variance of one token's gradient"
    for axis, title in zip(axes, titles):
        axis.set(xscale="log", yscale="log", xlabel="KL(ref ‖ pi), nats", title=title)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ESTIMATOR_COLOURS))
    return figure


def write_figures(images: Path) -> list[Path]:
    """Draw all figures as PNG and SVG and return the files."""
    images.mkdir(parents=True, exist_ok=True)
    figures = {"figure1": landscape_figure(), "figure2": descent_figure()[0], "estimators": estimator_figure()}
    return [file for name, figure in figures.items() for file in write_figure(figure, images / name)]
