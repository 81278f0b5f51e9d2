"""The figures of a report, drawn without pyplot, so that no global state and no display is involved."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rapo_verl.report.statistics import TRAINING_METRICS, Numbers
from rapo_verl.run.files import write_atomic
from rapo_verl.run.signs import series

# One colour a role, so that a model looks the same in every figure and table; the rest is Okabe and Ito's palette,
# which people with any common colour blindness can tell apart.
ROLE_COLOURS = {"base": "#6b7280", "grpo": "#0072b2", "rapo": "#d55e00"}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#b08900", "#56b4e9", "#5b3a8e", "#8c2d04", "#222222")
ROLE_MARKERS = {"base": "s", "grpo": "o", "rapo": "D"}
FAINT = "#6e7781"
# Longer curves than this get a running mean on top of a faint raw line.
SMOOTH_FROM = 40
# Decorates what draws and what saves.
styled = matplotlib.style.context(Path(__file__).parent / "figure.mplstyle")


def model_colours(roles: Mapping[str, str]) -> dict[str, str]:
    """Return one colour for each name: its role's for the first of a role, one of the palette for all others."""
    colours: dict[str, str] = {}
    spare = iter(OTHER_COLOURS * (1 + len(roles) // len(OTHER_COLOURS)))
    for name, role in roles.items():
        fixed = ROLE_COLOURS.get(role)
        colours[name] = fixed if fixed and fixed not in colours.values() else next(spare)
    return colours


@styled
def passk_figure(numbers: Numbers, colours: Mapping[str, str], parts: Sequence[tuple[str, str]]) -> Figure:
    """Return pass@k over k on a log2 axis, one panel for each (set, scope), Full and Hard of a set beside each other.

    Sampled lines with bands; enumerated lines dashed beyond n/2; dotted, what guessing would reach. This is the layout
    of figure 3 of arXiv 2510.03865.
    """
    columns = min(len(parts), len({scope for _, scope in numbers.study.parts}))
    figure = Figure(figsize=(5.2 * columns, 4.1 * len(parts) / columns + 0.6), layout="constrained")
    axes = figure.subplots(len(parts) // columns, columns, squeeze=False)
    for axis, (label, scope) in zip(axes.ravel(), parts):
        draw = "the SAME draw" if numbers.study.same_draw else "another draw"
        failed = f"\nthat the base failed in {draw}" if scope == "hard" else ""
        axis.set_title(numbers.study.title_of(label, scope) + failed)
        _passk_panel(axis, numbers, label, scope, colours)
    for axis in axes[:, 0]:
        axis.set_ylabel("pass@k")
    _legend(figure, {r.name: r.role for r in numbers.study.results}, colours, columns=2 if columns == 1 else 5)
    return figure


def _passk_panel(axis: Axes, numbers: Numbers, label: str, scope: str, colours: Mapping[str, str]) -> None:
    """Draw one panel; one without anything to draw says so instead."""
    study, table = numbers.study, numbers.curves
    place = table[(table.set == label) & (table.scope == scope)]
    half, any_exact = study.ks[-1], bool(place.exact.notna().any())
    for result in study.results:
        rows, colour = place[place.model == result.name], colours[result.name]
        sampled, beyond = rows[rows.pass_at_k.notna()], rows[rows.exact.notna() & (rows.k >= half)]
        axis.fill_between(sampled.k, sampled.low, sampled.high, color=colour, alpha=0.13, linewidth=0)
        marker = ROLE_MARKERS.get(result.role, "^")
        axis.plot(sampled.k, sampled.pass_at_k, color=colour, linewidth=1.9, marker=marker, markersize=4.2, zorder=3)
        axis.plot(sampled.k, sampled.guess_at_k, color=colour, linewidth=1.1, linestyle=":", zorder=2)
        axis.plot(beyond.k, beyond.exact, color=colour, linewidth=1.5, linestyle=(0, (4, 2.2)), zorder=2)
    top = place[["high", "exact"]].max(axis=None)
    if np.isnan(top):
        axis.text(0.5, 0.5, "no problem in this set", transform=axis.transAxes, ha="center", color=FAINT)
    last = study.exact_ks[-1] if any_exact else half
    axis.set_xscale("log", base=2)
    axis.set_xlim(0.88, last * 1.14)
    axis.set_ylim(0, min(1.02, max(0.1, 1.08 * np.nan_to_num(top))))
    ticks = [2**i for i in range(0, int(last).bit_length(), 1 if last < 256 else 2)]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("k, number of attempts (log scale)")
    if any_exact:
        axis.axvspan(half, last * 1.14, color="#f6f7f9", zorder=0)
        place_of_note = (half * 1.12, 0.015)
        axis.annotate("enumerated", place_of_note, xycoords=("data", "axes fraction"), color=FAINT, fontsize=8)


@styled
def training_figures(numbers: Numbers, roles: Mapping[str, str], colours: Mapping[str, str]) -> list[Figure]:
    """Return all metrics that were recorded, over the training step, as one figure and then each alone; [] if none."""
    histories = numbers.study.histories
    shown = [m for m in TRAINING_METRICS if any(len(series(h, m[0])[0]) for h in histories.values())]
    figures = []
    for metrics in [shown, *([m] for m in shown)] if shown else []:
        columns = min(3, len(metrics))
        rows = -(-len(metrics) // columns)
        figure = Figure(figsize=(3.5 * columns, 2.6 * rows + 0.4))
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.06)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (key, words, unit) in zip(axes, metrics):
            axis.set_title(f"{words} ({unit})" if unit else words, fontsize=9.5, pad=6)
            for name, history in histories.items():
                _curve(axis, *series(history, key), colours[name])
            axis.margins(x=0.02)
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(metrics) - columns) : len(metrics)]:
            axis.set_xlabel("training step")
        _legend(figure, roles, colours, columns=2 if columns == 1 else 5, markers=False)
        figures.append(figure)
    return figures


def _curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw one training curve: raw, or faint with a centred running mean on top when it is long."""
    if len(steps) < SMOOTH_FROM:
        axis.plot(steps, values, color=colour, linewidth=1.6)
        return
    kernel = np.ones(running_mean_width(len(steps)))
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.28)
    axis.plot(steps, smooth, color=colour, linewidth=1.7)


def running_mean_width(records: int) -> int:
    """Return the width, in records and odd, of the running mean over a curve: about a twentieth of it."""
    return 2 * (records // 40) + 1


def _legend(
    figure: Figure, roles: Mapping[str, str], colours: Mapping[str, str], *, columns: int, markers: bool = True
) -> None:
    """Put one legend above all panels."""
    handles = []
    for name, role in roles.items():
        marker = ROLE_MARKERS.get(role, "^") if markers else ""
        handles.append(Line2D([], [], color=colours[name], linewidth=2, marker=marker, markersize=5))
    figure.legend(handles, list(roles), loc="outside upper left", ncols=min(columns, len(roles)), fontsize=9.5)


@styled
def image(figure: Figure, kind: str) -> bytes:
    """Return a figure as "png" or "svg", the same bytes for the same figure (no date, no software version)."""
    buffer = io.BytesIO()
    unset = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    figure.savefig(buffer, format=kind, dpi=170, metadata=unset[kind])
    return buffer.getvalue()


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg and return them."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        write_atomic(file, image(figure, file.suffix[1:]))
    return files
