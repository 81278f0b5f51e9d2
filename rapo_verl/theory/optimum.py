"""The optima of the paper's objectives on a finite set: Lemma 3.1, Lemma 3.2 and Proposition 3.3 in closed form.

NumPy and SciPy, fp64. On a set of n items with rewards r, a reference pi_ref and weights alpha, beta:

* Lemma 3.1: max E_pi[r] - alpha KL(pi ‖ pi_ref)              -> pi ∝ pi_ref exp(r / alpha)
* Lemma 3.2: max E_pi[r] - alpha KL(pi_ref ‖ pi)              -> pi = alpha pi_ref / (lambda - r)
* Prop. 3.3: max E_pi[r] - alpha KL(pi_ref ‖ pi) + beta H(pi) -> r + alpha pi_ref / pi - beta (log pi + 1) = lambda

The first keeps to the reference's support whatever the reward; the last gives every item mass. Everywhere the reward is
finite, shape (n,); the reference >= 0 with a sum of one, shape (n,); alpha and beta > 0, in the reward's unit per nat:
anything else is a ValueError. Source: arXiv 2510.03865, section 3.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import logsumexp, wrightomega

FloatArray = npt.NDArray[np.float64]
# Relative width at which the search for lambda stops: a few roundings of fp64.
PRECISION = 4 * np.finfo(np.float64).eps


class Optimum(NamedTuple):
    """An optimal policy, shape (n,), and lambda, the multiplier of its normalisation, in the reward's unit."""

    policy: FloatArray
    multiplier: float


def reverse_kl_optimum(reward: npt.ArrayLike, reference: npt.ArrayLike, *, alpha: float) -> Optimum:
    """Return the maximum of E[r] - alpha KL(pi ‖ pi_ref): pi ∝ pi_ref exp(r / alpha).

    Source: arXiv 2510.03865, Lemma 3.1.
    """
    r, p = _checked(reward, reference, alpha=alpha)
    score = np.where(p > 0, np.log(np.where(p > 0, p, 1)) + r / alpha, -np.inf)
    normaliser = logsumexp(score)
    # Stationarity: r - alpha (log(pi / pi_ref) + 1) = lambda.
    return Optimum(np.exp(score - normaliser), float(alpha * (normaliser - 1)))


def forward_kl_optimum(reward: npt.ArrayLike, reference: npt.ArrayLike, *, alpha: float) -> Optimum:
    """Return the maximum of E[r] - alpha KL(pi_ref ‖ pi): pi = alpha pi_ref / (lambda - r), lambda from sum pi = 1.

    Where the best reward lies off the reference's support, lambda cannot fall below it (Karush-Kuhn-Tucker): what mass
    is then left goes to those items in equal shares, any split being optimal.

    Source: arXiv 2510.03865, Lemma 3.2.
    """
    r, p = _checked(reward, reference, alpha=alpha)
    on = p > 0
    best = r[on].max()

    def policy(multiplier: float) -> FloatArray:
        return np.where(on, alpha * p / np.where(on, multiplier - r, 1), 0.0)

    off_best = r[~on].max() if (~on).any() else -np.inf
    if off_best > best:
        pi = policy(off_best)
        if pi.sum() < 1:
            return Optimum(
                np.where(~on & (r == off_best), (1 - pi.sum()) / ((~on) & (r == off_best)).sum(), pi), off_best
            )
    # Each bound by a part of the sum: its best items alone, and all items as if they were the best.
    low, high = best + alpha * p[on & (r == best)].sum(), best + alpha
    multiplier = high if low >= high else brentq(lambda x: policy(x).sum() - 1, low, high, xtol=1e-300, rtol=PRECISION)
    pi = policy(multiplier)
    return Optimum(pi / pi.sum(), float(multiplier))  # the search leaves a rounding


def rapo_optimum(reward: npt.ArrayLike, reference: npt.ArrayLike, *, alpha: float, beta: float) -> Optimum:
    """Return the maximum of E[r] - alpha KL(pi_ref ‖ pi) + beta H(pi), which has mass on every item.

    With y = alpha pi_ref / (beta pi) the condition is y + log y = (lambda - r) / beta + 1 + log(alpha pi_ref / beta),
    so that y is Wright's omega of the right-hand side; where pi_ref = 0, pi = exp((r - lambda) / beta - 1).

    Source: arXiv 2510.03865, Proposition 3.3.
    """
    r, p = _checked(reward, reference, alpha=alpha, beta=beta)
    on = p > 0
    log_scale = np.log(alpha * np.where(on, p, 1) / beta)

    def log_policy(multiplier: float) -> FloatArray:
        x = (multiplier - r) / beta + 1
        y = wrightomega(x + log_scale).real
        # log y = x - y by the definition, which does not underflow; beyond 1 the logarithm has more digits.
        log_y = np.where(y > 1, np.log(np.where(y > 1, y, 1)), x + log_scale - y)
        return np.where(on, log_scale - log_y, -x)

    # lambda = E[r] + alpha + beta (H - 1), with E[r] within the rewards and H within [0, log n].
    low, high = r.min() + alpha - beta, r.max() + alpha + beta * (np.log(len(r)) - 1)
    margin = 1e-9 * (1 + abs(low) + abs(high))  # both are reached, up to rounding, by n = 1
    multiplier = brentq(lambda x: logsumexp(log_policy(x)), low - margin, high + margin, xtol=1e-300, rtol=PRECISION)
    log_pi = log_policy(multiplier)
    return Optimum(np.exp(log_pi - logsumexp(log_pi)), float(multiplier))


def _checked(reward: npt.ArrayLike, reference: npt.ArrayLike, **weights: float) -> tuple[FloatArray, FloatArray]:
    r, p = np.asarray(reward, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if r.ndim != 1 or r.shape != p.shape or not len(r):
        raise ValueError(f"reward and reference must have one shape (n,), n >= 1, got {r.shape} and {p.shape}")
    if not np.isfinite(r).all():
        raise ValueError(f"reward of item {int(np.argmin(np.isfinite(r)))} is {r[~np.isfinite(r)][0]}; allowed: finite")
    if not (p >= 0).all() or not abs(p.sum() - 1) <= 1e-9:
        raise ValueError(f"the reference must be >= 0 and sum to one, got a least value {p.min()} and a sum {p.sum()}")
    for name, value in weights.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; allowed: a finite number > 0")
    return r, p
