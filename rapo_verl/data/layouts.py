"""What a publisher's columns mean: the question, the right answer, and what is known about them."""

import ast
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from rapo_verl import Refused
from rapo_verl.data.chat import question_in
from rapo_verl.data.sources import Record, RowError
from rapo_verl.reward import last_boxed

# Columns of the question and of the answer, case aside; the first pair that a row has filled is taken.
LAYOUTS = (
    ("prompt", "reward_model"),  # veRL: DAPO-17k and its AIME, Skywork, PRIME, what `rapo data prepare` wrote
    ("question", "gt_answer"),  # SimpleRL-Zoo; its pre-rendered prompt is not used
    ("question", "final_answer"),  # OlympiadBench, DeepMath
    ("problem", "expected_answer"),  # NVIDIA's
    ("question", "answer"),  # GSM8K, SimpleRL, ASDiv and SVAMP (with a body), Minerva, MMLU, SAT
    ("problem", "answer"),  # MATH-500, AIME, NuminaMath 1.5
    ("prompt", "answer"),
    ("question", "correct"),  # AQuA
    ("problem", "correct"),  # MathQA
    ("question", "label"),  # AGIEval
    ("question", "answerkey"),  # ARC
    ("problem", "solution"),  # MATH, NuminaMath: the last box of the solution
)
_CONTEXTS = ("passage", "context", "body")
_CHOICES = ("options", "choices")
_IDS = ("unique_id", "id", "idx", "problem_id")
_SUBJECTS = ("subject", "type", "subfield", "problem_type")
# What stands for an answer where there is none; "None" is the answer of some problems of MATH.
_NO_ANSWERS = {"nan", "null", "n/a", "proof", "notfound"}
# A worked solution in place of its result: GSM8K's calculator, or this many words.
_CALCULATION = re.compile(r"<<[^<>]*=[^<>]*>>")
_WORD = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]{2,}")
_MAX_WORDS = 20
_E_NOTATION = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)")
# ASDiv's "9 (apples)".
_COUNTED = re.compile(r"([-+0-9.,/]+) \([^()0-9]+\)")
_LEVEL = re.compile(r"(?:level\s*)?([0-9]{1,2})(?:\.0+)?", re.IGNORECASE)
# The label of a choice, where it is written with it: "(A) 3", "A)3", "A. 3", "a ) 3".
_LABEL = re.compile(r"\s*\(?([A-Ja-j]) ?[).:]\s*")
_LABELS = re.compile(r"(?<![A-Za-z])([A-Ja-j]) ?[).:]")


class Row(NamedTuple):
    """One row as its source gave it, columns renamed."""

    row: int  # position in the source, from 0
    id: str
    question: str
    answer: str
    level: int | None = None
    subject: str | None = None
    # Why it cannot be used, and what of that is its own; question and answer are empty then.
    fault: tuple[str, str] | None = None


def to_problems(records: Iterable[Record], name: str) -> tuple[list[Row], Counter[str]]:
    """Return the problems of rows, and how many rows have which layout."""
    layouts: Counter[str] = Counter()
    problems = list(_problems(records, name, layouts))
    if not layouts:
        known = "\n".join(f"  {', '.join(pair)}" for pair in LAYOUTS)
        columns = "".join(problems[0].fault or ())
        raise Refused(f"{name}: {columns}; known are these pairs, beside what else is there:\n{known}")
    return problems, layouts


def _problems(records: Iterable[Record], name: str, layouts: Counter[str]) -> Iterator[Row]:
    for row, record in enumerate(records):
        # Small letters win where two columns differ in case alone.
        record = {str(key).lower(): record[key] for key in sorted(record, key=str)}
        pair = _layout(tuple(key for key, value in record.items() if value not in (None, ""))) or _layout(tuple(record))
        try:
            if pair is None:
                raise RowError("no known columns", f": {', '.join(record)}")
            layouts[", ".join(pair)] += 1
            question, answer = _question_and_answer(record, *pair)
        except RowError as error:
            yield Row(row, _identity(record) or f"{name}-{row}", "", "", fault=error.fault)
            continue
        extra = record.get("extra_info") if "reward_model" in record else None
        facts = record | extra if isinstance(extra, dict) else record
        # Of its words, not of its place: two orders of a set must not share ids.
        identity = _identity(facts) or f"{name}-{hashlib.sha256(question.encode('utf-8', 'replace')).hexdigest()[:12]}"
        level = _LEVEL.fullmatch(str(facts.get("level")))
        subject = next((value for key in _SUBJECTS if isinstance(value := facts.get(key), str) and value), None)
        yield Row(row, identity, question, answer, int(level[1]) if level else None, subject and _intact(subject))


@lru_cache
def _layout(columns: tuple[str, ...]) -> tuple[str, str] | None:
    return next((pair for pair in LAYOUTS if set(pair) <= set(columns)), None)


def _intact(text: str) -> str:
    """Return a text without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _identity(record: Record) -> str | None:
    for key in _IDS:
        value = record.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, (str, int)) and str(value).strip():
            return _intact(str(value))
    # veRL's index is a row's number, DAPO's an id.
    index = record.get("index")
    return _intact(index) if isinstance(index, str) and index else None


def _question_and_answer(record: Record, asked: str, answered: str) -> tuple[str, str]:
    if any(record.get(key) for key in record if key.startswith(("image", "decoded_image"))):
        raise RowError("needs an image")
    question, answer = record[asked], record[answered]
    if asked == "prompt":
        question = question_in(question)
        if answered == "reward_model":
            answer = answer.get("ground_truth") if isinstance(answer, dict) else None
    elif not isinstance(question, str):
        raise RowError("question is no text", f": {question!r:.60}")
    if "<image" in question:
        raise RowError("needs an image")
    context = next((value for key in _CONTEXTS if isinstance(value := record.get(key), str) and value.strip()), None)
    if context is not None and context.strip() not in question:
        question = f"{context.strip()} {question}"
    choices = next((value for key in _CHOICES if (value := record.get(key))), None)
    if choices is None and record.keys() >= {"a", "b", "c", "d"}:
        choices = {key.upper(): record[key] for key in "abcde" if record.get(key)}
    if choices is not None:
        return _with_choices(question, choices, answer)
    if isinstance(answer, list) and record.get("is_multiple_answer") is True:
        return question, ", ".join(_answer(part) for part in answer)
    return question, _answer(answer, worked=answered == "solution")


def _answer(value: Any, *, worked: bool = False) -> str:
    """Return a right answer, of any type that JSON or parquet has, as text, "" for none; of a solution, its box."""
    if isinstance(value, str) and value.lstrip().startswith(("['", '["')):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise RowError("answer is a list that cannot be read", f": {value:.60}") from None
    if isinstance(value, list):
        answers = {_answer(part) for part in value}
        if len(answers) > 1:
            raise RowError("answer is a list; which of them counts is not said", f": {value!r:.60}")
        return answers.pop() if answers else ""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise RowError("answer is neither text nor a number", f": {value!r:.60}")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return _short(str(value).strip(" \t\r\n"), worked)  # no other character: it would be damage, to be found


def _short(text: str, worked: bool) -> str:
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif "\\boxed" in text or worked:
        boxed = last_boxed(text)
        if boxed is None:
            raise RowError("no box in its solution")
        text = boxed
    if text.lower() in _NO_ANSWERS:
        return ""
    if _CALCULATION.search(text) or len(_WORD.findall(text)) > _MAX_WORDS:
        raise RowError("answer is a whole solution, without '####' or a box around its result")
    number, counted = _E_NOTATION.fullmatch(text), _COUNTED.fullmatch(text)
    if number is not None:
        return rf"{number[1]}\times10^{{{int(number[2])}}}"
    return counted[1] if counted else text


def _with_choices(question: str, choices: Any, answer: Any) -> tuple[str, str]:
    """Return a question with its choices below it, and the letter of the right one."""
    if isinstance(choices, str):
        letters, texts = [letter.upper() for letter in _LABELS.findall(choices)], [choices.strip()]
        lines = texts
    else:
        if isinstance(choices, dict):
            columns = "text" in choices and "label" in choices
            choices = dict(zip(choices["label"], choices["text"])) if columns else choices
            letters, texts = [str(key) for key in choices], [str(value) for value in choices.values()]
        else:
            found = [(_LABEL.match(str(choice)), str(choice)) for choice in choices]
            letters = [label[1].upper() if label else chr(ord("A") + i) for i, (label, _) in enumerate(found)]
            texts = [choice[label.end() if label else 0 :] for label, choice in found]
        lines = [f"({letter}) {text}" for letter, text in zip(letters, texts)]
    named = re.sub(r"[\s().:]", "", str(answer)).upper()
    right = {letter for letter in letters if letter.upper() == named}
    if not right:
        right = {letter for letter, text in zip(letters, texts) if text.strip() == str(answer).strip()}
        if isinstance(answer, int) and 0 <= answer < len(letters):
            right.add(letters[answer])  # MMLU's index
    if len(right) != 1:
        raise RowError(f"answer is {'several' if right else 'none'} of its choices", f": {answer!r:.60}")
    return "\n".join([question, *lines]), right.pop()
