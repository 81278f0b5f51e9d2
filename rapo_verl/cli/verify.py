"""The command ``rapo verify``: one answer or a file of them, judged as a run would."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rapo_verl import Refused
from rapo_verl.cli.base import commands

app = commands("Judge answers.")


# A right answer may begin with a minus.
@app.command("verify", context_settings={"ignore_unknown_options": True})
def verify(
    gold: Annotated[str | None, typer.Argument(help="the right answer")] = None,
    response: Annotated[str | None, typer.Argument(help="a model's text, with its answer in \\boxed{}")] = None,
    file: Annotated[Path | None, typer.Option(help="JSON lines, CSV or parquet with gold and response instead")] = None,
    strictness: Annotated[str, typer.Option(help="integer, last_integer, symmetric or math_verify")] = "symmetric",
    deadline: Annotated[float, typer.Option(help="seconds that one comparison may take")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON each")] = False,
) -> None:
    r"""Judge a response as a run would, and say why; exit code 0: correct (with --file: all are), 1: not.

    Example: rapo verify '\frac{1}{2}' 'so it is \boxed{0.5}'
    """
    from rapo_verl.reward import Verdict, VerifierSettings, shared_verifier

    unknown = [text for text in (gold, response) if text is not None and re.match("--[a-z]", text)]
    if unknown:
        raise Refused(f"no such option: {unknown[0]}; allowed: --file, --strictness, --deadline, --json, --help")
    settings = VerifierSettings(strictness=strictness, deadline_s=deadline)
    if settings.problems():
        raise Refused(settings.problems())
    if (file is None) == (gold is None or response is None):
        raise Refused("give GOLD and RESPONSE, or --file with rows that have both")
    pairs = _pairs(file) if file else [(str(gold), str(response))]
    golds, responses = zip(*pairs)
    try:
        verdicts = shared_verifier(settings).verify_many(responses, golds)
    except ValueError as error:
        raise Refused(str(error)) from error
    for (right, _), (verdict, box) in zip(pairs, verdicts):
        said = {"verdict": verdict.value, "answer": box, "gold": right, "why": _why(verdict, right, box, settings)}
        print(json.dumps(said) if as_json else f"{verdict.value}: answer {box!r}, gold {right!r}: {said['why']}")
    raise typer.Exit(0 if all(verdict is Verdict.correct for verdict, _ in verdicts) else 1)


def _pairs(file: Path) -> list[tuple[str, str]]:
    """Return (gold, response) of each row of a file."""
    from rapo_verl.data.sources import iter_records

    rows = list(iter_records(file))
    bad = [i for i, row in enumerate(rows) if not all(isinstance(row.get(key), str) for key in ("gold", "response"))]
    if bad:
        wanted = "fields gold and response must be there and be text"
        raise Refused([f"{file}, row {i}: {wanted}; got {rows[i]!s:.200}" for i in bad[:20]])
    return [(row["gold"], row["response"]) for row in rows]


def _why(verdict: Any, gold: str, box: str | None, settings: Any) -> str:
    """Return what decided, in a sentence."""
    from rapo_verl.reward.answer import normalize, parse_integer
    from rapo_verl.reward.reading import read

    if box is None and settings.strictness == "last_integer":
        return "no number in the response"
    if box is None:
        return "no \\boxed{} in the response, or its last one never closes"
    if verdict == "timeout":
        return f"no answer within {settings.deadline_s} s, twice"
    if verdict == "error":
        return f"the comparison ran out of {settings.memory_mb} MiB or its process died, twice"
    if settings.strictness != "symmetric":
        return f"as {settings.strictness} compares"
    want, got = normalize(gold), normalize(box)
    if not got:
        return "the box is empty"
    if parse_integer(want) is not None and parse_integer(got) is not None:
        return "the same integer" if verdict == "correct" else "two different integers"
    if want == got:
        return "the same text but for what has no meaning"
    said = "equal" if verdict == "correct" else "not equal"
    return f"{said}; gold read as {read(want)}, answer as {read(got)}"
