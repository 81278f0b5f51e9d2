"""The figures of a report, drawn without pyplot, so that no global state and no display is involved."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rapo_verl.report.training_curves import TRAINING_METRICS, series

# One colour a role, so that a model looks the same in every figure and table; the rest is Okabe and Ito's palette,
# which people with any common colour blindness can tell apart.
ROLE_COLOURS = {"base": "#6b7280", "grpo": "#0072b2", "rapo": "#d55e00"}
OTHER_COLOURS = ("#009e73", "#cc79a7", "#b08900", "#56b4e9", "#5b3a8e", "#8c2d04", "#222222")
ROLE_MARKERS = {"base": "s", "grpo": "o", "rapo": "D"}
INK, FAINT, RULE = "#1f2328", "#6e7781", "#e3e6ea"
# Longer curves than this get a running mean on top of a faint raw line.
SMOOTH_FROM = 40
# Any: matplotlib types these keys as one literal of 300 names.
STYLE: dict[Any, Any] = {
    # Names come from outside: a dollar sign in one is a dollar sign, never mathematics.
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#b6bcc4",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "rapo_verl",
}


def model_colours(roles: Mapping[str, str]) -> dict[str, str]:
    """Return one colour for each name: its role's for the first of a role, one of the palette for all others.

    Args:
        roles: Name to role, as `rapo_verl.report.summary.role_of` returns it.
    """
    colours: dict[str, str] = {}
    spare = iter(OTHER_COLOURS * (1 + len(roles) // len(OTHER_COLOURS)))
    for name, role in roles.items():
        fixed = ROLE_COLOURS.get(role)
        colours[name] = fixed if fixed and fixed not in colours.values() else next(spare)
    return colours


def passk_figure(summary: Mapping[str, Any], colours: Mapping[str, str], *, narrow: bool = False) -> Figure:
    """Return pass@k over k on a log2 axis, Full and Hard, a row for each set of problems.

    Sampled lines with bands; enumerated lines dashed beyond n/2; dotted, what guessing would reach. This is the layout
    of figure 3 of arXiv 2510.03865. Without a draw that chose Hard there is no Hard.

    Args:
        summary: What `rapo_verl.report.summary.summarise` returns.
        colours: Name to colour.
        narrow: One panel below the other, for a phone.
    """
    whole = {"label": "", "problems": summary["problems"], "hard": len(summary["hard"]["ids"])}
    rows = summary["sets"] or [whole | {"models": summary["models"]}]
    scopes = ("full", "hard") if summary["hard"]["n"] else ("full",)
    draw = "the SAME draw" if summary["hard"]["same_draw"] else "another draw"
    with _style():
        height = 4.1 * len(rows) * (len(scopes) if narrow else 1) + 0.6
        columns = 1 if narrow else len(scopes)
        figure = Figure(figsize=(5.0 if narrow else 5.2 * max(columns, 1.6), height), layout="constrained")
        axes = figure.subplots(len(rows) * len(scopes) // columns, columns, squeeze=False).ravel()
        panels = [(row, scope) for row in rows for scope in scopes]
        for axis, (row, scope) in zip(axes, panels, strict=True):
            words = f"Full · {row['problems']} problems"
            if scope == "hard":
                words = f"Hard · {row['hard']} problems the base failed in {draw}"
            axis.set_title(f"{row['label']} {words}".strip())
            _passk_panel(axis, summary, row["models"], scope, colours)
            if narrow or scope == "full":
                axis.set_ylabel("pass@k")
        _legend(figure, {m["name"]: m["role"] for m in summary["models"]}, colours, columns=2 if narrow else 5)
    return figure


def training_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    roles: Mapping[str, str],
    colours: Mapping[str, str],
    *,
    narrow: bool = False,
) -> Figure | None:
    """Return one small panel for each metric that was recorded, over the training step; None if there is none.

    Args:
        histories: Run to its metric dicts, each with the key "step".
        roles: Run to role.
        colours: Run to colour.
        narrow: One column, for a phone.
    """
    shown = [m for m in TRAINING_METRICS if any(len(series(h, m[0])[0]) for h in histories.values())]
    if not shown:
        return None
    columns = 1 if narrow else min(3, len(shown))
    rows = -(-len(shown) // columns)
    with _style():
        figure = Figure(figsize=(5.0, 2.5 * rows + 0.4) if narrow else (10.4, 2.6 * rows + 0.4))
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.06)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (key, words, unit) in zip(axes, shown, strict=False):
            axis.set_title(f"{words} ({unit})" if unit else words, fontsize=9.5, pad=6)
            for name, history in histories.items():
                _curve(axis, *series(history, key), colours[name])
            axis.margins(x=0.02)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(shown) - columns) : len(shown)]:
            axis.set_xlabel("training step")
        _legend(figure, roles, colours, columns=2 if narrow else 5, markers=False)
    return figure


def image(figure: Figure, kind: str) -> bytes:
    """Return a figure as "png" or "svg", the same bytes for the same figure (no date, no software version)."""
    buffer = io.BytesIO()
    unset = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    with _style():
        figure.savefig(buffer, format=kind, dpi=170, metadata=unset[kind])
    return buffer.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def _passk_panel(
    axis: Axes,
    summary: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    scope: str,
    colours: Mapping[str, str],
) -> None:
    """Draw one panel; a scope without problems says so instead."""
    ks, exact_ks = np.array(summary["ks"]), np.array(summary["exact_ks"])
    half, top, any_exact = ks[-1], 0.0, False
    for model in models:
        values, colour = model[scope], colours[model["name"]]
        if values["mean"] is not None:
            axis.fill_between(ks, values["low"], values["high"], color=colour, alpha=0.13, linewidth=0)
            marker = ROLE_MARKERS.get(model["role"], "^")
            axis.plot(ks, values["mean"], color=colour, linewidth=1.9, marker=marker, markersize=4.2, zorder=3)
            top = max(top, *values["high"])
        if values.get("guess") is not None:
            axis.plot(ks, values["guess"], color=colour, linewidth=1.1, linestyle=":", zorder=2)
        if values["exact"] is not None:
            beyond = exact_ks >= half
            exact = np.array(values["exact"])
            axis.plot(exact_ks[beyond], exact[beyond], color=colour, linewidth=1.5, linestyle=(0, (4, 2.2)), zorder=2)
            top, any_exact = max(top, exact.max()), True
    if top == 0.0 and all(model[scope]["mean"] is None for model in models):
        axis.text(0.5, 0.5, "no problem in this set", transform=axis.transAxes, ha="center", color=FAINT)
    last = exact_ks[-1] if any_exact else half
    axis.set_xscale("log", base=2)
    axis.set_xlim(0.88, last * 1.14)
    axis.set_ylim(0, min(1.02, max(0.1, 1.08 * top)))
    ticks = [2**i for i in range(0, int(last).bit_length(), 1 if last < 256 else 2)]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("k, number of attempts (log scale)")
    if any_exact:
        axis.axvspan(half, last * 1.14, color="#f6f7f9", zorder=0)
        note = "enumerated"
        axis.annotate(note, (half * 1.12, 0.015), xycoords=("data", "axes fraction"), color=FAINT, fontsize=8)


def _curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """Draw one training curve: raw, or faint with a centred running mean on top when it is long."""
    if len(steps) < SMOOTH_FROM:
        axis.plot(steps, values, color=colour, linewidth=1.6)
        return
    width = running_mean_width(len(steps))
    kernel = np.ones(width)
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
    handles = [
        Line2D(
            [],
            [],
            color=colours[name],
            linewidth=2,
            marker=ROLE_MARKERS.get(role, "^") if markers else "",
            markersize=5,
        )
        for name, role in roles.items()
    ]
    figure.legend(handles, list(roles), loc="outside upper left", ncols=min(columns, len(roles)), fontsize=9.5)
