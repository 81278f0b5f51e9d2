"""pass@k with its uncertainty: estimator, intervals of problems, of means and of paired differences.

Pure mathematics on success counts. Problem i was sampled n_i times and c_i of the samples were right; everything here
is a function of those counts, so results can be scored again at any k without generating anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, norm, t

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Band(NamedTuple):
    """A mean over problems at each k and its interval, pointwise in k; every array has shape (K,)."""

    ks: tuple[int, ...]
    mean: FloatArray
    low: FloatArray
    high: FloatArray


def pass_at_k(correct: ArrayLike, n: ArrayLike, k: int) -> FloatArray:
    """Return the unbiased estimate of pass@k for each problem, probabilities of shape (P,).

    ``1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i)``, the share of k-subsets of the n samples
    that hold at least one right answer. Computed in float64; no factor is large, so nothing overflows at n = 2048.

    Args:
        correct: right samples c, integers, shape (P,).
        n: samples, an integer or integers of shape (P,).
        k: attempts, 1 <= k <= n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1 and figure 3.
    """
    counts, sizes = _checked(correct, n, (k,))
    table, offset = _tables(sizes, k)
    return table[offset + counts]


def pass_at_k_curve(correct: ArrayLike, n: ArrayLike, ks: Sequence[int]) -> FloatArray:
    """Return the mean over problems of the unbiased pass@k, for each of the K values of ks, shape (K,)."""
    return np.array([pass_at_k(correct, n, k).mean() for k in ks])


def exact_pass_at_k(p: ArrayLike, k: int) -> FloatArray:
    """Return ``1 - (1 - p)^k`` (P,), the pass@k of known success probabilities (P,), computed without cancellation."""
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
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    top = max(1, n // 2)
    return (*(2**i for i in range(top.bit_length()) if 2**i < top), top)


def mean_band(
    correct: ArrayLike, n: ArrayLike, ks: Sequence[int], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Band:
    """Return mean pass@k and its interval, for problems that are a sample of those that could have been asked.

    Each problem's estimate is a value in [0, 1] whose expectation over problems and samples is the true mean, so this
    is the interval of Gaffke (2005) for the mean of a bounded variable: the problems weigh as Dirichlet(1, ..., 1)
    draws with one problem more, never solved for the low end and always solved for the high end. On values of 0 and 1
    it is Clopper and Pearson's: none of 30 problems solved leaves a mean of up to 0.116. That it holds its level on
    every distribution is proved for two values and conjectured otherwise; the slow test simulates it where a bootstrap
    fails, on few problems and on rates of which a few decide the mean (docs/evaluating.md has the figures).

    ``correct`` and ``n`` are as for `pass_at_k`, ``level`` is the probability content of each interval, in (0, 1), and
    ``draws`` and ``seed`` are those of the weights.
    """
    values = np.stack([pass_at_k(correct, n, k) for k in ks], axis=1)
    _check_draws(level, draws)
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(values) + 1), size=draws)
    sums = weights[:, :-1] @ values
    low, high = ((1 - level) / 2, (1 + level) / 2)
    mean = values.mean(axis=0)
    # Few draws of many problems could leave the mean outside by their own noise.
    return Band(
        tuple(ks),
        mean,
        np.minimum(np.quantile(sums, low, axis=0), mean),
        np.clip(np.quantile(sums + weights[:, -1:], high, axis=0), mean, 1.0),
    )


def paired_difference(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    n: ArrayLike,
    ks: Sequence[int],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Band:
    """Return mean pass@k of a minus that of b, above 0 where a is better, and its paired bootstrap interval.

    A draw takes P problems with replacement, the same for both models, so a problem's difficulty cancels, and for each
    model and problem a new count c* ~ Bin(n, c / n). The mean of the unbiased estimate u under that binomial is
    ``1 - (1 - c/n)^k``, not ``u(c)``: at c = 1, n = 2048, k = 1024 it is 0.394, u 0.5. So ``u(c*) - (1 - (1 - c/n)^k)``
    is added to u(c) as noise. Percentiles are those of Hesterberg's expanded interval (2015), which widen as Student's
    t does where problems are few. `mean_band`'s interval would hold too, but could hardly see a difference.

    Where no problem tells the two apart, the interval is the exact bound on what P problems may have missed.

    Both have (P,) counts on the same problems in the same order, out of the same n; the rest is as for `mean_band`.
    """
    a, sizes = _checked(correct_a, n, ks)
    b, _ = _checked(correct_b, n, ks)
    if len(a) != len(b):
        raise ValueError(f"both must cover the same problems; got {len(a)} and {len(b)}")
    _check_draws(level, draws)
    rng = np.random.default_rng(seed)
    problems = len(a)
    chosen = rng.integers(problems, size=(draws, problems))
    stats = np.zeros((len(ks), draws))
    for counts, sign in ((a, 1), (b, -1)):
        fresh = rng.binomial(sizes[chosen], (counts / sizes)[chosen])
        for j, k in enumerate(ks):
            table, offset = _tables(sizes, k)
            centre = table[offset + counts] - exact_pass_at_k(counts / sizes, k)
            stats[j] += sign * (centre[chosen] + table[offset[chosen] + fresh]).mean(axis=1)
    tail = norm.cdf(np.sqrt(problems / max(1, problems - 1)) * t.ppf((1 - level) / 2, max(1, problems - 1)))
    low, high = np.clip(np.quantile(stats, (tail, 1 - tail), axis=1), -1.0, 1.0)
    missed = 1 - ((1 - level) / 2) ** (1 / problems)
    same = np.array([(pass_at_k(a, sizes, k) == pass_at_k(b, sizes, k)).all() for k in ks])
    low, high = np.where(same, np.minimum(low, -missed), low), np.where(same, np.maximum(high, missed), high)
    return Band(tuple(ks), pass_at_k_curve(a, sizes, ks) - pass_at_k_curve(b, sizes, ks), low, high)


def clopper_pearson(correct: ArrayLike, n: ArrayLike, *, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Return the exact two-sided interval of each problem's success probability, low and high, each of shape (P,).

    It holds the truth with at least probability ``level`` whatever the truth; after 0 of 2048 its upper end is 0.0018.
    """
    _check_draws(level, 1)
    c, sizes = _checked(correct, n, (1,))
    # The beta quantile's limits, which scipy gives as nan.
    lower = np.where(c == 0, 0.0, beta.ppf((1 - level) / 2, np.maximum(c, 1), sizes - c + 1))
    upper = np.where(c == sizes, 1.0, beta.ppf((1 + level) / 2, c + 1, np.maximum(sizes - c, 1)))
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


def _check_draws(level: float, draws: int) -> None:
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level must lie in (0, 1) and draws be at least 1; got level {level}, draws {draws}")


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
