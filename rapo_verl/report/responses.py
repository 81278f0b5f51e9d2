"""What responses look like: counts of verdicts, majority, guess, lengths; and the few texts behind each count."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.spec import PlanError
from rapo_verl.evaluation.store import ShardError, Store, read_stated, read_table
from rapo_verl.method.passk import default_ks
from rapo_verl.reward import Verdict
from rapo_verl.reward.answer import normalize

# Random subsets a problem over which majority@k is averaged.
MAJORITY_DRAWS = 32
# A number and its decimals; a fraction: sign, numerator, denominator.
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))", re.ASCII)
_FRACTION = re.compile(r"([+-]?)(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+) ?/ ?(\d+))", re.ASCII)
# Samples a cell: the first right ones and the first others.
RIGHT, OTHER = 2, 2
# Characters of all texts on a page; each text is cut so that they fit.
PAGE_CHARACTERS = 6_000_000
MIN_CHARACTERS, MAX_CHARACTERS = 300, 6000


@dataclass(frozen=True)
class Responses:
    """What the responses of one draw look like; arrays are over its P problems.

    Attributes:
        verdicts: samples of each verdict, (P,) each.
        truncated: samples cut off at max_tokens, (P,).
        repeated: long samples that stand in more than one shard, (P,).
        length_mean: tokens, over all samples; likewise the right and the wrong ones (nan: none) and the percentiles.
        majority: probability that the most frequent answer of k samples is right, (P, K) for `default_ks` of n.
        guess: share of the model's answers to *other* problems that would be right here, (P,).
    """

    verdicts: dict[str, NDArray[np.int64]]
    truncated: NDArray[np.int64]
    repeated: NDArray[np.int64]
    length_mean: float
    length_right: float
    length_wrong: float
    length_median: float
    length_95: float
    majority: NDArray[np.float64]
    guess: NDArray[np.float64]


def answer_key(text: str) -> str:
    r"""Return an answer such that equal numbers written differently are one: 27, 27.0, 1/2 and \frac{1}{2} = 0.5."""
    normal = normalize(text).replace(" ", "")
    found = _NUMBER.fullmatch(normal) or _FRACTION.fullmatch(normal)
    # No number that anybody means is that long, and its power of ten would take time.
    if found is None or len(normal) > 64:
        return normal
    sign, *parts = (part for part in found.groups() if part is not None)
    if not parts:
        return str(Fraction(sign))
    return str(Fraction(f"{sign}1") * Fraction(int(parts[0]), int(parts[1]))) if int(parts[1]) else normal


def read_responses(store: Store) -> Responses:
    """Return what the responses of a judged folder look like, one problem in memory at a time.

    Raises:
        PlanError: a problem is not judged, or by another verifier than the first.
    """
    n, count = store.manifest["n"], len(store.problems)
    # Right answers as they are compared, and the problems that have each.
    places: dict[str, list[int]] = {}
    for i, problem in enumerate(store.problems):
        places.setdefault(answer_key(problem["gold"]), []).append(i)
    verdicts = {verdict.value: np.zeros(count, dtype=np.int64) for verdict in Verdict}
    truncated, repeated = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    majority = np.zeros((count, len(default_ks(n))))
    # Of each problem, how often the right answer of each problem was given.
    given = np.zeros((count, count), dtype=np.int32)
    lengths = {right: Counter[int]() for right in (True, False)}
    for i, (table, repeats) in enumerate(_tables(store)):
        said = np.array(table["verdict"].to_pylist())
        right = said == Verdict.correct.value
        for verdict, counts in verdicts.items():
            counts[i] = (said == verdict).sum()
        truncated[i] = np.sum(np.array(table["finish_reason"].to_pylist()) == "length")
        repeated[i] = repeats
        tokens = table["tokens"].to_numpy()
        for kind in lengths:
            lengths[kind].update(tokens[right == kind].tolist())
        votes = _votes(table["answer"].to_pylist())
        for answer, times in Counter(votes).items():
            given[i, places.get(answer or "", [])] = times
        majority[i] = majority_at(_classes(votes, right), default_ks(n), seed=i)
    others = np.maximum(count - 1, 1)
    guess = (given.sum(axis=0) - given.diagonal()) / (others * n)
    return Responses(verdicts, truncated, repeated, *_lengths(lengths), majority, guess)


def _tables(store: Store) -> Iterator[tuple[pa.Table, int]]:
    """Yield each problem's verdicts, and how many of its long samples stand in two shards."""
    judge = None
    for problem in range(len(store.problems)):
        path = score_path(store, problem)
        try:
            table, stated = read_table(path), read_stated(path)
        except ShardError as error:
            raise PlanError(f"{error}; run `rapo eval score {store.folder}` first") from error
        if table.num_rows != store.manifest["n"]:
            raise PlanError(f"{path} holds {table.num_rows} verdicts of {store.manifest['n']}; run `rapo eval score`")
        basis = {**stated["basis"], "samples": None}
        judge = judge or basis
        if judge != basis:
            raise PlanError(f"{store.folder}: problems were judged by different verifiers; run `rapo eval score` again")
        yield table, stated["repeated"]


def _votes(answers: Sequence[str | None]) -> list[str | None]:
    """Return each answer's key; equal texts are read once."""
    normal = {answer: None if answer is None else answer_key(answer) for answer in set(answers)}
    return [normal[answer] for answer in answers]


def _classes(votes: Sequence[str | None], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return a number for each sample's answer, (n,): -1 none, 0 a right one, 1 and more the wrong ones as written."""
    numbers: dict[str, int] = {}
    wrong = [-1 if vote is None else numbers.setdefault(vote, len(numbers) + 1) for vote in votes]
    return np.where(right, 0, wrong)


def majority_at(
    classes: NDArray[np.int64], ks: Sequence[int], *, seed: int, draws: int = MAJORITY_DRAWS
) -> NDArray[np.float64]:
    """Return the probability that the most frequent answer of k samples is right, (K,).

    Mean over random k-subsets of the n samples, exact for k = 1. A tie counts as its share;
    samples without an answer do not vote.

    Args:
        classes: of each sample, (n,): -1 no answer, 0 right, above 0 a wrong one.
        ks: sizes, each in 1..n.
        seed: of the subsets.
        draws: subsets.
    """
    rng = np.random.default_rng(seed)
    found = np.zeros(len(ks))
    for _ in range(draws):
        order = rng.permutation(classes)
        for j, k in enumerate(ks):
            votes = np.bincount(order[:k] + 1)[1:]
            if len(votes) and votes[0] > 0 and votes[0] == votes.max():
                found[j] += 1 / (votes == votes[0]).sum()
    found /= draws
    found[np.array(ks) == 1] = (classes == 0).mean()
    return found


def _lengths(lengths: dict[bool, Counter[int]]) -> tuple[float, float, float, float, float]:
    """Return mean tokens of all, right and wrong samples, the median and the 95th percentile."""
    both = lengths[True] + lengths[False]
    means = [
        sum(length * times for length, times in c.items()) / c.total() if c else math.nan
        for c in (both, lengths[True], lengths[False])
    ]
    values = np.array(sorted(both))
    share = np.cumsum([both[int(v)] for v in values]) / both.total()
    median, high = (float(values[np.searchsorted(share, q)]) for q in (0.5, 0.95))
    return means[0], means[1], means[2], median, high


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
