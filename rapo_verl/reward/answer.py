r"""Reads answers as text: the last ``\boxed{}``, integers, and what a parser of formulas would lose."""

import re
from functools import lru_cache

from rapo_verl.reward.verdict import Verdict

# Longest text after the last "\boxed{" that is searched for its closing brace, in characters.
MAX_BOX = 4096
# ASCII digits only: \d would take other scripts' digits, int() as well.
_INTEGER = re.compile(r"\s*([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\s*")


def last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` holds, braces matched, or None if there is none or it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin, min(len(text), begin + MAX_BOX)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            if depth == 0:
                return text[begin:i]
            depth -= 1
    return None


def parse_integer(text: str) -> int | None:
    """Return the integer that ``text`` is (thousands separators and leading zeros allowed), or None."""
    match = _INTEGER.fullmatch(text)
    if match is None or len(match[2]) > 1000:
        return None
    return int(match[1] + match[2].replace(",", ""))


def verify_integer(response: str, ground_truth: str) -> tuple[Verdict, str | None]:
    """Return the verdict (correct, wrong or no_box) on a response, and the text of its last box; integers only.

    Args:
        response: the model's text.
        ground_truth: a decimal integer.

    Raises:
        ValueError: ``ground_truth`` is not an integer.
    """
    gold = parse_integer(ground_truth)
    if gold is None:
        raise ValueError(f"ground truth {ground_truth!r} is not an integer")
    box = last_boxed(response)
    if box is None:
        return Verdict.no_box, None
    return (Verdict.correct if parse_integer(box) == gold else Verdict.wrong), box


_WHITESPACE = re.compile(r"\s+")
# Spacing commands mean nothing; "{,}" is how TeX writes a separator without space.
_SPACING = re.compile(r"(?<!\\)\\[,!;: ]|~|\\(?:left|right|displaystyle|quad|qquad|bigl|bigr|big|Big)(?![A-Za-z])")
# A space that groups digits by three, or closes up after a comma.
_GROUPING = re.compile(r"(?<=[0-9])(?:\\[,;: ]|~| )(?=[0-9]{3}(?![0-9]))|(?<!\\)\\!")
# "1,\!234": MATH's way to write thousands, which no list is written in.
_THOUSANDS = re.compile(r"(?<=[0-9]),\\!(?=[0-9]{3})")
_MATH_MODE = re.compile(r"\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_DEGREES = re.compile(r"\^(?:\\circ|\{\\circ\})|\\degree|°")
_PERCENT = re.compile(r"(.*[0-9}]) ?(?:\\?%|\\text\{(?:%|\\%|percent)\})", re.DOTALL)
_BASE = re.compile(r"([0-9A-Fa-f]+)_(?:\{([2-9]|[1-9][0-9]+)\}|([2-9]))")
# A number or closing bracket, then words: \text{...} with an exponent, or bare.
# Two numbers side by side, which math-verify adds ("4 2": 6); "\\frac 1 2" is another thing.
_JUXTAPOSED = re.compile(r"(?<!frac )(?<!frac)(?<![0-9._^])[0-9.]+ [0-9.]")
# What math-verify drops or lets pass: a factorial sign after a line break or before a digit, and a zero denominator.
_NONSENSE = re.compile(r"\\\\ ?!|(?<!\\)![0-9]|\\frac ?(?:\{[^{}]*\}|[0-9]) ?(?:\{0+\}|0)")
_SUBSCRIPT = re.compile(r"[0-9]+_")
_UNIT = re.compile(
    r"(.*(?:[0-9)}]|\\circ|\\pi)) ?(?:\\(?:text|textnormal|textrm|mathrm|mbox|rm) ?\{ ?([^{}]*?) ?\}|([A-Za-z. ]+))"
    r"(?: ?\^ ?\{?([23])\}?)?",
    re.DOTALL,
)
_TEXT = re.compile(r"\\(?:text|textnormal|textrm|textbf|mathrm|mathbf|mbox|rm) ?\{([^{}]*)\}")
_TRIG_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\^(?:\\circ|\{\\circ\})")
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
# Spellings of units; words in \text that are none of them are dropped, but not known to differ.
_SPELLINGS = {
    **dict.fromkeys(("mm", "millimeter", "millimeters"), "mm"),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), "cm"),
    **dict.fromkeys(("m", "meter", "meters"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometers"), "km"),
    **dict.fromkeys(("in", "inch", "inches"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"),
    **dict.fromkeys(("mi", "mile", "miles"), "mi"),
    **dict.fromkeys(("s", "sec", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "d"),
    **dict.fromkeys(("cent", "cents"), "cent"),
    **dict.fromkeys(("dollar", "dollars"), "dollar"),
    **dict.fromkeys(("degree", "degrees"), "deg"),
    **dict.fromkeys(("radian", "radians"), "rad"),
    "am": "am",
    "pm": "pm",
}


@lru_cache(maxsize=1 << 15)
def normalize(text: str) -> str:
    r"""Return an answer without what has no meaning: math mode, spacing, a final dot, a dollar sign, ``{,}``, a ``−``.

    Idempotent, and the same for golds and boxes, so that it cannot favour one of them.
    """
    previous = None
    while text != previous:
        previous = text
        text = (
            text.replace("\u2212", "-")
            .replace("{,}", ",")
            .replace("{, }", ",")
            .replace("\\dfrac", "\\frac")
            .replace("\\tfrac", "\\frac")
        )
        text = _WHITESPACE.sub(" ", _SPACING.sub(" ", _GROUPING.sub("", _THOUSANDS.sub("", text)))).strip()
        match = _MATH_MODE.fullmatch(text)
        if match is not None and "$" not in (match[1] or ""):
            text = next(group for group in match.groups() if group is not None)
        text = text.removeprefix("\\$").removesuffix(".")
    return text


def quick_verdict(gold: str, box: str) -> Verdict | None:
    """Return the verdict on a box that needs no algebra, else None; both as `normalize` leaves them.

    Integers are compared as integers, a degree sign dropped; the same text is the same answer; nothing is no answer.
    """
    want = parse_integer(_DEGREES.sub("", gold)) if gold else None
    if want is not None:
        got = parse_integer(_DEGREES.sub("", box))
        if got is not None:
            return Verdict.correct if got == want else Verdict.wrong
        # Neither digit, command nor operator: no integer, and words are not read.
        if not any(character.isdigit() or character in "\\" for character in box):
            return Verdict.wrong
    if not box:
        return Verdict.wrong
    return Verdict.correct if box == gold else None


def conflict(gold: str, box: str) -> bool:
    r"""Return whether the texts differ in what math-verify 0.9.0 throws away while it parses.

    The base of a numeral (``120_7``, ``120_8``), a known unit (5 cm, 5 m) where both have one, order (``\{1,2\}`` is no
    ordered pair), the number of answers ("7, 7" is no 7), that "4 2" is no sum, and what is no answer at all (0/0, !5).
    """
    bases = [_BASE.fullmatch(text) for text in (gold, box)]
    if bases[0] and bases[1] and (bases[0][2] or bases[0][3]) != (bases[1][2] or bases[1][3]):
        return True
    if any(_SUBSCRIPT.search(text) and base is None for text, base in zip((gold, box), bases)):
        return True
    units = [_split_unit(text)[1] for text in (gold, box)]
    if units[0] and units[1] and units[0] != units[1]:
        return True
    if any(map(_JUXTAPOSED.search, (gold, box))) or any(map(_NONSENSE.search, (gold, box))):
        return True
    kinds = {_delimiter(gold), _delimiter(box)}
    if kinds == {"set", "ordered"}:
        return True
    one, many = (gold, box) if parse_integer(gold) is not None else (box, gold)
    return parse_integer(one) is not None and (
        _delimiter(many) in ("list", "ordered") or ("," in many[2:-2] and "set" in kinds)
    )


def _split_unit(text: str) -> tuple[str, tuple[str, str] | None]:
    r"""Return a quantity without its unit, and the unit as (name, power) if it is one of `_SPELLINGS`.

    Words in ``\text`` after a number are taken for a unit; bare letters only if they spell one, for ``3t`` is no 3.
    """
    match = _UNIT.fullmatch(text)
    if match is None:
        return text, None
    words = (match[2] or match[3] or "").replace(".", "").lower().split()
    power = {"square": "2", "sq": "2", "cubic": "3"}.get(words[0]) if len(words) == 2 else None
    name = _SPELLINGS.get(words[-1]) if words and (len(words) == 1 or power) else None
    if name is None or (match[2] is None and len(words[-1]) == 1):
        return (text if match[2] is None else match[1]), None
    return match[1], (name, match[4] or power or "1")


def _delimiter(text: str) -> str | None:
    r"""Return "ordered" for ``(a, b)``, "set" for ``\{a, b\}``, "list" for ``a, b``, None for anything else."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    depth, commas, closed_early = 0, 0, False
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        commas += character == "," and depth == 0
        closed_early |= depth == 0 and i + 1 < len(text)
    if text.startswith("(") and text.endswith(")") and not closed_early and "," in text:
        return "ordered"
    return "list" if commas and parse_integer(text) is None else None


def comparable(gold: str, box: str) -> list[tuple[str, str]]:
    """Return the pairs of texts of which one must be equal for the answers to be; both as `normalize` leaves them.

    A unit is dropped, as a question that names one asks for the number: "5 cm" and "5" are the same answer. A list
    without brackets takes those of the other side, so that order counts where it has a meaning. "70%" stands for 0.7,
    and for 70 where a question asked for percent: both readings are tried.
    """
    if {_delimiter(gold), _delimiter(box)} == {"list", "ordered"}:
        gold, box = (text if _delimiter(text) == "ordered" else f"({text})" for text in (gold, box))
    gold, box = (_radians(_split_unit(text)[0]) for text in (gold, box))
    percents = [_PERCENT.fullmatch(gold), _PERCENT.fullmatch(box)]
    if percents[0] and percents[1]:
        return [(percents[0][1], percents[1][1])]
    if percents[0]:
        return [(percents[0][1], box), (f"\\frac{{{percents[0][1]}}}{{100}}", box)]
    if percents[1]:
        return [(gold, percents[1][1]), (gold, f"\\frac{{{percents[1][1]}}}{{100}}")]
    return [(gold, box)]


def _radians(text: str) -> str:
    """Return the text with degrees turned into radians if it takes a trigonometric function of them."""
    return _TRIG_DEGREES.sub(r"{(\\frac{\1\\pi}{180})}", text) if _TRIG.search(text) else text


def same_words(gold: str, box: str) -> bool:
    """Return whether two answers that are no formulas are the same but for case, spaces and fonts."""
    return _words(gold) == _words(box)


def _words(text: str) -> str:
    return _WHITESPACE.sub("", _TEXT.sub(r"\1", text)).lower()
