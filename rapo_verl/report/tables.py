"""The numbers of a report as CSV and as a LaTeX table."""

import csv
import io
from collections.abc import Mapping
from typing import Any

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    }
)  # fmt: skip


def curves_csv(summary: Mapping[str, Any]) -> str:
    """Return one row a set, scope, model and k: pass@k, its band, majority@k and the guess baseline."""
    rows = [{"label": "all", "models": summary["models"]}, *summary["sets"]]
    lines: list[list[Any]] = [["set", "scope", "model", "k", "pass_at_k", "low", "high", "majority_at_k", "guess_at_k"]]
    for row in rows:
        for scope in ("full", "hard"):
            for model in row["models"]:
                values = model[scope]
                for i, k in enumerate(summary["ks"] if values["mean"] is not None else ()):
                    curves = (values.get(key) for key in ("mean", "low", "high", "majority", "guess"))
                    lines.append([row["label"], scope, model["name"], k, *(c[i] if c else None for c in curves)])
    return _csv(lines)


def problems_csv(summary: Mapping[str, Any]) -> str:
    """Return one row a problem and model: right samples, n, and the Clopper-Pearson interval."""
    names = [model["name"] for model in summary["models"]]
    lines: list[list[Any]] = [["problem", "group", "hard", "model", "correct", "n", "low", "high"]]
    for row in summary["matrix"]:
        for name, cell in zip(names, row["cells"], strict=True):
            start = [row["id"], row["group"], int(row["hard"]), name]
            lines.append([*start, cell["correct"], summary["n"], cell["low"], cell["high"]])
    return _csv(lines)


def _csv(lines: list[list[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def latex(summary: Mapping[str, Any]) -> str:
    """Return the headline table for a paper (booktabs): estimate and band in per cent, a part a scope and set."""
    ks = summary["headline_ks"]
    parts = summary["sets"] or [{"label": "", "models": summary["models"]}]
    lines = [
        f"% pass@k of n = {summary['n']} samples, per cent; {100 * summary['bootstrap']['level']:g} % bootstrap bands",
        r"\begin{tabular}{l" + "r" * len(ks) + "}",
        r"\toprule",
        " & ".join(["", *(f"pass@{k}" for k in ks)]) + r" \\",
    ]
    for part in parts:
        for scope in ("full", "hard"):
            if part["models"][0][scope]["mean"] is None:
                continue
            words = f"{part['label']} {scope.capitalize()}, {part['models'][0][scope]['problems']} problems".strip()
            lines += [r"\midrule", rf"\multicolumn{{{len(ks) + 1}}}{{l}}{{{words.translate(_LATEX)}}} \\"]
            for model in part["models"]:
                cells = [_latex_cell(model[scope], summary["ks"].index(k)) for k in ks]
                lines.append(" & ".join([model["name"].translate(_LATEX), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_cell(values: Mapping[str, Any], i: int) -> str:
    mean, low, high = (100 * values[key][i] for key in ("mean", "low", "high"))
    return f"{mean:.1f} {{\\scriptsize [{low:.1f}, {high:.1f}]}}"
