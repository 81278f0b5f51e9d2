"""What responses look like: counts of verdicts, majority, guess, lengths; and the few texts behind each count."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rapo_verl import Refused
from rapo_verl.evaluation.score import samples_sha256, score_path
from rapo_verl.evaluation.store import ShardError, Store, read_stated, read_table
from rapo_verl.method.passk import default_ks
from rapo_verl.report.dumps import cut
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
    """What the responses of one draw of n samples look like.

    Attributes:
        problems: a row a problem: samples of each verdict and "truncated" at max_tokens; and "guess", the share of the
            model's answers to *other* problems that would be right here.
        majority: probability that the most frequent answer of k samples is right, (P, K) for `default_ks` of n.
        tokens: lengths over all samples: mean, median, 95 (the percentile), and means of right and wrong (nan: none).
    """

    problems: pd.DataFrame
    majority: NDArray[np.float64]
    tokens: dict[str, float]


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
    """Return what the responses of a judged folder look like; of all problems at once only numbers are in memory."""
    n, count = store.manifest["n"], len(store.problems)
    golds = [answer_key(problem["gold"]) for problem in store.problems]
    # How often each right answer was given to any problem, and to its own.
    given: Counter[str] = Counter()
    own, rows, majority, tokens, rights = [], [], [], [], []
    for i, table in enumerate(_tables(store)):
        right = (table.verdict == Verdict.correct).to_numpy()
        votes = table.answer.map({answer: answer_key(answer) for answer in table.answer.dropna().unique()})
        own.append(int((votes == golds[i]).sum()))
        given.update(votes[votes.isin(golds)])
        # -1: no answer; 0: a right one; above: one number for each answer.
        numbers, _ = pd.factorize(votes)
        classes = np.where(right, 0, np.where(numbers < 0, -1, numbers + 1))
        majority.append(majority_at(classes, default_ks(n), seed=i))
        verdicts = {verdict.value: int((table.verdict == verdict).sum()) for verdict in Verdict}
        rows.append({**verdicts, "truncated": int((table.finish_reason == "length").sum())})
        tokens.append(table.tokens.to_numpy())
        rights.append(right)
    problems = pd.DataFrame(rows)
    problems["guess"] = (np.array([given[gold] for gold in golds]) - own) / (max(count - 1, 1) * n)
    return Responses(problems, np.stack(majority), _lengths(np.concatenate(tokens), np.concatenate(rights)))


def _tables(store: Store) -> Iterator[pd.DataFrame]:
    """Yield each problem's verdicts."""
    judge = None
    for problem in range(len(store.problems)):
        path = score_path(store, problem)
        try:
            table, basis, samples = read_table(path), read_stated(path)["basis"], samples_sha256(store, problem)
        except ShardError as error:
            raise Refused(f"{error}; run `rapo eval score {store.folder}` first") from error
        if basis["samples"] != samples or table.num_rows != store.manifest["n"]:
            raise Refused(f"{path} holds verdicts on other samples than are there now; run `rapo eval score` again")
        basis["samples"] = None
        judge = judge or basis
        if judge != basis:
            raise Refused(f"{store.folder}: problems were judged by different verifiers; run `rapo eval score` again")
        yield table.to_pandas()


def majority_at(
    classes: NDArray[np.int64], ks: Sequence[int], *, seed: int, draws: int = MAJORITY_DRAWS
) -> NDArray[np.float64]:
    """Return the probability that the most frequent answer of k samples is right, (K,).

    Mean over random k-subsets of the n samples, exact for k = 1. A tie counts as its share; samples without an answer
    do not vote. Each sample has a class, (n,): -1 no answer, 0 right, above 0 a wrong one.
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


def _lengths(tokens: NDArray[np.int32], right: NDArray[np.bool_]) -> dict[str, float]:
    median, high = np.quantile(tokens, (0.5, 0.95), method="inverted_cdf")
    parts = {"mean": tokens, "right": tokens[right], "wrong": tokens[~right]}
    means = {name: float(part.mean()) if len(part) else float("nan") for name, part in parts.items()}
    return means | {"median": float(median), "95": float(high)}


def samples_behind(store: Store, *, cells: int) -> list[list[dict[str, Any]]]:
    """Return for each problem a few samples: number, verdict, answer, tokens, finish reason and text.

    Long texts keep their head and their end; where they are cut depends on the number of cells of the whole page.
    """
    limit = min(max(PAGE_CHARACTERS // (cells * (RIGHT + OTHER)), MIN_CHARACTERS), MAX_CHARACTERS)
    found = []
    for problem in range(len(store.problems)):
        table = read_table(score_path(store, problem))
        right = np.array(table["verdict"].to_pylist()) == Verdict.correct
        chosen = [*np.flatnonzero(right)[:RIGHT].tolist(), *np.flatnonzero(~right)[:OTHER].tolist()]
        rows = zip(table.take(chosen).to_pylist(), store.texts(problem, chosen))
        found.append([row | {"text": cut(text, limit)} for row, text in rows])
    return found
