"""The reward of `rapo smoke`, whose model of random weights is never right."""

import random
from typing import Any

from rapo_verl.reward.function import compute_score


async def toss(data_source: str, solution_str: str, ground_truth: str, **rest: Any) -> dict[str, Any]:
    """Return what the recipes' reward does of a response, once it is judged, with a coin's score in place of its own.

    Else every advantage would be 0, and the policy gradient would go untried.
    """
    record = await compute_score(data_source, solution_str, ground_truth, **rest)
    score = float(random.random() < 0.5)
    return {**record, "score": score, "acc": score}
