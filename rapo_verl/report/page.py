"""The report of one study: a page that needs no network, its figures as files, and its numbers as JSON, CSV, LaTeX."""

import base64
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rapo_verl.report import figures as plots
from rapo_verl.report.statistics import TRAINING_METRICS, Numbers, compute, rates
from rapo_verl.report.study import Study, role_in
from rapo_verl.report.verdict import verdict
from rapo_verl.run.files import write_atomic

LOGGER = logging.getLogger(__name__)
# Problems in one line of the coverage matrix.
BLOCK = 40
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    }
)  # fmt: skip


def write_report(out_dir: str | os.PathLike[str], study: Study) -> Numbers:
    """Write the report into a folder, made if need be, and return its numbers.

    Files, those of an older report replaced: report.html, summary.json, passk.csv, problems.csv, differences.csv,
    table.tex, passk.png, passk.svg and, with curves to draw, training.png.
    """
    numbers = compute(study)
    model_roles = {result.name: result.role for result in study.results}
    run_roles = {name: model_roles.get(name) or role_in(name) for name in study.histories}
    colours = plots.model_colours(model_roles | run_roles)
    panels = [(label, scope) for label in study.sets for scope in study.scopes]
    passk = plots.passk_figure(numbers, colours, panels)
    training = plots.training_figures(numbers, run_roles, colours)
    summary = {"verdict": verdict(numbers), **numbers.as_json()}

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False))
    write_atomic(out / "passk.csv", numbers.curves.to_csv(index=False))
    write_atomic(out / "problems.csv", numbers.problems.astype({"hard": int}).to_csv(index=False))
    write_atomic(out / "differences.csv", numbers.differences.to_csv(index=False))
    write_atomic(out / "table.tex", latex(numbers))
    for kind in ("png", "svg"):
        write_atomic(out / f"passk.{kind}", plots.image(passk, kind))
    if training:
        write_atomic(out / "training.png", plots.image(training[0], "png"))
    else:
        (out / "training.png").unlink(missing_ok=True)
    # Panels one by one, so that a phone shows them below each other.
    single = [plots.passk_figure(numbers, colours, [panel]) for panel in panels]
    write_atomic(out / "report.html", render_html(numbers, colours, single, training[1:]))
    LOGGER.info("report written to %s", out / "report.html")
    return numbers


def render_html(
    numbers: Numbers, colours: Mapping[str, str], passk: Sequence[Figure], training: Sequence[Figure]
) -> str:
    """Return the page. Every text that came from outside is escaped by jinja2, figures are embedded as data.

    Args:
        numbers: of the study.
        colours: Name to colour, for models and training runs.
        passk: One figure a panel.
        training: One figure a metric; empty without training.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prob": _prob, "signed": _signed, "figures": _significant, "share": _share}
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    study = numbers.study
    longest = max((run["steps"] for run in numbers.training.values()), default=0)
    runs = numbers.training.values()
    return template.render(
        s=study,
        numbers=numbers,
        at=numbers.by_key,
        verdict=verdict(numbers),
        names=[result.name for result in study.results],
        top=study.ks[-1],
        rates={result.name: rates(result) for result in study.results if result.responses},
        has_exact=bool(numbers.curves.exact.notna().any()),
        all_zero=not any(any(result.correct) for result in study.results),
        colours=colours,
        passk=[_data_uri(figure) for figure in passk],
        training=[_data_uri(figure) for figure in training],
        metrics=[m for m in TRAINING_METRICS if any(run["final"][m[0]] is not None for run in runs)],
        smoothing=plots.running_mean_width(longest) if longest >= plots.SMOOTH_FROM else 0,
        problems=[rows for _, rows in _by_problem(numbers.problems)],
        blocks=_blocks(study),
        groups=[(label, list(rows.itertuples())) for label, rows in numbers.groups.groupby("group", sort=False)],
        percent=f"{100 * study.level:g} %",
    )


def print_table(numbers: Numbers, console: Console | None = None) -> None:
    """Print the verdict and the headline table, Full and Hard, to a terminal (default: the standard output)."""
    study = numbers.study
    console = console or Console()
    table = Table(
        title=Text(study.title),
        caption=Text(
            f"{len(study.base.ids)} problems ({study.hard.sum()} Hard), n = {study.n}; low-high: "
            f"{100 * study.level:g} % interval; = enumerated value"
        ),
    )
    table.add_column("model")
    table.add_column("set")
    for k in study.headline_ks:
        table.add_column(f"pass@{k}", justify="right")
    for scope in study.scopes:
        for result in study.results:
            cells = [Text(_cell(numbers.by_key.get(("all", scope, result.name, k)))) for k in study.headline_ks]
            table.add_row(Text(result.name), scope.capitalize(), *cells)
        table.add_section()
    console.print(Text(verdict(numbers)))
    console.print(table)


def _cell(row: Any) -> str:
    lines = []
    if row is not None and row.pass_at_k == row.pass_at_k:
        lines += [_prob(row.pass_at_k), f"{_prob(row.low)}-{_prob(row.high)}"]
    if row is not None and row.exact == row.exact:
        lines.append(f"= {_prob(row.exact)}")
    return "\n".join(lines) or "-"


def latex(numbers: Numbers) -> str:
    """Return the headline table for a paper (booktabs): estimate and band in per cent, a part a scope and set."""
    study = numbers.study
    ks = study.headline_ks
    lines = [
        f"% pass@k of n = {study.n} samples, per cent; {100 * study.level:g} % intervals",
        r"\begin{tabular}{l" + "r" * len(ks) + "}",
        r"\toprule",
        " & ".join(["", *(f"pass@{k}" for k in ks)]) + r" \\",
    ]
    for label in [label for label in study.sets if label != "all"] or ["all"]:
        for scope in study.scopes:
            size = numbers.by_key[label, scope, study.base.name, 0].problems
            if not size:
                continue
            words = f"{'' if label == 'all' else label} {scope.capitalize()}, {size} problems".strip()
            lines += [r"\midrule", rf"\multicolumn{{{len(ks) + 1}}}{{l}}{{{words.translate(_LATEX)}}} \\"]
            for result in study.results:
                rows = [numbers.by_key[label, scope, result.name, k] for k in ks]
                cells = [
                    rf"{100 * r.pass_at_k:.1f} {{\scriptsize [{100 * r.low:.1f}, {100 * r.high:.1f}]}}" for r in rows
                ]
                lines.append(" & ".join([result.name.translate(_LATEX), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _by_problem(table: pd.DataFrame) -> list[tuple[str, list[Any]]]:
    return [(str(name), list(rows.itertuples())) for name, rows in table.groupby("problem", sort=False)]


def _blocks(study: Study) -> list[list[int]]:
    """Return the problems as the matrix shows them: those that the base solves most often first, BLOCK a line."""
    order = sorted(range(len(study.base.ids)), key=lambda i: -study.base.correct[i])
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
