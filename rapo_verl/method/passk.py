"""pass@k with its uncertainty: estimator, exact intervals, bootstrap bands, paired differences.

Pure mathematics on success counts. Problem i was sampled n_i times and c_i of the samples were right; everything here
is a function of those counts, so results can be scored again at any k without generating anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class CurveBand(NamedTuple):
    """Mean pass@k and its percentile band; every array has shape (K,) and holds probabilities."""

    ks: tuple[int, ...]
    mean: FloatArray
    low: FloatArray
    high: FloatArray


class Difference(NamedTuple):
    """Mean pass@k of a minus mean pass@k of b, and its interval."""

    difference: float
    low: float
    high: float


def pass_at_k(correct: ArrayLike, n: ArrayLike, k: int) -> FloatArray:
    """Return the unbiased estimate of pass@k for each problem.

    ``1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i)``, the share of k-subsets of the n samples
    that hold at least one right answer. Computed in float64; no factor is large, so nothing overflows at n = 2048.

    Args:
        correct: Number of right samples c, integers, shape (P,).
        n: Number of samples, an integer or integers of shape (P,).
        k: Number of attempts, 1 <= k <= n.

    Returns:
        Probabilities, shape (P,).

    Raises:
        ValueError: No problem, a count that is no integer, c < 0, c > n, n < 1, k < 1 or k > n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1 and figure 3.
    """
    counts, sizes = _checked(correct, n, (k,))
    table, offset = _tables(sizes, k)
    return table[offset + counts]


def pass_at_k_curve(correct: ArrayLike, n: ArrayLike, ks: Sequence[int]) -> FloatArray:
    """Return the mean over problems of the unbiased pass@k, for each k.

    Args:
        correct: Number of right samples, integers, shape (P,).
        n: Number of samples, an integer or shape (P,).
        ks: The K numbers of attempts, each in 1..n.

    Returns:
        Probabilities, shape (K,).

    Raises:
        ValueError: As for `pass_at_k`.
    """
    return np.array([pass_at_k(correct, n, k).mean() for k in ks])


def exact_pass_at_k(p: ArrayLike, k: int) -> FloatArray:
    """Return ``1 - (1 - p)^k``, the pass@k of a known success probability, computed without cancellation.

    Args:
        p: Success probabilities of one sample, shape (P,).
        k: Number of attempts, k >= 1.

    Returns:
        Probabilities, shape (P,).

    Raises:
        ValueError: A p outside [0, 1], or k < 1.
    """
    prob = np.asarray(p, dtype=np.float64)
    if not ((prob >= 0) & (prob <= 1)).all():
        raise ValueError(f"a success probability lies in [0, 1]; got {prob.min()} to {prob.max()}")
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    with np.errstate(divide="ignore"):  # p = 1: log 0 = -inf, and -expm1(-inf) = 1 is the right answer
        return -np.expm1(k * np.log1p(-prob))


def default_ks(n: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to n // 2, which is always the last.

    Above n / 2 the subsets overlap so much that one sample decides the estimate: its spread hides any difference.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    top = max(1, n // 2)
    return (*(2**i for i in range(top.bit_length()) if 2**i < top), top)


def bootstrap_curve(
    correct: ArrayLike, n: ArrayLike, ks: Sequence[int], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> CurveBand:
    """Return mean pass@k with a percentile band, resampling problems and the samples within them.

    One draw takes P problems with replacement and, for each, a new count c* ~ Bin(n, c / n). The mean of the unbiased
    estimate under that binomial is ``1 - (1 - c/n)^k``, not ``u(c)``: at c = 1, n = 2048, k = 1024 it is 0.394, u 0.5.
    So ``u(c*) - (1 - (1 - c/n)^k)`` is added to u(c) as noise; without that the band would sit below its own curve.

    The band is pointwise in k. In simulated worlds of 15 to 60 problems the nominal 95 % held the truth in 91 to 96 %
    (least at k = 1 with very skewed rates); without the samples' noise it would be 87 % on 15 problems at k = 256.

    Args:
        correct: Number of right samples, integers, shape (P,).
        n: Number of samples, an integer or shape (P,).
        ks: The K numbers of attempts.
        level: Probability content of the band, in (0, 1).
        draws: Number of bootstrap draws.
        seed: Seed of the resampling; the same seed gives the same band.

    Returns:
        `CurveBand` with arrays of shape (K,), clipped to [0, 1].

    Raises:
        ValueError: As for `pass_at_k`; level outside (0, 1); draws < 1.
    """
    counts, sizes = _checked(correct, n, ks)
    stats = _bootstrap_means(counts[None], sizes, ks, level, draws, seed)[:, 0]
    low, high = np.clip(np.quantile(stats, _tails(level), axis=1), 0.0, 1.0)
    return CurveBand(tuple(ks), pass_at_k_curve(counts, sizes, ks), low, high)


def paired_bootstrap_difference(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    n: ArrayLike,
    k: int,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """Return mean pass@k of a minus that of b, with a paired bootstrap interval.

    Each draw takes the same problems for both models, so a problem's difficulty, common to both, cancels; the samples
    are drawn anew for each model. The counts (P,) are of the same problems in the same order, out of the same n (an
    integer or (P,)); level, draws and seed are those of `bootstrap_curve`.

    Returns:
        `Difference`, each in [-1, 1]; above 0 where a is better.

    Raises:
        ValueError: As for `bootstrap_curve`; the two models have different numbers of problems.
    """
    a, sizes = _checked(correct_a, n, (k,))
    b, _ = _checked(correct_b, n, (k,))
    if len(a) != len(b):
        raise ValueError(f"both must cover the same problems; got {len(a)} and {len(b)}")
    stats = _bootstrap_means(np.stack([a, b]), sizes, (k,), level, draws, seed)[0]
    low, high = np.clip(np.quantile(stats[0] - stats[1], _tails(level)), -1.0, 1.0)
    estimate = pass_at_k(a, sizes, k).mean() - pass_at_k(b, sizes, k).mean()
    return Difference(float(estimate), float(low), float(high))


def clopper_pearson(correct: ArrayLike, n: ArrayLike, *, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Return the exact two-sided interval of each problem's success probability, low and high, each of shape (P,).

    It holds the truth with at least probability ``level`` whatever the truth; after 0 of 2048 its upper end is 0.0018.

    Args:
        correct: Number of right samples, integers, shape (P,).
        n: Number of samples, an integer or shape (P,).
        level: Probability content, in (0, 1).

    Raises:
        ValueError: As for `pass_at_k`; level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")
    c, sizes = _checked(correct, n, (1,))
    low, high = _tails(level)
    # The beta quantile's limits, which scipy gives as nan.
    lower = np.where(c == 0, 0.0, beta.ppf(low, np.maximum(c, 1), sizes - c + 1))
    upper = np.where(c == sizes, 1.0, beta.ppf(high, c + 1, np.maximum(sizes - c, 1)))
    return lower, upper


def _tables(sizes: IntArray, k: int) -> tuple[FloatArray, IntArray]:
    """Return u_k(c) for c = 0..n, the tables of all distinct n end to end, and where each problem's table begins."""
    distinct, which = np.unique(sizes, return_inverse=True)
    tables = []
    for n in distinct:
        i = np.arange(n, 0, -1, dtype=np.float64)
        # From i = k on the product is 0; the factors below k are negative and must not bring a sign into it.
        tables.append(1.0 - np.concatenate([[1.0], np.cumprod(np.maximum(i - k, 0.0) / i)]))
    starts = np.concatenate([[0], np.cumsum([len(t) for t in tables])[:-1]]).astype(np.int64)
    return np.concatenate(tables), starts[which]


def _bootstrap_means(
    counts: IntArray, sizes: IntArray, ks: Sequence[int], level: float, draws: int, seed: int
) -> FloatArray:
    """Return bootstrap means, shape (K, M, draws), for counts (M, P) of M models; all models get the same problems."""
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level must lie in (0, 1) and draws be at least 1; got level {level}, draws {draws}")
    rng = np.random.default_rng(seed)
    models, problems = counts.shape
    chosen = rng.integers(problems, size=(draws, problems))
    rate = counts / sizes
    stats = np.empty((len(ks), models, draws))
    for m in range(models):
        fresh = rng.binomial(sizes[chosen], rate[m][chosen])
        for j, k in enumerate(ks):
            table, offset = _tables(sizes, k)
            centre = table[offset + counts[m]] - exact_pass_at_k(rate[m], k)
            stats[j, m] = (centre[chosen] + table[offset[chosen] + fresh]).mean(axis=1)
    return stats


def _tails(level: float) -> tuple[float, float]:
    return (1 - level) / 2, (1 + level) / 2


def _checked(correct: ArrayLike, n: ArrayLike, ks: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Return counts and sample sizes as int64 of shape (P,), or raise ValueError with what is wrong."""
    counts, sizes = np.asarray(correct), np.asarray(n)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(f"correct must be a non-empty vector, one count a problem; got shape {counts.shape}")
    for name, values in (("correct", counts), ("n", sizes)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must hold integers; got {values.dtype}")
    if sizes.ndim > 0 and sizes.shape != counts.shape:
        raise ValueError(f"n must be one integer or have the shape of correct {counts.shape}; got {sizes.shape}")
    sizes = np.broadcast_to(sizes, counts.shape).astype(np.int64)
    bad = np.flatnonzero((counts < 0) | (counts > sizes) | (sizes < 1))
    if bad.size:
        i = bad[0]
        raise ValueError(f"need 0 <= correct <= n and n >= 1; got correct {counts[i]}, n {sizes[i]} at problem {i}")
    if len(ks) == 0 or min(ks) < 1 or max(ks) > sizes.min():
        raise ValueError(f"each k must lie in 1..{sizes.min()} (the least n); got {list(ks)}")
    return counts.astype(np.int64), sizes
