"""Unbiased pass@k of veRL's validation batches."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rapo_verl.method.passk import pass_at_k


def validation_pass_at_k(
    data_sources: Sequence[str], uids: Sequence[str], correct: Sequence[float | None], n: int
) -> dict[str, float]:
    """Return ``val/pass@k/<data source>/<k>`` for k = 1, 2, 4, ... up to n // 2, and for n.

    Args:
        data_sources: of each response.
        uids: of the prompt that each response answers.
        correct: 1.0 where it is right; None (the reward failed, which stops a run of ours) counts as wrong.
        n: responses asked for each prompt; one that is missing counts as wrong, as it does in veRL's own metrics.
    """
    solved: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for source, uid, right in zip(data_sources, uids, correct):
        solved[str(source)][str(uid)] += int((right or 0.0) >= 1.0)
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n // 2] + [n]
    return {
        f"val/pass@k/{source}/{k}": float(pass_at_k(np.array(list(counts.values())), n, k).mean())
        for source, counts in solved.items()
        for k in ks
    }
