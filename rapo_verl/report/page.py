"""The report of one study: a page that needs no network, its figures as files, and its numbers as JSON."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rapo_verl.report import figures as plots
from rapo_verl.report import tables
from rapo_verl.report.responses import Responses
from rapo_verl.report.results import EvalResult
from rapo_verl.report.summary import summarise
from rapo_verl.report.training_curves import TRAINING_METRICS
from rapo_verl.run.files import write_atomic

LOGGER = logging.getLogger(__name__)
# Problems in one line of the coverage matrix.
BLOCK = 48


def write_report(
    out_dir: str | os.PathLike[str],
    *,
    results: Sequence[EvalResult],
    hard_choice: EvalResult | None,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, str],
    title: str,
    responses: Mapping[str, Responses] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    force_same_draw: bool = False,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the report and return its summary.

    Files: report.html, summary.json, passk.csv, problems.csv, table.tex, passk.png, passk.svg and, with curves to draw,
    training.png.

    Args:
        out_dir: Folder, made if need be. Files of an older report in it are replaced.
        results: One `EvalResult` a model, on the same problems with the same n.
        hard_choice: An independent draw of the base, by the base's name, used only to choose Hard; None: no Hard.
        histories: For each training run its metric dicts, one a step, with the key "step".
        settings: Configuration, commit, versions, seeds, commands, in the order to show.
        title: Heading of the page.
        responses: What each model's responses look like (`rapo_verl.report.responses`), where that is known.
        samples: Of each problem "question", "gold" and "models": name to samples (`rapo_verl.report.samples`).
        force_same_draw: Let a scored draw choose Hard; figure and page then say so.
        level: Content of bands and intervals.
        draws: Bootstrap draws.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: The results may not be compared; nothing is written then.
    """
    summary = summarise(
        results,
        hard_choice,
        histories=histories,
        settings=settings,
        title=title,
        responses=responses,
        force_same_draw=force_same_draw,
        level=level,
        draws=draws,
        seed=seed,
    )
    model_roles = {m["name"]: m["role"] for m in summary["models"]}
    run_roles = {name: model_roles.get(name, run["role"]) for name, run in summary["training"].items()}
    colours = plots.model_colours(model_roles | run_roles)
    passk = [plots.passk_figure(summary, colours, narrow=narrow) for narrow in (False, True)]
    training = [plots.training_figure(histories, run_roles, colours, narrow=narrow) for narrow in (False, True)]

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False))
    write_atomic(out / "passk.csv", tables.curves_csv(summary))
    write_atomic(out / "problems.csv", tables.problems_csv(summary))
    write_atomic(out / "table.tex", tables.latex(summary))
    for kind in ("png", "svg"):
        write_atomic(out / f"passk.{kind}", plots.image(passk[0], kind))
    if training[0] is None:
        (out / "training.png").unlink(missing_ok=True)
    else:
        write_atomic(out / "training.png", plots.image(training[0], "png"))
    write_atomic(out / "report.html", render_html(summary, colours, passk, training, samples))
    LOGGER.info("report written to %s", out / "report.html")
    return summary


def render_html(
    summary: Mapping[str, Any],
    colours: Mapping[str, str],
    passk: Sequence[Figure],
    training: Sequence[Figure | None],
    samples: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the page. Every text that came from outside is escaped by jinja2, figures are embedded as data.

    Args:
        summary: What `summarise` returns.
        colours: Name to colour, for models and training runs.
        passk: The wide and the narrow pass@k figure.
        training: The wide and the narrow training figure, or None for each.
        samples: As for `write_report`; empty or one entry a problem.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prob": _prob, "signed": _signed, "figures": _significant, "share": _share}
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    longest = max((run["steps"] for run in summary["training"].values()), default=0)
    return template.render(
        s=summary,
        colours=colours,
        passk=[_data_uri(f) for f in passk],
        training=[_data_uri(f) for f in training if f is not None],
        metrics=[
            m for m in TRAINING_METRICS if any(r["final"][m[0]] is not None for r in summary["training"].values())
        ],
        smoothing=plots.running_mean_width(longest) if longest >= plots.SMOOTH_FROM else 0,
        samples=samples,
        blocks=_blocks(summary),
        percent=f"{100 * summary['bootstrap']['level']:g} %",
    )


def print_table(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the headline table, Full and Hard, to a terminal.

    Args:
        summary: What `write_report` returns.
        console: Where to; the standard output if None.
    """
    hard = len(summary["hard"]["ids"])
    table = Table(
        title=Text(summary["title"]),
        caption=Text(
            f"{summary['problems']} problems ({hard} Hard), n = {summary['n']}; low-high: "
            f"{100 * summary['bootstrap']['level']:g} % bootstrap; = enumerated value"
        ),
    )
    table.add_column("model")
    table.add_column("set")
    for k in summary["headline_ks"]:
        table.add_column(f"pass@{k}", justify="right")
    for scope in ("full", "hard"):
        for model in summary["models"]:
            cells = [_cell(summary, model[scope], k) for k in summary["headline_ks"]]
            table.add_row(Text(model["name"]), scope.capitalize(), *(Text(c) for c in cells))
        table.add_section()
    (console or Console()).print(table)


def _cell(summary: Mapping[str, Any], scope: Mapping[str, Any], k: int) -> str:
    i = summary["ks"].index(k)
    lines = []
    if scope["mean"] is not None:
        lines += [_prob(scope["mean"][i]), f"{_prob(scope['low'][i])}-{_prob(scope['high'][i])}"]
    if scope["exact"] is not None:
        lines.append(f"= {_prob(scope['exact'][i])}")
    return "\n".join(lines) or "-"


def _blocks(summary: Mapping[str, Any]) -> list[list[int]]:
    """Return the problems as the matrix shows them: those that the base solves most often first, BLOCK a line."""
    base = [model["name"] for model in summary["models"]].index(summary["base"])
    order = sorted(range(summary["problems"]), key=lambda i: -summary["matrix"][i]["cells"][base]["correct"])
    return [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]


def _data_uri(figure: Figure) -> str:
    """Return a figure as SVG in a data URI. As an image source it can neither run a script nor load anything."""
    return "data:image/svg+xml;base64," + base64.b64encode(plots.image(figure, "svg")).decode("ascii")


def _prob(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    # A difference that rounds to nothing claims no direction.
    return "0.000" if text in ("+0.000", "-0.000") else text.replace("-", "\N{MINUS SIGN}")


def _share(value: float) -> str:
    """Return a share as per cent; one that is not 0 never reads as 0."""
    return "0" if value == 0 else "< 0.01 %" if value < 1e-4 else f"{100 * value:.2f} %"


def _significant(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
