"""Which problems must not be used: some are dropped with a reason, some make the whole file suspect."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rapo_verl.data.layouts import Problem
from rapo_verl.reward import Verdict, Verifier
from rapo_verl.reward.answer import normalize, parse_integer

# Keys that circulate wrongly: (year, contest, number) -> (wrong, right).
_WRONG_KEYS = {("2024", "I", 8): (480, 197)}
_AIME_ID = re.compile(r"(20\d\d)[-_ ]?(I{1,2})[-_ ](\d{1,2})\b")
_TEMPLATE_MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "put your final answer within")
_DEGREES = re.compile(r"\^(?:\\circ|\{\\circ\})|°")
_BAD = ("Cc", "Cs")
# The tab of "\triangle", the return of "\right", the newline of "\neq".
_EATEN = re.compile(r"\t(?:ext|imes|riangle|heta|frac)|\r(?:ight|angle|ceil|floor)|\n(?:eq\b|abla)")
_ROWS = re.compile(r"\\begin\{(cases|array|[a-z]*matrix|align\*?|aligned|gather\*?)\}(.*?)\\end\{\1\}", re.DOTALL)
# Share of suspect rows above which a training set is refused as well.
_MAX_SUSPECT = 0.01


@dataclass(frozen=True)
class Finding:
    """One problem of one row."""

    row: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} ({self.id}): {self.reason}"


@dataclass(frozen=True)
class Checked:
    """What is left of a file, what was left out, and what is wrong enough to refuse the file."""

    kept: list[Problem]
    dropped: list[Finding]
    refused: list[Finding]
    suspect: list[Finding]
    # Right answers that math-verify reads as text only: they are right only in the same words.
    text_answers: list[Problem]


def normalized(question: str) -> str:
    """Return a question without what differs between copies of it: case, spaces, LaTeX spacing, punctuation."""
    text = unicodedata.normalize("NFKC", question).lower()
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad)", "", text).replace("\\dfrac", "\\frac")
    # A dot or comma between digits is part of a number.
    return re.sub(r"[\s$;:?!~{}]+|(?<![0-9])[.,]|[.,](?![0-9])", "", text)


def check_problems(
    problems: list[Problem],
    *,
    aime: bool,
    evaluation: bool,
    against: dict[str, str],
    drop_overlap: bool,
    count_tokens: Callable[[Problem], int] | None,
    max_prompt_tokens: int,
    verifier: Verifier,
) -> Checked:
    r"""Return the problems that may be used.

    Dropped: no answer, an answer that nothing equals (not even itself), a question seen before (with another answer:
    both), a prompt over the limit. Refused: control characters, a question that is a prompt already, an AIME answer
    that is no integer in 0..999 or known to be wrong, and, unless they are to be dropped, questions of ``against``.
    Of an evaluation set nothing may be suspect and nothing dropped, since scores on a part are not comparable; of a
    training set up to `_MAX_SUSPECT` of the rows may be suspect; they are named and kept.

    Args:
        problems: of one file, in order.
        aime: answers must be integers in 0..999; they are made canonical ("025" and "336^\circ" circulate).
        evaluation: this is an evaluation set.
        against: normalised question -> where it is, of the sets that must not overlap with this one.
        drop_overlap: leave out what overlaps instead of refusing the file.
        count_tokens: number of tokens of a problem's rendered prompt, or None: not checked.
        max_prompt_tokens: the limit.
        verifier: asked whether an answer is one.
    """
    refused = [Finding(p.row, p.id, reason) for p in problems for reason in _corruptions(p)]
    dropped: list[Finding] = []
    kept = []
    for problem in problems:
        reason = "empty answer" if not normalize(problem.answer) else None
        reason = reason or ("empty question" if not normalized(problem.question) else None)
        if reason is None and aime:
            problem, wrong = _canonical_aime(problem)
            refused += wrong
        (dropped.append(Finding(problem.row, problem.id, reason)) if reason else kept.append(problem))
    kept, more = _without_duplicates(kept)
    dropped += more
    where = [(p, against.get(normalized(p.question))) for p in kept]
    overlapping = [Finding(p.row, p.id, f"is also {other}") for p, other in where if other]
    suspect = [Finding(p.row, p.id, reason) for p in problems for reason in _suspicions(p)] + _near_duplicates(kept)
    if evaluation or len(suspect) > _MAX_SUSPECT * len(problems):
        refused += suspect
    (dropped if drop_overlap else refused).extend(overlapping)
    texts: list[Problem] = []
    if not refused:
        # These take seconds, and a refused file is not asked about further.
        kinds = verifier.kinds_of([problem.answer for problem in kept])
        texts = [problem for problem, kind in zip(kept, kinds) if kind == "string"]
        dropped += _too_long(kept, count_tokens, max_prompt_tokens) + _unanswerable(kept, kinds, verifier)
    if evaluation:
        refused += dropped
    gone = {finding.row for finding in dropped}
    kept = [problem for problem in kept if problem.row not in gone]
    dropped, refused, suspect = (sorted(f, key=lambda finding: finding.row) for f in (dropped, refused, suspect))
    return Checked(kept, dropped, refused, suspect, texts)


def _corruptions(problem: Problem) -> Iterable[str]:
    """Return what no intact file has."""
    for name, text in (("question", problem.question), ("answer", problem.answer)):
        bad = sorted({f"U+{ord(c):04X}" for c in text if unicodedata.category(c) in _BAD and c not in "\n\t\r"})
        if bad or "\ufffd" in text:
            yield (
                f"{name} has control or lost characters ({', '.join(bad) or 'U+FFFD'}), as where a LaTeX command was "
                "decoded once too often; get an intact copy"
            )
    for mark in _TEMPLATE_MARKS:
        if mark in problem.question:
            yield f"question is a prompt already (has {mark!r}); it would be wrapped twice: give the bare question"


def _suspicions(problem: Problem) -> Iterable[str]:
    """Return what is almost surely damage, but made of characters that text may have."""
    eaten = sorted({f"U+{ord(match[0][0]):04X} before {match[0][1:]!r}" for match in _EATEN.finditer(problem.question)})
    if eaten:
        yield f"question has {', '.join(eaten)} where a LaTeX command stood; get an intact copy"
    for match in _ROWS.finditer(problem.question):
        if "\\ " in match[2] and "\\\\" not in match[2]:
            yield f"question has a {match[1]} environment whose row breaks lost a backslash; get an intact copy"


def _canonical_aime(problem: Problem) -> tuple[Problem, list[Finding]]:
    value = parse_integer(_DEGREES.sub("", normalize(problem.answer)))
    if value is None or not 0 <= value <= 999:
        reason = f"answer {problem.answer!r} is no integer in 0..999, as every AIME answer is"
        return problem, [Finding(problem.row, problem.id, reason)]
    match = _AIME_ID.search(problem.id)
    wrong, right = _WRONG_KEYS.get((match[1], match[2], int(match[3])), (None, None)) if match else (None, None)
    if value == wrong:
        reason = f"answer {value} is a wrong key that circulates; the right one is {right}"
        return problem, [Finding(problem.row, problem.id, reason)]
    return replace(problem, answer=str(value)), []


def _without_duplicates(problems: list[Problem]) -> tuple[list[Problem], list[Finding]]:
    groups = defaultdict(list)
    for problem in problems:
        groups[problem.question.strip()].append(problem)
    kept, dropped = [], []
    for first, *others in groups.values():
        if all(normalize(other.answer) == normalize(first.answer) for other in others):
            kept.append(first)
            dropped += [Finding(o.row, o.id, f"same question as row {first.row}") for o in others]
        else:
            rows = ", ".join(str(p.row) for p in (first, *others))
            answers = ", ".join(repr(p.answer) for p in (first, *others))
            reason = f"rows {rows} are one question with different answers ({answers})"
            dropped += [Finding(p.row, p.id, reason) for p in (first, *others)]
    return sorted(kept, key=lambda p: p.row), dropped


def _near_duplicates(problems: list[Problem]) -> list[Finding]:
    """Return the problems that differ from an earlier one only in spaces, case or punctuation."""
    seen: dict[str, Problem] = {}
    findings = []
    for problem in problems:
        first = seen.setdefault(normalized(problem.question), problem)
        if first is not problem:
            findings.append(Finding(problem.row, problem.id, f"same question as row {first.row} but for punctuation"))
    return findings


def _too_long(
    problems: list[Problem], count_tokens: Callable[[Problem], int] | None, max_prompt_tokens: int
) -> list[Finding]:
    if count_tokens is None:
        return []
    counts = [(problem, count_tokens(problem)) for problem in problems]
    return [
        Finding(p.row, p.id, f"prompt has {count} tokens, more than {max_prompt_tokens}")
        for p, count in counts
        if count > max_prompt_tokens
    ]


def _unanswerable(problems: list[Problem], kinds: list[str], verifier: Verifier) -> list[Finding]:
    """Return the problems whose answer, put in a box, is not found right: no response ever could be."""
    verdicts = verifier.verify_many([f"\\boxed{{{p.answer}}}" for p in problems], [p.answer for p in problems])
    findings = []
    for problem, (verdict, _), kind in zip(problems, verdicts, kinds):
        if verdict is not Verdict.correct:
            findings.append(
                Finding(problem.row, problem.id, f"answer {problem.answer!r} does not equal itself ({verdict})")
            )
        elif kind in ("nothing", "unreadable"):
            findings.append(Finding(problem.row, problem.id, f"answer {problem.answer!r} does not parse"))
    return findings
