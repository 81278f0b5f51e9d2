r"""Takes an answer apart: lists, sets and tuples, named values, equations, units. What is left are formulas.

A parser of formulas loses these: math-verify 0.9.0 reads ``1,1,2`` as a set, the last side of ``x=41=42``, letters as
units. Everything here works on text as `answer.normalize` leaves it.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product


@dataclass(frozen=True)
class Value:
    """A formula or words, with the unit as (name, power), a percent sign and the base of a numeral apart."""

    text: str
    unit: tuple[str, str] | None = None
    percent: bool = False
    base: str | None = None

    def __str__(self) -> str:
        unit = f", unit {'^'.join(self.unit)}" if self.unit else ""
        return self.text + unit + ", percent" * self.percent + (f", base {self.base}" if self.base else "")


@dataclass(frozen=True)
class Equation:
    """Sides that are to be equal; `name`: the first one where it only names the value (``m+n``, ``f(2)``)."""

    sides: tuple["Answer", ...]
    name: str | None = None
    about: bool = False

    def __str__(self) -> str:
        sides = " = ".join(side.text if isinstance(side, Value) else str(side) for side in self.sides)
        return f"value named {self.name} ({sides})" if self.name else f"equation {sides}"


@dataclass(frozen=True)
class Many:
    """Several answers: a "list", a "set", an ordered "tuple", or conditions joined by "and" or "or"."""

    kind: str
    items: tuple["Answer", ...]

    def __str__(self) -> str:
        return f"{self.kind} of {len(self.items)}: {', '.join(map(str, self.items))}"


@dataclass(frozen=True)
class Condition:
    """An inequality of one or more variables."""

    text: str

    def __str__(self) -> str:
        return f"inequality {self.text}"


Answer = Value | Equation | Many | Condition

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN, _CLOSE = frozenset(["(", "[", "{", "\\{", "\\begin"]), frozenset([")", "]", "}", "\\}", "\\end"])
_COMMA = re.compile(
    r" ?(?:[,;] ?(?:\\text ?\{ ?(?:and|or) ?\}|(?:and|or)(?= ))?|\\text ?\{ ?(?:and|or) ?\}|(?<= )(?:and|or)(?= )) ?"
)
_EQUALS = re.compile(r" ?(?:(?<![<>!:])=|\\approx(?![A-Za-z])|\\in(?![A-Za-z])) ?")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_ORDER = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![A-Za-z])")
_BUILDER = re.compile(r"\\\{ ?[A-Za-z](?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?::|\\mid(?![A-Za-z])|\|)(.*)\\\}", re.DOTALL)
# The only commas are those of one number's thousands.
_THOUSANDS = re.compile(r"([^0-9,(\[{]*)([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9,])([^,]*)", re.DOTALL)
_INTRODUCED = re.compile(r"\\text ?\{[^{}]*(?:\b(?:is|are|equals)|:) ?\} ?|\\approx(?![A-Za-z]) ?")

_MIXED = re.compile(r"(-?)([0-9]+) ([0-9]+) ?/ ?([0-9]+)")
_SCIENTIFIC = re.compile(r"([-+]?[0-9]*\.?[0-9]+)[eE]([-+]?[0-9]+)")
_BASE = re.compile(
    r"\(?([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\)?_"
    r"(?:\{ ?([2-9]|[1-9][0-9]+) ?\}|([2-9])(?![0-9])|\{? ?\\text ?\{([a-z]+)\} ?\}?)"
)
_ORDINAL = re.compile(r"([0-9]+) ?\^? ?\{? ?(?:\\text ?\{ ?(?:st|nd|rd|th) ?\}|(?:st|nd|rd|th)) ?\}?")
_PERCENT = re.compile(r"(.*[0-9}]) ?(?:\\?%|\\text ?\{ ?(?:\\?%|percent) ?\}|percent)", re.DOTALL)
_UNIT = re.compile(
    r"(.*(?:[0-9)}]|\\pi|\\infty)) ?"
    r"(?:\\text ?\{([^{}]*)\}|([A-Za-z.]+(?: [A-Za-z.]+)*)|\^\\circ ?(?:\\text ?\{ ?([CF]) ?\}|([CF]?)))"
    r"(?: ?\^ ?\{?([23])\}?)?",
    re.DOTALL,
)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_NUMBERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# After a number they make it another answer: "42 or more", "5 squared", "10 minus 3".
_CHANGING = re.compile(
    r"\b(?:or|and|more|less|least|most|over|under|above|below|not|no|nor|non|than|to|plus|minus|times|by|squared|cubed"
    r"|factorial|divided|mod|modulo|point|half|halves|thirds?|quarters?|tenths?|hundredths?|of|through|except|between"
    r"|negative|positive|if|when|unless|zero|one|two|three|four|five|six|seven|eight|nine|ten)\b"
)
# Spellings of units; words that are none of them are dropped, but not known to differ.
_UNITS = {
    spelling: row.split()[0]
    for row in (
        "mm millimeter millimeters", "cm centimeter centimeters", "m meter meters metre metres",
        "km kilometer kilometers",
        "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "s sec second seconds",
        "min minute minutes",
        "h hr hour hours", "day days", "week weeks", "year years", "g gram grams", "kg kilogram kilograms",
        "L l liter liters litre litres", "ml mL milliliter milliliters",
        "cent cents ¢", "dollar dollars", "deg degree degrees",
        "rad radian radians", "am", "pm", "C celsius", "F fahrenheit", "mph", "kmh", "N", "J", "W", "K", "A", "V",
    )
    for spelling in row.split()
}  # fmt: skip


def readings(text: str) -> list[Answer]:
    r"""Return what an answer may mean: several where it has two ``\pm``, which may or may not go together."""
    apart = len(_PLUS_MINUS.findall(text)) in (2, 3, 4) and "\\mp" not in text
    return [read(text, apart=False)] + ([read(text, apart=True)] if apart else [])


@lru_cache(maxsize=1 << 12)
def read(text: str, *, apart: bool = False) -> Answer:
    """Return the parts of an answer, as `normalize` leaves it."""
    while text.startswith("{") and _encloses(text, 1):
        text = text[1:-1].strip()
    if (match := _INTRODUCED.match(text)) and not re.search(r"\bnot?\b|n't", match[0]):
        text = text[match.end() :]
    if match := _THOUSANDS.fullmatch(text):
        text = match[1] + match[2].replace(",", "") + match[3]
    if match := _BUILDER.fullmatch(text):
        return read(match[1].strip())
    parts, separators = _split(text, _COMMA)
    if len(parts) > 1:
        items = tuple(item for part in parts for item in _read_one(part, apart))
        words = {word for separator in separators for word in ("and", "or") if word in separator}
        joined = words.pop() if len(words) == 1 and any(isinstance(item, Condition) for item in items) else "list"
        return Many(joined, items)
    items = tuple(_read_one(text, apart))
    return items[0] if len(items) == 1 else Many("list", items)


def _read_one(text: str, apart: bool) -> list[Answer]:
    r"""Return the answers that a part without commas is: two for ``\pm``."""
    if text.startswith("\\{") and _encloses(text, 2):
        inside = text[2:-2].strip()
        content = read(inside, apart=apart) if inside else Many("list", ())
        items = content.items if isinstance(content, Many) and content.kind == "list" else (content,)
        return [Many("set", items)]
    count = len(_PLUS_MINUS.findall(text))
    if 0 < count <= 4:
        found = []
        for choice in product("+-", repeat=count) if apart else ("+" * count, "-" * count):
            signs = iter(choice)
            turned = {"\\pm": {"+": "+", "-": "-"}, "\\mp": {"+": "-", "-": "+"}}
            variant = _PLUS_MINUS.sub(lambda sign: turned[sign[0]][next(signs)], text)  # noqa: B023  used at once
            found += _read_one(re.sub(r"^ ?\+ ?", "", variant), apart)
        return found
    if text.startswith("(") and _encloses(text, 1):
        parts, _ = _split(text[1:-1], _COMMA)
        if len(parts) > 1:
            return [Many("tuple", tuple(read(part.strip()) for part in parts))]
    return _read_relation(text)


def _read_relation(text: str) -> list[Answer]:
    if _split(text, _ORDER)[1]:
        return [Condition(text)]
    parts, signs = _split(text, _EQUALS)
    parts = [part.strip() for part in parts]
    if len(parts) == 1 or not all(parts):
        return [_read_value(text.strip())]
    if not is_name(parts[0]) and is_name(parts[-1]):
        parts.reverse()
    names, values = read(parts[0]), read(parts[-1])
    if len(parts) == 2 and isinstance(names, Many) and isinstance(values, Many):
        # (x,y)=(2,3)
        letters = [name.text for name in names.items if isinstance(name, Value) and is_name(name.text)]
        if len(letters) == len(names.items) == len(values.items):
            pairs = zip(letters, names.items, values.items)
            return [Many("tuple", tuple(Equation((name, value), letter) for letter, name, value in pairs))]
    about = any("approx" in sign for sign in signs)
    return [Equation(tuple(map(read, parts)), parts[0] if is_name(parts[0]) else None, about)]


def _read_value(text: str) -> Value:
    if match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        return Value(f"{sign}\\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}")
    if match := _SCIENTIFIC.fullmatch(text):
        return Value(f"{match[1]}\\cdot 10^{{{match[2]}}}")
    if (match := _BASE.fullmatch(text)) and (not match[4] or match[4] in _BASES):
        return Value(match[1].lstrip("0") or "0", base=match[2] or match[3] or _BASES[match[4]])
    if match := _PERCENT.fullmatch(text):
        return Value(match[1].strip(), percent=True)
    if match := _ORDINAL.fullmatch(text):
        return Value(match[1])
    if re.match(r"-? ?\\?\$ ?-?[0-9.]", text):
        inner = _read_value(re.sub(r"\\?\$ ?", "", text, count=1))
        return inner if inner.unit else Value(inner.text, ("dollar", "1"))
    if _TRIG.search(text):
        return Value(re.sub(r"([0-9]+(?:\.[0-9]+)?)\^\\circ", r"(\\frac{\1\\pi}{180})", text))
    return _split_unit(text)


def _split_unit(text: str) -> Value:
    r"""Return a quantity without its unit.

    Words in ``\text`` after a number are taken for a unit; bare letters only if they spell one, for ``3t`` is no 3.
    """
    match = _UNIT.fullmatch(text)
    if match is None:
        return Value(text)
    if match[2] is None and match[3] is None:
        return Value(match[1], ("deg", match[4] or match[5] or "1"))
    bare, number = match[3], match[1]
    words = (match[2] or bare).replace(".", "").split()
    while words and (words[0].lower() in _NUMBERS or words[0].lower() == "dozen"):
        factor = "12" if words[0].lower() == "dozen" else f"10^{{{_NUMBERS[words[0].lower()]}}}"
        number, words = f"({number})\\cdot {factor}", words[1:]
    if not words:
        return Value(number)
    if words[0].lower() == "degrees" and len(words) == 2 and words[1].lower() in _UNITS:
        words = words[1:]
    power = _POWERS.get(words[0].lower()) if len(words) == 2 else None
    name = None
    if len(words) == 1 or power:
        last = words[-1]
        name = _UNITS.get(last) or (_UNITS.get(last.lower()) if len(last) > 1 else None)
    if bare and (name is None or len(words[-1]) == 1):
        return Value(text if number == match[1] else number)
    if name is not None:
        return Value(number, (name, match[6] or power or "1"))
    changes = _CHANGING.search(" ".join(words).lower())
    plain = all(re.fullmatch(r"[A-Za-z'/()-]+", word) for word in words)
    return Value(number if plain and not changes else text)


def is_name(text: str) -> bool:
    r"""Return whether a side of an equation only names the value: a letter, ``f(2)``, ``\det A``, ``100m+n``, words.

    A combination of letters does (problems ask for it), unless x, y or z stand with a number: an equation to be solved.
    """
    if re.fullmatch(r"\\text ?\{.*\}|[A-Za-z]{2,}(?: [A-Za-z]+)*|[A-Za-z]'* ?(?:\^ ?\{-1\} ?)?\([^()]*\)", text):
        return True
    if re.match(r"\\(?:det|gcd|deg|max|min|dim|angle|triangle|text)(?![A-Za-z])", text):
        return True
    bare = re.sub(
        r"_ ?(?:\{[^{}]*\}|[A-Za-z0-9])", "", re.sub(r"\\(?:frac|sqrt|cdot|times|text ?\{[^{}]*\})", "", text)
    )
    letters = re.findall(r"\\[A-Za-z]+|[A-Za-z]", bare)
    unknown = any(letter in "xyz" for letter in letters) and any(character.isdigit() for character in bare)
    constants = {"e", "i", "\\pi", "\\infty", "\\ln", "\\log", "\\sin", "\\cos", "\\tan"}
    return bool(set(letters) - constants) and not unknown


def _encloses(text: str, width: int) -> bool:
    """Return whether the bracket that opens a text closes at its end only."""
    closing = {"(": ")", "{": "}", "\\{": "\\}"}[text[:width]]
    return text.endswith(closing) and not any(depth == 0 for end, depth in _depths(text) if end < len(text))


def balanced(text: str) -> bool:
    """Return whether every bracket of a text has its partner, whatever its kind: ``[1,2)`` is an interval."""
    depths = [depth for _, depth in _depths(text)]
    return min(depths, default=0) >= 0 and depths[-1:] in ([], [0])


def _depths(text: str) -> list[tuple[int, int]]:
    found, depth = [], 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        found.append((token.end(), depth))
    return found


def _split(text: str, separator: re.Pattern) -> tuple[list[str], list[str]]:
    """Return the parts of a text between separators outside all brackets, and the separators."""
    outside = {0} | {end for end, depth in _depths(text) if depth == 0}
    parts, found, begin = [], [], 0
    for match in separator.finditer(text):
        if match.start() in outside and match.start() >= begin and match[0].strip():
            parts.append(text[begin : match.start()].strip())
            found.append(match[0])
            begin = match.end()
    return [*parts, text[begin:].strip()], found
