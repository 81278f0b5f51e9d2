"""What a result refuses to hold."""

import math
import re

import pytest

from rapo_verl.report.results import EvalResult

N = 64
IDS = tuple(f"p{i:02d}" for i in range(28))
EXACT = tuple(i / 28 for i in range(28))


def result(name, **changes):
    fields = {"n": N, "ids": IDS, "groups": ("easy",) * 28, "correct": tuple(range(28)), "exact": EXACT}
    return EvalResult(name, **(fields | {"meta": {"draw_seed": 3}} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"correct": (1.0,) * len(IDS)}, "correct[0] must be an integer"),
        ({"correct": (True,) * len(IDS)}, "correct[0] must be an integer"),
        ({"correct": (1,)}, "correct must have one entry for each of the 28 ids; got 1"),
        ({"correct": [1] * len(IDS)}, "correct must be a tuple"),
        ({"ids": ("a",) * len(IDS)}, "ids must differ"),
        ({"ids": (["a"],) * len(IDS)}, "ids[0] must be a string"),
        ({"ids": (), "groups": (), "correct": (), "exact": None}, "at least one problem"),
        ({"exact": (math.nan,) * len(IDS)}, "exact[0] must lie in [0, 1]; got nan"),
        ({"n": 0}, "n must be an integer of at least 1; got 0"),
        ({"meta": None}, "meta must be a mapping"),
    ],
)
def test_impossible_results_are_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        result("RAPO", **changes)
