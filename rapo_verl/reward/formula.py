"""Formulas and whether they are equal: numbers exactly, expressions at several points, never by an absolute bound."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify.grader import should_treat_as_complex

# What sympy raises on things that it cannot bring together, and on sets and equations that it cannot handle.
UNSOLVED = (
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    sympy.PolynomialError,  # no ValueError
    RecursionError,
    TypeError,
    ValueError,
)
# Digits to which both sides are computed; what agrees in the first is computed to the second. Their difference is
# never looked at by itself: an absolute bound would take 1/2^60 for 1/2^59.
_DIGITS = (40, 1000)
# Letters' values for testing an identity: both signs, no simple relation between them.
_POINTS = ((7, 5, 11), (-19, 13, -5), (31, 3, 23))
# A decimal of so many places, and significant digits, counts as the number that it rounds.
_PLACES = 6
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{ ?([0-9]+) ?\}")
_DECIMAL = re.compile(r"(?<![A-Za-z0-9.])([0-9]*)\.([0-9]+)")
# Arguments without braces, of which the parser takes few: "\sqrt[3]2", "\frac\pi 2".
_ROOT = re.compile(r"(\\sqrt ?\[[^\]]*\]|\\sqrt) ?([0-9]|[A-Za-z]|\\(?:pi|alpha|beta|theta)(?![A-Za-z]))")
_TOP = re.compile(r"\\frac ?([A-Za-z0-9]|\\(?:pi|alpha|beta|theta)(?![A-Za-z])) ?")
_BOTTOM = re.compile(r"(\\frac\{[^{}]*\}) ?([A-Za-z0-9]|\\(?:pi|alpha|beta|theta)(?![A-Za-z]))")
_PLAIN_DECIMAL = re.compile(r"[-+]? ?[0-9]*\.([0-9]+)")


# Numbers that need no parser: 42, 0.5, 3/4, \frac{3}{4}, 3\frac12.
_RATIONAL = re.compile(
    r"(-?) ?(?:([0-9]*\.?[0-9]+)|([0-9]*) ?\\frac ?(?:\{(-?[0-9]+)\}|([0-9])) ?(?:\{([0-9]+)\}|([0-9]))"
    r"|([0-9]+) ?/ ?([0-9]+))"
)


def _rational(text: str) -> Fraction | None:
    match = _RATIONAL.fullmatch(text)
    if match is None:
        return None
    sign, decimal, whole, top, digit, bottom, last, over, under = match.groups()
    if decimal:
        value = Fraction(decimal)
    else:
        below = int(bottom or last or under)
        if below == 0:
            return None
        value = int(whole or 0) + Fraction(int(top or digit or over), below)
    return -value if sign else value


def _fraction(match: re.Match) -> str:
    return f"(\\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}})"


def _repeating(match: re.Match) -> str:
    whole, once, again = match.groups()
    top = int(whole + once + again) - int((whole + once) or "0")
    return f"(\\frac{{{top}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}})"


@lru_cache(maxsize=1 << 12)
def formula(text: str) -> Any | None:
    """Return the sympy object that a text is, None for words and what does not parse; decimals are exact fractions."""
    if "\\text" in text or re.fullmatch(r"[A-Za-z]{4,}|[A-Za-z]{2,}( [A-Za-z]+)+", text):
        return None
    number = _rational(text)
    if number is not None:
        return sympy.Rational(number)
    text = _BOTTOM.sub(r"\1{\2}", _TOP.sub(r"\\frac{\1}", text))
    text = _ROOT.sub(r"\1{\2}", _DECIMAL.sub(_fraction, _REPEATING.sub(_repeating, text)))
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        return latex2sympy(
            normalize_latex(text, config), is_real=not should_treat_as_complex(text), normalization_config=None
        )
    except MemoryError:
        raise
    except Exception:  # the parser raises bare Exceptions on what is no formula
        return None


def same_formula(a: str, b: str) -> bool:
    """Return whether two formulas are equal; a decimal of six or more places also equals what it rounds."""
    first, second = formula(a), formula(b)
    return same_object(first, second) or _rounds(a, first, second) or _rounds(b, second, first)


def _rounds(text: str, decimal: Any, other: Any) -> bool:
    match = _PLAIN_DECIMAL.fullmatch(text)
    if (
        match is None
        or decimal is None
        or len(match[1]) < _PLACES
        or len(re.sub(r"[^0-9]", "", text).lstrip("0")) < _PLACES
    ):
        return False
    value = _value(other, len(text) + 20)
    if value is None or not value.is_real:
        return False
    return bool(abs(value - decimal.doit()) * 2 * 10 ** len(match[1]) <= 1)


def same_object(a: Any, b: Any) -> bool:
    """Return whether two sympy objects are equal: numbers, expressions, matrices or sets of numbers."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(same_object, a, b))
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set):
        return same_set(a, b)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return same_expression(a, b)
    return a is not None and bool(a == b)


def same_expression(a: Any, b: Any) -> bool:
    """Return whether two expressions are equal: whatever values their letters have."""
    if a == b:
        return a not in (sympy.nan, sympy.zoo)
    points = range(len(_POINTS)) if a.free_symbols or b.free_symbols else range(1)
    for digits in _DIGITS:
        for point in points:
            first, second = at_point(a, point, digits), at_point(b, point, digits)
            if first is None or second is None:
                # What has no value to that many digits: a sum that vanishes, an unknown function.
                difference = sympy.simplify(a.doit() - b.doit())
                return bool(difference.is_zero)
            if first.is_infinite or second.is_infinite:
                return bool(first == second)
            if first != second and abs(first - second) > max(abs(first), abs(second)) * 10 ** (5 - digits):
                return False
    return True


def at_point(a: Any, point: int, digits: int = 40) -> Any | None:
    """Return an expression's value with its letters at one of the test points; None: it has no value that is exact."""
    values = {}
    for symbol in a.free_symbols:
        seed = sum(ord(c) * 37**i for i, c in enumerate(symbol.name))
        p, q, r = _POINTS[point]
        values[symbol] = sympy.Rational(p * 997 + r * (seed % 1009), q * 1013 + 4 * (seed % 101))
    return _value(a.subs(values) if values else a, digits)


def _value(a: Any, digits: int) -> Any | None:
    if a is None or not hasattr(a, "doit"):
        return None
    a = a.doit()
    if isinstance(a, sympy.Number) or a in (sympy.oo, -sympy.oo):
        return a if a is not sympy.nan else None
    if a.free_symbols or a is sympy.zoo:
        return None
    try:
        # Strict: every digit is right, or it raises.
        value = a.evalf(digits, maxn=4 * digits, strict=True)
    except UNSOLVED:
        return None
    return (
        value
        if value.is_number and value.is_finite and not value.has(sympy.nan, sympy.zoo) and _numeric(value)
        else None
    )


def _numeric(value: Any) -> bool:
    return all(part.is_Float or part.is_Rational for part in value.as_real_imag())


def ratio(a: Any, b: Any) -> Any | None:
    """Return the constant by which two expressions differ, None if they differ by more."""
    found = []
    for point in range(len(_POINTS)):
        first, second = at_point(a, point), at_point(b, point)
        if not first or not second:
            return None
        found.append((first / second).evalf(40))
    return found[0] if all(abs(r - found[0]) < abs(found[0]) * 1e-30 for r in found) else None


def same_set(a: Any, b: Any) -> bool:
    """Return whether two sets of numbers are equal; ends of intervals are compared as numbers."""
    try:
        a, b = a.doit(), b.doit()
        if a == b:
            return True
        pieces = [x.args if isinstance(x, sympy.Union) else (x,) for x in (a, b)]
        if all(isinstance(piece, sympy.Interval | sympy.FiniteSet) for x in pieces for piece in x):
            return len(pieces[0]) == len(pieces[1]) and all(
                any(map(_same_piece, [p] * len(pieces[1]), pieces[1])) for p in pieces[0]
            )
        return bool((a - b).is_empty and (b - a).is_empty)
    except UNSOLVED:
        return False


def _same_piece(p: Any, q: Any) -> bool:
    if isinstance(p, sympy.FiniteSet) or isinstance(q, sympy.FiniteSet):
        return type(p) is type(q) and len(p) == len(q) and all(any(same_object(x, y) for y in q) for x in p)
    ends = ((p.start, q.start), (p.end, q.end))
    return (p.left_open, p.right_open) == (q.left_open, q.right_open) and all(same_object(x, y) for x, y in ends)
