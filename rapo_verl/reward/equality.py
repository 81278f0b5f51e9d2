"""Whether two answers are equal, part by part. May hang or run out of memory: `nursery` runs it."""

import re
from itertools import pairwise
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from rapo_verl.reward.answer import normalize
from rapo_verl.reward.formula import UNSOLVED, formula, ratio, same_formula, same_object, same_set
from rapo_verl.reward.reading import Answer, Condition, Equation, Many, Value, balanced, read, readings

_RANGE = re.compile(r"[\[(].*,.*[\])]|\\cup|\\mathbb|\\emptyset", re.DOTALL)


# What math-verify reads and nobody means: two numbers side by side ("4 2": it adds them; "\frac 1 2" is another thing),
# a factorial sign after a line break or before a digit, a zero denominator, a base of two digits (it drops these).
_NONSENSE = re.compile(
    r"(?<!frac )(?<!frac)(?<![0-9._^])[0-9.]+ [0-9.]|\\\\ ?!|(?<!\\)![0-9]"
    r"|\\frac ?(?:\{[^{}]*\}|[0-9]) ?(?:\{0+\}|0)|[0-9]_"
)


def equal(gold: str, box: str) -> bool:
    """Return whether two answers, as `answer.normalize` leaves them, are equal in some reading of each."""
    return gold == box or any(_same(a, b) for a in readings(gold) for b in readings(box))


def kind_of(gold: str) -> str:
    """Return "expression", "string" (right only in the same words) or "nothing": what an answer is read as."""
    answer = read(gold)
    if isinstance(answer, Value) and answer.base is None and formula(answer.text) is None:
        return "string" if _words_of(answer.text) else "nothing"
    return "expression"


def _same(a: Answer, b: Answer) -> bool:
    if isinstance(a, Equation) or isinstance(b, Equation):
        return _same_equation(a, b)
    if isinstance(a, Value) and isinstance(b, Value):
        return _same_value(a, b)
    if isinstance(a, Many) and isinstance(b, Many) and _same_items(a, b):
        return True
    if isinstance(a, Condition) and isinstance(b, Condition) and _same_condition(a, b):
        return True
    return _is_range(a) and _is_range(b) and _same_range(a, b)


def _same_items(a: Many, b: Many) -> bool:
    kinds = {a.kind, b.kind}
    if kinds == {"set", "tuple"} or not (len(kinds) == 1 or kinds <= {"list", "set", "tuple"}):
        return False
    if kinds == {"set"}:
        return all(any(_same(x, y) for y in b.items) for x in a.items) and all(
            any(_same(x, y) for x in a.items) for y in b.items
        )
    if len(a.items) != len(b.items):
        return False
    named = [_by_name(x) for x in (a, b)]
    if (named[0] is None) != (named[1] is None):
        # "x=2, y=3" is (2,3), and "y=2, x=3" is not.
        return all(map(_same, named[0] or a.items, named[1] or b.items))
    if "tuple" in kinds and named[0] is None:
        return all(map(_same, a.items, b.items))
    left = list(b.items)
    for item in a.items:
        found = next((i for i, other in enumerate(left) if _same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _by_name(many: Many) -> list[Answer] | None:
    """Return the values in the order of their names, if each has one of its own."""
    named = {item.name: item.sides[-1] for item in many.items if isinstance(item, Equation) and item.name}
    return [named[name] for name in sorted(named)] if len(named) == len(many.items) > 1 else None


def _same_equation(a: Answer, b: Answer) -> bool:
    if isinstance(a, Equation) and isinstance(b, Equation):
        if not (_holds(a) and _holds(b)):
            return False
        if a.name and b.name and _same_name(a.name, b.name):
            return _same(a.sides[-1], b.sides[-1])
        return _same_sides(a, b)
    equation, other = (a, b) if isinstance(a, Equation) else (b, a)
    assert isinstance(equation, Equation)
    # Without letters, it is a true statement about its value: 6*7 = 42.
    if not (equation.name or all(map(_is_number, equation.sides))) or not _holds(equation):
        return False
    values = equation.sides[1:] if equation.name else equation.sides
    return any(_same(value, other) for value in (values if equation.about else values[-1:]))


def _same_name(a: str, b: str) -> bool:
    plain = [re.sub(r"[\s{}]|\\text", "", name) for name in (a, b)]
    return plain[0] == plain[1] or (formula(a) is not None and same_object(formula(a), formula(b)))


def _is_number(a: Answer) -> bool:

    found = formula(a.text) if isinstance(a, Value) else None
    return found is not None and not getattr(found, "free_symbols", True) and not found.has(AppliedUndef)


def _holds(equation: Equation) -> bool:
    """Return whether the values of a chain agree (to one in a hundred where it says so): x = 41 = 42 does not."""
    sides = equation.sides
    if equation.name and not _is_number(sides[0]):
        sides = sides[1:]
    elif not all(map(_is_number, sides)):
        return len(sides) == 2
    return all(_about(x, y) if equation.about else _same(x, y) for x, y in pairwise(sides))


def _about(x: Answer, y: Answer) -> bool:
    if not (_is_number(x) and _is_number(y)):
        return _same(x, y)
    a, b = (complex(formula(side.text).doit().evalf(15)) for side in (x, y))  # type: ignore[union-attr]
    return abs(a - b) <= 0.01 * max(abs(a), abs(b))


def _same_sides(a: Equation, b: Equation) -> bool:
    sides: list[Any] = [formula(side.text) if isinstance(side, Value) else None for side in a.sides + b.sides]
    if len(sides) != 4 or any(side is None for side in sides):
        return a.sides == b.sides
    p, q, r, s = sides
    try:
        first, second = p - q, r - s
        if not p.free_symbols | q.free_symbols or not r.free_symbols | s.free_symbols:
            # Numbers: the same statement, not any two true ones.
            return (p, q) in ((r, s), (s, r))
        return ratio(first, second) is not None or _same_solutions(first, second)
    except UNSOLVED:
        return False


def _same_solutions(a: Any, b: Any) -> bool:
    """Return whether a = 0 and b = 0 have the same solutions for one of their letters."""
    letters = {symbol.name: symbol for symbol in a.free_symbols}
    if not letters or set(letters) != {symbol.name for symbol in b.free_symbols}:
        return False
    b = b.subs({symbol: letters[symbol.name] for symbol in b.free_symbols})
    for name in sorted(letters):
        first, second = sympy.solve(a, letters[name]), sympy.solve(b, letters[name])
        if first and len(first) == len(second):
            return all(any(same_object(x, y) for y in second) for x in first)
    return False


def _same_condition(a: Condition, b: Condition) -> bool:
    first, second = formula(a.text), formula(b.text)
    if not (isinstance(first, Relational) and isinstance(second, Relational)):
        return bool(first is not None and first == second)
    turned = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
    kinds = [turned.get(type(x), type(x)) for x in (first, second)]
    sides = [x.rhs - x.lhs if type(x) in turned else x.lhs - x.rhs for x in (first, second)]
    factor = ratio(*sides) if kinds[0] is kinds[1] else None
    return factor is not None and bool(factor.is_positive or (kinds[0] is sympy.Ne and factor))


def _is_range(a: Answer) -> bool:
    """Return whether an answer may be a set of numbers: an inequality or several, an interval, a union."""
    if isinstance(a, Many):
        return (a.kind == "tuple" and len(a.items) == 2) or all(map(_is_range, a.items))
    return isinstance(a, Condition) or (isinstance(a, Value) and _RANGE.search(a.text) is not None)


def _same_range(a: Answer, b: Answer) -> bool:
    names = [_letters(x) for x in (a, b)]
    if names[0] and names[1] and names[0] != names[1]:
        return False
    try:
        first, second = _set(a), _set(b)
    except UNSOLVED:
        return False
    return first is not None and second is not None and same_set(first, second)


def _letters(a: Answer) -> set[str]:
    if isinstance(a, Many):
        return set().union(*map(_letters, a.items))
    found = formula(a.text) if isinstance(a, Condition) else None
    return {symbol.name for symbol in getattr(found, "free_symbols", ())}


def _set(a: Answer) -> Any | None:

    if isinstance(a, Condition):
        found: Any = formula(a.text)
        parts = found.args if isinstance(found, sympy.And) else (found,)
        return sympy.Intersection(*(part.as_set() for part in parts))
    if isinstance(a, Value):
        found = formula(a.text)
        return found if isinstance(found, sympy.Set) else None
    if not isinstance(a, Many):
        return None
    if a.kind == "tuple":
        interval = sympy.Interval.open(*(formula(item.text).doit() for item in a.items))  # type: ignore[union-attr]
        return None if interval.is_empty else interval
    parts = [_set(item) for item in a.items]
    if not parts or any(part is None for part in parts):
        return sympy.S.EmptySet if not parts else None
    # A comma may mean either: "x<2, x>3" has no common part, "x>2, x<3" has.
    both = sympy.Intersection(*parts)
    return sympy.Union(*parts) if a.kind == "or" or (a.kind == "list" and both.is_empty) else both


def _same_value(gold: Value, box: Value) -> bool:
    if gold.unit and box.unit and gold.unit != box.unit:
        return False
    if gold.base or box.base:
        # The question names the base, so the answer may leave it out; it may not bring one in.
        return (
            gold.text.lower() == box.text.lstrip("0").lower()
            and gold.base is not None
            and box.base in (None, gold.base)
        )
    if gold.percent != box.percent:
        whole, share = (gold.text, box.text) if box.percent else (box.text, gold.text)
        return _same_text(whole, share) or _same_text(whole, f"\\frac{{{share}}}{{100}}")
    return _same_text(gold.text, box.text)


def _same_text(a: str, b: str) -> bool:
    if any(_NONSENSE.search(text) or not balanced(text) for text in (a, b)):
        return False
    if a == b:
        return True
    if formula(a) is None or formula(b) is None:
        return _words_of(a) == _words_of(b) != ""
    return same_formula(a, b)


def _words_of(text: str) -> str:
    """Return an answer that is no formula without case, spaces and fonts."""
    return re.sub(r"\s+", "", re.sub(r"\\text ?\{([^{}]*)\}", r"\1", normalize(text))).strip("()").lower()
