"""The report of one study: a page that needs no network, its figures as files, and its numbers as JSON, CSV, LaTeX."""

import base64
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rapo_verl.report import figures as plots
from rapo_verl.report.conclusion import conclusion
from rapo_verl.report.statistics import TRAINING_METRICS, Numbers, compute, rates
from rapo_verl.report.study import Study, role_in
from rapo_verl.run.files import filled, write_atomic

logger = logging.getLogger(__name__)
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
    training = plots.training_figures(numbers, run_roles, colours)
    verdict = conclusion(numbers)
    summary = {"verdict": verdict, **numbers.as_json()}

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False))
    write_atomic(out / "passk.csv", numbers.curves.to_csv(index=False))
    write_atomic(out / "problems.csv", numbers.problems.astype({"hard": int}).to_csv(index=False))
    write_atomic(out / "differences.csv", numbers.differences.to_csv(index=False))
    write_atomic(out / "table.tex", latex(numbers))
    plots.write_figure(plots.passk_figure(numbers, colours, list(study.parts)), out / "passk")
    if training:
        write_atomic(out / "training.png", plots.image(training[0], "png"))
    else:
        (out / "training.png").unlink(missing_ok=True)
    # Panels one by one, so that a phone shows them below each other.
    panels = [plots.passk_figure(numbers, colours, [part]) for part in study.parts]
    write_atomic(out / "report.html", render_html(numbers, verdict, colours, panels, training[1:]))
    logger.info("report written to %s", out / "report.html")
    return numbers


def render_html(
    numbers: Numbers, verdict: str, colours: Mapping[str, str], passk: Sequence[Figure], training: Sequence[Figure]
) -> str:
    """Return the page: a figure a panel, a figure a training metric, one colour a model or run.

    Every text that came from outside is escaped by jinja2, figures are embedded as data.
    """
    study, runs = numbers.study, numbers.training.values()
    longest = max((run["steps"] for run in runs), default=0)
    # Problems as the matrix shows them: those that the base solves most often first.
    order = sorted(range(len(study.base.ids)), key=lambda i: -study.base.correct[i])
    return filled(
        Path(__file__).parent / "report.html.j2",
        {"prob": _prob, "signed": _signed, "figures": _significant, "share": _share},
        s=study,
        numbers=numbers,
        at=numbers.by_key,
        verdict=verdict,
        names=study.names,
        top=study.ks[-1],
        rates={result.name: rates(result) for result in study.results if result.responses},
        has_exact=bool(numbers.curves.exact.notna().any()),
        all_zero=not any(any(result.correct) for result in study.results),
        colours=colours,
        passk=[_data_uri(figure) for figure in passk],
        training=[_data_uri(figure) for figure in training],
        metrics=[m for m in TRAINING_METRICS if any(run["final"][m[0]] is not None for run in runs)],
        smoothing=plots.running_mean_width(longest) if longest >= plots.SMOOTH_FROM else 0,
        problems=[list(rows.itertuples()) for _, rows in numbers.problems.groupby("problem", sort=False)],
        blocks=[order[i : i + BLOCK] for i in range(0, len(order), BLOCK)],
        groups=[(label, list(rows.itertuples())) for label, rows in numbers.groups.groupby("group", sort=False)],
        percent=f"{100 * study.level:g} %",
    )


def print_table(numbers: Numbers, console: Console | None = None) -> None:
    """Print the conclusion and the headline table, Full and Hard, to a terminal (default: the standard output)."""
    study = numbers.study
    console = console or Console()
    hard = f" ({study.hard.sum()} Hard)" if study.hard_choice else ""
    caption = f"{len(study.base.ids)} problems{hard}, n = {study.n}; low-high: {100 * study.level:g} % interval"
    if any(result.exact for result in study.results):
        caption += "; = enumerated value"
    table = Table("model", "set", title=Text(study.title), caption=Text(caption))
    for k in study.headline_ks:
        table.add_column(f"pass@{k}", justify="right")
    for label, scope in study.parts:
        for name in study.names if label == "all" else ():
            cells = [Text(_cell(numbers.by_key.get((label, scope, name, k)))) for k in study.headline_ks]
            table.add_row(Text(name), scope.capitalize(), *cells)
        table.add_section()
    console.print(Text(conclusion(numbers)))
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
    study, ks = numbers.study, numbers.study.headline_ks
    lines = [
        f"% pass@k of n = {study.n} samples, per cent; {100 * study.level:g} % intervals",
        r"\begin{tabular}{l" + "r" * len(ks) + "}",
        r"\toprule",
        " & ".join(["", *(f"pass@{k}" for k in ks)]) + r" \\",
    ]
    for label, scope in study.parts:
        size = numbers.by_key[label, scope, study.base.name, 0].problems
        if not size or (label == "all" and len(study.sets) > 1):
            continue
        words = f"{'' if label == 'all' else label} {scope.capitalize()}, {size} problems".strip()
        lines += [r"\midrule", rf"\multicolumn{{{len(ks) + 1}}}{{l}}{{{words.translate(_LATEX)}}} \\"]
        for name in study.names:
            rows = [numbers.by_key[label, scope, name, k] for k in ks]
            cells = [rf"{100 * r.pass_at_k:.1f} {{\scriptsize [{100 * r.low:.1f}, {100 * r.high:.1f}]}}" for r in rows]
            lines.append(" & ".join([name.translate(_LATEX), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


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
