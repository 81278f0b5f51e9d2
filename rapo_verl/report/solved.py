"""Which problems were solved at all, by which of two models, and what that proves. Pure functions of counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class SignTest(NamedTuple):
    """Problems solved by exactly one of two models, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


class CoverageDifference(NamedTuple):
    """Ids (or indices) of the problems that one of two models solved and the other did not."""

    only_a: tuple[Any, ...]
    only_b: tuple[Any, ...]


def sign_test(solved_a: ArrayLike, solved_b: ArrayLike) -> SignTest:
    """Return the exact two-sided sign test on the problems that exactly one model solved.

    With m such problems, ``p = min(1, 2 * sum_{i <= min(a, b)} C(m, i) / 2^m)``, in exact integers; 1 where m = 0. 5-0
    gives 0.0625 and 6-0 gives 0.03125: six to none is the least that reaches p < 0.05 on two sides. Both arguments have
    shape (P,), boolean or counts (above 0 is solved).

    Raises:
        ValueError: Different lengths.
    """
    a, b = np.asarray(solved_a) > 0, np.asarray(solved_b) > 0
    _same_length(a, b)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    m = only_a + only_b
    tail = sum(math.comb(m, i) for i in range(min(only_a, only_b) + 1))
    return SignTest(only_a, only_b, min(1.0, 2 * tail / 2**m))


def coverage_difference(
    correct_a: ArrayLike, correct_b: ArrayLike, ids: Sequence[Any] | None = None
) -> CoverageDifference:
    """Return the problems solved (c > 0) only by a and those solved only by b, by their ids, or indices without ids.

    Raises:
        ValueError: Different lengths.
    """
    a, b = np.asarray(correct_a) > 0, np.asarray(correct_b) > 0
    _same_length(a, b)
    names = range(len(a)) if ids is None else ids
    _same_length(a, names)
    return CoverageDifference(
        tuple(name for name, only in zip(names, a & ~b, strict=True) if only),
        tuple(name for name, only in zip(names, b & ~a, strict=True) if only),
    )


def hard_mask(correct_base_draw: ArrayLike) -> NDArray[np.bool_]:
    """Return which problems are Hard: the base model got none right (c = 0) in the draw given.

    That ONE draw chooses, and only chooses. Every model, the base too, is then scored on a fresh draw: on the choosing
    draw the base would score 0 by construction, and a difference to it would be regression to the mean.

    Args:
        correct_base_draw: Right samples of the base in a draw that serves no other purpose, shape (P,).
    """
    return np.asarray(correct_base_draw) == 0


def _same_length(a: Any, b: Any) -> None:
    if len(a) != len(b):
        raise ValueError(f"both must cover the same problems; got {len(a)} and {len(b)}")
