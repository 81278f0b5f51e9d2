"""What a result refuses to hold."""

import math
import re

import pytest

from rapo_verl.report.study import EvalResult

N = 64
IDS = tuple(f"p{i:02d}" for i in range(28))
EXACT = tuple(i / 28 for i in range(28))


def result(name, **changes):
    fields = {"n": N, "ids": IDS, "groups": ("easy",) * 28, "correct": tuple(range(28)), "exact": EXACT}
    return EvalResult(name, **(fields | {"draw": 3} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"correct": (65,) * len(IDS)}, "correct has 65; allowed: 0..64"),
        ({"correct": (-1,) * len(IDS)}, "correct has -1; allowed: 0..64"),
        ({"correct": (1,)}, "correct has 1 entries, ids 28"),
        ({"sources": ("a",)}, "sources has 1 entries, ids 28"),
        ({"ids": ("a",) * len(IDS)}, "ids must differ"),
        ({"ids": (), "groups": (), "correct": (), "exact": None}, "0 problems; allowed: at least 1"),
        ({"exact": (math.nan,) * len(IDS)}, "exact has nan; allowed: 0..1"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_impossible_results_are_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        result("RAPO", **changes)
