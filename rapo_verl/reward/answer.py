r"""Reads answers as text: the last ``\boxed{}``, integers, and what has no meaning. All of it linear in the text."""

import re
from collections.abc import Callable
from functools import lru_cache

from rapo_verl.reward.verdict import Verdict

# Longest box, and longest right answer, in characters.
MAX_BOX = 4096
# ASCII digits only: \d would take other scripts' digits, int() as well.
_INTEGER = re.compile(r"\s*([+-]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\s*")
# In a text: not inside a word or a number; a minus after one is an operation. A decimal is matched whole: no integer.
_NUMBER = re.compile(r"(?<![0-9A-Za-z).])[+-]?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_BOX = re.compile(r"\\boxed(?![A-Za-z])\s*")
# "\boxed 42": what stands there to the next space. A word is none: "as a \boxed answer".
_BARE_BOX = re.compile(r"[-+]?(?:[0-9.,/]*[0-9]|\\[A-Za-z]+(?:\{[^{}\s]*\})*|[A-Za-z](?![A-Za-z]))(?=[\s.,;$)]|$)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` (or ``\boxed 42``) holds, or None if there is none or it never closes.

    Braces are matched; ``\{`` and ``\}`` are characters, of which an array may have one only.
    """
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        end = start
        match = _BOX.match(text, start)
        if match is None:
            continue
        if text[match.end() : match.end() + 1] == "{":
            return _closed(text, match.end() + 1)
        bare = _BARE_BOX.match(text, match.end(), match.end() + MAX_BOX)
        if bare is not None:
            return bare[0]
    return None


def _closed(text: str, begin: int) -> str | None:
    depth = 0
    for brace in _BRACE.finditer(text, begin, begin + MAX_BOX):
        if brace[0] == "}" and depth == 0:
            return text[begin : brace.start()]
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
    return None


def last_number(text: str) -> str | None:
    """Return the last number in a text as it is written there, or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def parse_integer(text: str) -> int | None:
    """Return the integer that ``text`` is (thousands separators and leading zeros allowed), or None."""
    match = _INTEGER.fullmatch(text)
    if match is None or len(match[2]) > 1000:
        return None
    return int(match[1] + match[2].replace(",", ""))


def integer_verdict(ground_truth: str, box: str | None) -> Verdict:
    """Return the verdict (correct, wrong or no_box) where nothing but an integer is ever right."""
    gold = parse_integer(ground_truth)
    if gold is None:
        raise ValueError(f"ground truth {ground_truth[:80]!r} is not an integer")
    if box is None:
        return Verdict.no_box
    return Verdict.correct if parse_integer(box) == gold else Verdict.wrong


def verify_integer(response: str, ground_truth: str) -> tuple[Verdict, str | None]:
    """Return `integer_verdict` on a response, and the text of its last box."""
    box = last_boxed(response)
    return integer_verdict(ground_truth, box), box


# One command or character for what is written in several.
_ALIASES = {
    **{"\u2212": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "÷": "/"},
    "∅": "\\emptyset ",
    **{"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "±": "\\pm ", "∪": "\\cup ", "°": "^\\circ "},
    **{"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leqslant": "\\le", "\\leq": "\\le"},
    **{"\\geqslant": "\\ge", "\\geq": "\\ge", "\\neq": "\\ne", "\\varnothing": "\\emptyset", "\\degree": "^\\circ"},
    **{"\\lbrace": "\\{", "\\rbrace": "\\}", "\\lparen": "(", "\\rparen": ")", "\\land": "\\text{and}"},
    **{"\\lor": "\\text{or}", "\\wedge": "\\text{and}", "\\vee": "\\text{or}", "\\imath": "i", "\\colon": ":"},
}  # fmt: skip
# Letters that are units after a number when they stand upright: "3\mathrm{m}"; any other is a letter: "2\mathrm{i}".
UNIT_LETTERS = frozenset("mshgLlCFNJWKAV")
# Math mode, or bold in Markdown, around a whole answer.
_MATH_MODE = re.compile(r"\$\$?([^$]*)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*([^*]*)\*\*", re.DOTALL)


def _upright(match: re.Match) -> str:
    r"""Return ``\text{...}`` for words and units, what stands in it for anything else."""
    content = " ".join((match[1] or match[2] or "").split())
    number = re.match(r"[-+]?[0-9][0-9.,/]*(?= ?[A-Za-z])", content)
    if number is not None and not content.startswith("\\"):
        return f"{number[0]}\\text{{{content[number.end() :].strip()}}}"
    letter = content.strip(" .")
    after_number = match.string[: match.start()].rstrip(" ~}")[-1:].isdigit()
    if re.search(r"[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", content)) or (letter in UNIT_LETTERS and after_number):
        return f"\\text{{{content}}}"
    if not content:
        return " "
    return f" {content} " if match[0].startswith(("\\mathrm", "\\text", "\\rm")) else content


# What has no meaning, and what stands in its place; each pattern is linear in the text.
_REPLACED: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"√ ?(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))", r"\\sqrt{\1\2}"),
    (rf"\\[A-Za-z]+|[{''.join(key for key in _ALIASES if len(key) == 1)}]", lambda m: _ALIASES.get(m[0], m[0])),
    # A space that groups digits by three, or closes up after a comma; "1,\!234" is MATH's way to write thousands.
    (r"(?<=[0-9])(?:\\[,;: ]|~| |,\\!)(?=[0-9]{3}(?![0-9]))|(?<!\\)\\!|(?<=[0-9])\{, ?\}(?=[0-9]{3}(?![0-9]))", ""),
    # Commands that only move or size what follows; "\left." and "\right." with their dot.
    (
        r"(?<!\\)\\[,;: ]|(?<!\\)~|\\(?:left|right)\s*\.|\\phantom ?(?:\{[^{}]*\}|[^\\{])"
        r"|\\(?:left|right|displaystyle|textstyle|quad|qquad|limits|[bB]igg?[lrm]?)(?![A-Za-z])",
        " ",
    ),
    (r"\{, ?\}", ","),
    (r"\^ ?(?:\\circ(?![A-Za-z]) ?|\{ ?\\circ ?\})", r"^\\circ "),
    # Fonts; a brace that one opened stays, as TeX allows it.
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal)(?![A-Za-z]) ?(?:(\{)|(?=[A-Za-z0-9\\]))", r"\1"),
    (
        r"\\(?:text|textnormal|textrm|textbf|textit|mathrm|mbox|rm|operatorname)(?![A-Za-z])"
        r" ?(?:\{([^{}]*)\}|([A-Za-z0-9]))",
        _upright,
    ),
)
_PASSES = [(re.compile(pattern), instead) for pattern, instead in _REPLACED]


@lru_cache(maxsize=1 << 13)
def normalize(text: str) -> str:
    r"""Return an answer without what has no meaning: math mode, fonts, sizes, spacing, a final dot, ``{,}``, a ``−``.

    The same for golds and boxes, so that it cannot favour one of them, and idempotent but for nested delimiters.
    """
    if parse_integer(text) is not None:
        return text.strip()
    # One pass takes off what another uncovers. More than four rounds are only needed by nonsense.
    for _ in range(4):
        before = text
        for pattern, instead in _PASSES:
            text = pattern.sub(instead, text)
        text = " ".join(text.split()).rstrip(" .,;").replace("^\\circ ", "^\\circ")
        if match := _MATH_MODE.fullmatch(text):
            text = next(group for group in match.groups() if group is not None).strip()
        if text == before:
            break
    return text


def quick_verdict(gold: str, box: str) -> Verdict | None:
    """Return the verdict on a box that needs no algebra, else None; both as `normalize` leaves them.

    Integers are compared as integers, a degree sign dropped; the same text is the same answer; nothing is no answer.
    """
    want = parse_integer(gold.removesuffix("^\\circ"))
    if want is not None:
        got = parse_integer(box.removesuffix("^\\circ"))
        if got is not None:
            return Verdict.correct if got == want else Verdict.wrong
        # Neither digit nor command: no integer, and words are not read.
        if not any(character.isdigit() or character in "\\√" for character in box):
            return Verdict.wrong
    if not box:
        return Verdict.wrong
    return Verdict.correct if box == gold else None
