"""The few samples that stand behind a cell of the coverage matrix, read from the few shards that hold them."""

from typing import Any

import numpy as np

from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.store import Store, read_table
from rapo_verl.reward import Verdict

# Samples a cell: the first right ones and the first others.
RIGHT, OTHER = 2, 2
# Characters of all texts on a page; each text is cut so that they fit.
PAGE_CHARACTERS = 6_000_000
MIN_CHARACTERS, MAX_CHARACTERS = 300, 6000


def samples_behind(store: Store, *, cells: int) -> list[list[dict[str, Any]]]:
    """Return for each problem a few samples: number, verdict, answer, tokens, finish reason and text.

    Args:
        store: judged by `rapo eval score`.
        cells: of the whole page, which decides where long texts are cut: their head and their end are kept.
    """
    limit = min(max(PAGE_CHARACTERS // (cells * (RIGHT + OTHER)), MIN_CHARACTERS), MAX_CHARACTERS)
    return [_of_problem(store, problem, limit) for problem in range(len(store.problems))]


def _of_problem(store: Store, problem: int, limit: int) -> list[dict[str, Any]]:
    verdicts = read_table(score_path(store, problem), ["verdict"])["verdict"].to_numpy(zero_copy_only=False)
    right = verdicts == Verdict.correct.value
    chosen = [*np.flatnonzero(right)[:RIGHT].tolist(), *np.flatnonzero(~right)[:OTHER].tolist()]
    size, paths = store.manifest["shard"], store.shards_of(problem)
    texts = {shard: store.read(paths[shard], ["text"])["text"] for shard in sorted({i // size for i in chosen})}
    rows = read_table(score_path(store, problem)).take(chosen).to_pylist()
    return [row | {"text": _cut(texts[i // size][i % size].as_py(), limit)} for i, row in zip(chosen, rows)]


def _cut(text: str, limit: int) -> str:
    """Return a text with its middle left out where it is longer than the limit."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
