"""Which problems must not be used: some are dropped with a reason, some make the whole file suspect."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from rapo_verl.data.chat import prompt_mark
from rapo_verl.data.layouts import Row
from rapo_verl.data.overlap import HeldOut, aime_keys, normalized
from rapo_verl.reward import Verdict, Verifier
from rapo_verl.reward.answer import normalize, parse_integer
from rapo_verl.run.progress import bar_interval

# "2024-I-8", "2024_AIME_1_Problem_8"
_AIME_ID = re.compile(
    r"(20[0-9]{2})[-_ ]*(?:AIME)?[-_ ]*(II?|[12])(?=[-_ P])[-_ ]*(?:P(?:ROBLEM)?)?[-_ ]*([0-9]{1,2})(?![0-9])"
)
_CONTEST = {"1": "I", "2": "II"}
_DEGREES = re.compile(r"\^(?:\\circ|\{\\circ\})|°")
# Control characters but for the tab and line breaks, lone surrogates, and what stands for a lost character.
_LOST = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
# The tab of "\triangle", the return of "\right", the newline of "\neq".
_EATEN = re.compile(r"\t(?:ext|imes|riangle|heta|frac)|\r(?:ight|angle|ceil|floor)|\n(?:eq\b|abla)")
_ROWS = re.compile(r"\\begin\{(cases|array|[a-z]*matrix|align\*?|aligned|gather\*?)\}(.*?)\\end\{\1\}", re.DOTALL)
_LETTER = re.compile(r"[A-E]")
# Share of suspect rows above which a training set is refused as well.
_MAX_SUSPECT = 0.01
# Share of answers that are letters of choices that no question shows, above which the set has lost its choices.
_MAX_LETTERS = 0.2
# The kind of a fault, which is the same for many rows, and what of it is a row's own.
Fault = tuple[str, str]


class RowFinding(NamedTuple):
    """One problem of one row: what kind it is, and what of it is this row's own."""

    row: int
    id: str
    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """The kind and the detail in one sentence."""
        return self.kind + self.detail

    def __str__(self) -> str:
        return f"row {self.row} ({self.id}): {self.reason}"


class Checked(NamedTuple):
    """What is left of a file, what was left out, and what is wrong enough to refuse the file."""

    kept: list[Row]
    dropped: list[RowFinding]
    refused: list[RowFinding]
    suspect: list[RowFinding]
    # Right answers that math-verify reads as text only: they are right only in the same words.
    text_answers: list[Row]


def bar(items: Iterable, what: str, total: int | None = None) -> tqdm:
    """Return a progress bar over rows, not shown for what takes a moment."""
    return tqdm(items, desc=what, total=total, unit="row", delay=2, mininterval=bar_interval())


def chunks(items: list, what: str, size: int = 4096) -> Iterator[list]:
    """Yield a list in parts, under one bar."""
    with bar((), what, len(items)) as progress:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            progress.update(min(size, len(items) - start))


def check_problems(
    problems: list[Row],
    *,
    aime: bool,
    evaluation: bool,
    against: HeldOut,
    drop_overlap: bool,
    count_tokens: Callable[[Sequence[Row]], list[int]] | None,
    max_prompt_tokens: int,
    verifier: Verifier,
) -> Checked:
    r"""Return the problems of one file that may be used.

    Dropped: no answer, an answer that nothing equals (not even itself), a question seen before (with another answer:
    both), a prompt over the limit. Refused: control characters, a question that is a prompt already, an AIME answer
    that is no integer in 0..999 or known to be wrong, and, unless they are to be dropped, questions of ``against``.
    Of an evaluation set nothing may be suspect and nothing dropped but copies, since scores on a part are not
    comparable; of a training set up to `_MAX_SUSPECT` of the rows may be suspect; they are named and kept.

    With ``aime``, answers must be integers in 0..999, and are made canonical ("025" and "336^\circ" circulate).
    ``count_tokens`` counts those of rendered prompts; None: not checked.
    """
    refused: list[RowFinding] = []
    dropped: list[RowFinding] = []
    suspect: list[RowFinding] = []
    kept: list[Row] = []
    for problem in bar(problems, "checking questions"):
        refused += _findings(problem, _corruptions(problem))
        suspect += _findings(problem, _suspicions(problem))
        unusable = _findings(problem, _absences(problem))
        dropped += unusable
        if aime and not unusable:
            problem, wrong = _canonical_aime(problem)
            refused += _findings(problem, wrong)
        kept += [] if unusable else [problem]
    kept, copies, contradictions = _without_duplicates(kept, verifier)
    dropped += contradictions
    suspect += _near_duplicates(kept)
    refused += _letters_of_no_choices(kept)
    if evaluation or len(suspect) > _MAX_SUSPECT * len(problems):
        refused += suspect
    if len(against):
        overlapping = dropped if drop_overlap else refused
        for problem in bar(kept, "comparing with --against"):
            where = against.find(problem.question)
            overlapping += _findings(problem, [("overlap with --against", f": is also {where}")] if where else [])
    texts: list[Row] = []
    if not refused:
        # These take longest, and a refused file is not asked about further.
        unanswerable, texts = _judge(kept, verifier)
        dropped += unanswerable
        if count_tokens is not None:
            dropped += _too_long(kept, count_tokens, max_prompt_tokens)
    if evaluation:
        refused += dropped
    dropped += copies
    gone = {finding.row for finding in dropped}
    kept, texts = ([p for p in some if p.row not in gone] for some in (kept, texts))
    return Checked(kept, sorted(dropped), sorted(refused), sorted(suspect), texts)


def first_of_each_kind(findings: Iterable[RowFinding], most: int) -> list[RowFinding]:
    """Return the first ``most`` findings of each kind: a fault of a whole file is one of every row."""
    seen: Counter[str] = Counter()
    return [finding for finding in findings if not seen.update([finding.kind]) and seen[finding.kind] <= most]


def listed(findings: Sequence[RowFinding], most: int) -> list[str]:
    """Return a line for each of the first ``most`` findings of a kind, and one for how many more of it there are."""
    more = Counter(finding.kind for finding in findings)
    lines = [str(finding) for finding in first_of_each_kind(findings, most)]
    return lines + [f"{count - most} more rows: {kind.strip()}" for kind, count in more.items() if count > most]


def _findings(problem: Row, faults: Iterable[Fault]) -> list[RowFinding]:
    return [RowFinding(problem.row, problem.id, *fault) for fault in faults]


def _absences(problem: Row) -> Iterator[Fault]:
    """Yield why there is nothing to ask or to compare with."""
    if problem.fault is not None:
        yield problem.fault
    elif not normalize(problem.answer):
        yield "empty answer", ""
    elif not any(map(str.isalnum, problem.question)):
        yield "empty question", ""


def _corruptions(problem: Row) -> Iterator[Fault]:
    """Yield what no intact file has."""
    for name, text in (("question", problem.question), ("answer", problem.answer)):
        lost = sorted({f"U+{ord(character):04X}" for character in _LOST.findall(text)})
        if lost:
            yield (
                f"{name} has control or lost characters, as where a LaTeX command was decoded once too often; get an "
                "intact copy",
                f" ({', '.join(lost)})",
            )
    mark = prompt_mark(problem.question)
    if mark is not None:
        yield "question is a prompt already; it would be wrapped twice: give the bare question", f" (has {mark!r})"


def _suspicions(problem: Row) -> Iterator[Fault]:
    """Yield what is almost surely damage, but made of characters that text may have."""
    eaten = sorted({f"U+{ord(match[0][0]):04X} before {match[0][1:]!r}" for match in _EATEN.finditer(problem.question)})
    if eaten:
        yield "question has lost the begin of a LaTeX command; get an intact copy", f" ({', '.join(eaten)})"
    for match in _ROWS.finditer(problem.question):
        if "\\ " in match[2] and "\\\\" not in match[2]:
            yield "question has an environment whose row breaks lost a backslash; get an intact copy", f" ({match[1]})"


def _named(identity: str) -> str | None:
    match = _AIME_ID.search(identity.upper())
    return match and f"{match[1]}-{_CONTEST.get(match[2], match[2])}-{int(match[3])}"


def _canonical_aime(problem: Row) -> tuple[Row, list[Fault]]:
    value = parse_integer(_DEGREES.sub("", normalize(problem.answer)))
    if value is None or not 0 <= value <= 999:
        return problem, [("answer is no integer in 0..999, as every AIME answer is", f": {problem.answer!r}")]
    # By its words, for every publisher has other ids; by its id where the words are others.
    problems, keys = aime_keys()
    name = problems.find(problem.question) or _named(problem.id)
    if name in keys and keys[name] != value:
        return problem, [("answer is a wrong key", f" {value}: this is AIME {name}, the right one is {keys[name]}")]
    return problem._replace(answer=str(value)), []


def _without_duplicates(
    problems: list[Row], verifier: Verifier
) -> tuple[list[Row], list[RowFinding], list[RowFinding]]:
    """Return each question's first problem, its copies, and what cannot be told since the answers differ."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for problem in problems:
        groups[problem.question.strip()].append(problem)
    kept, copies, contradictions = [], [], []
    for group in groups.values():
        first, *others = group
        spellings = {normalize(p.answer): p.answer for p in others if normalize(p.answer) != normalize(first.answer)}
        boxes = [f"\\boxed{{{answer}}}" for answer in spellings.values()]
        verdicts = verifier.verify_many(boxes, [first.answer] * len(boxes)) if boxes else []
        if all(verdict is Verdict.correct for verdict, _ in verdicts):
            kept.append(first)
            copies += [RowFinding(p.row, p.id, "same question", f" as row {first.row}") for p in others]
        else:
            answers = ", ".join(repr(answer) for answer in dict.fromkeys(p.answer for p in group))
            detail = f" ({answers}), rows {', '.join(str(p.row) for p in group)}"
            contradictions += [RowFinding(p.row, p.id, "one question with different answers", detail) for p in group]
    return kept, copies, contradictions


def _near_duplicates(problems: list[Row]) -> list[RowFinding]:
    """Return the problems that differ from an earlier one only in spaces, case or punctuation."""
    seen: dict[int, int] = {}
    findings = []
    for problem in problems:
        first = seen.setdefault(hash(normalized(problem.question)), problem.row)
        if first != problem.row:
            findings += _findings(problem, [("same question but for punctuation", f" as row {first}")])
    return findings


def _letters_of_no_choices(problems: list[Row]) -> list[RowFinding]:
    letters = [
        p
        for p in problems
        if _LETTER.fullmatch(p.answer) and not re.search(rf"(?<![A-Za-z]){p.answer}(?![A-Za-z])", p.question)
    ]
    if len(letters) <= _MAX_LETTERS * len(problems):
        return []
    kind = "answer is the letter of a choice that the question does not show; the file has lost its choices"
    return [RowFinding(p.row, p.id, kind, f" ({p.answer})") for p in letters]


def _too_long(problems: list[Row], count_tokens: Callable[[Sequence[Row]], list[int]], most: int) -> list[RowFinding]:
    return [
        RowFinding(p.row, p.id, f"prompt has more than {most} tokens", f": {count}")
        for some in chunks(problems, "counting tokens")
        for p, count in zip(some, count_tokens(some))
        if count > most
    ]


def _judge(problems: list[Row], verifier: Verifier) -> tuple[list[RowFinding], list[Row]]:
    """Return the problems whose answer is not found right in a box, and those whose answer is compared as text."""
    kinds: dict[str, str] = {}
    verdicts: dict[str, Verdict] = {}
    for some in chunks(list(dict.fromkeys(problem.answer for problem in problems)), "checking answers"):
        kinds.update(zip(some, verifier.kinds_of(some)))
        boxed = verifier.verify_many([f"\\boxed{{{answer}}}" for answer in some], some)
        verdicts.update((answer, verdict) for answer, (verdict, _) in zip(some, boxed))
    findings = []
    for p in problems:
        if verdicts[p.answer] is not Verdict.correct:
            fault = "answer does not equal itself", f": {p.answer!r} ({verdicts[p.answer]})"
        elif kinds[p.answer] in ("nothing", "unreadable"):
            fault = "answer does not parse", f": {p.answer!r}"
        else:
            continue
        findings += _findings(p, [fault])
    return findings, [p for p in problems if kinds[p.answer] == "string"]
