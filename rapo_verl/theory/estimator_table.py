"""What each KL estimator, used as a loss, really descends: by exact enumeration over a vocabulary, no sampling.

A loss term f(log pi(y)) on the sampled token y ~ mu has, for the logits, the gradient f'(y) (e_y - pi). Its expectation
and variance under mu are sums over the vocabulary. They are compared with the true gradients: of the forward
KL(ref ‖ pi), pi - ref, and of the reverse KL(pi ‖ ref), pi (log(pi / ref) - KL). veRL's estimators are called as veRL
has them, clamps included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rapo_verl.method.forward_kl import forward_kl_estimate
from rapo_verl.method.head import Target, head

VOCABULARY, TOP_K, RHO_MAX = 64, 16, 6.0
# Distance between policy and reference: scale of a random change of the logits.
NEAR, FAR = 0.3, 2.0
VERL = ("k1", "k2", "low_var_kl", "k3+")
OURS = ("paper", "unbiased", "bounded")


class Pair(NamedTuple):
    """Logits of a policy, log-probabilities of the reference and of the policy that sampled; shape (vocabulary,)."""

    logits: torch.Tensor
    log_ref: torch.Tensor
    log_old: torch.Tensor


class Quality(NamedTuple):
    """One estimator on one pair: errors against both true gradients, relative to their norms, and variance."""

    forward: float
    reverse: float
    # Trace of the gradient's covariance for one token.
    variance: float


def make_pair(distance: float, *, off_policy: bool, seed: int = 0) -> Pair:
    """Return a peaked reference, a policy at a distance from it, and who sampled: the policy, or one apart from it."""
    generator = torch.Generator().manual_seed(seed)
    reference, change, shift = torch.randn(3, VOCABULARY, dtype=torch.float64, generator=generator)
    logits = 2 * reference + distance * change
    old = logits + 0.5 * shift if off_policy else logits
    return Pair(logits, torch.log_softmax(2 * reference, -1), torch.log_softmax(old, -1))


def forward_kl(pair: Pair) -> float:
    """Return KL(ref ‖ pi), nats."""
    return float((pair.log_ref.exp() * (pair.log_ref - torch.log_softmax(pair.logits, -1))).sum())


def forward_gradient(pair: Pair) -> torch.Tensor:
    """Return the gradient of KL(ref ‖ pi) in the logits: pi - ref."""
    return torch.softmax(pair.logits, -1) - pair.log_ref.exp()


def reverse_gradient(pair: Pair) -> torch.Tensor:
    """Return the gradient of KL(pi ‖ ref) in the logits: pi (log(pi / ref) - KL)."""
    log_pi = torch.log_softmax(pair.logits, -1)
    log_ratio = log_pi - pair.log_ref
    return log_pi.exp() * (log_ratio - (log_pi.exp() * log_ratio).sum())


def sampled(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return an estimator as a function of log pi, log pi_old and log ref of each token."""
    if name in OURS:

        def ours(log_prob, old, ref):
            mask = torch.ones_like(log_prob, dtype=torch.bool)[None]
            log_prob, old, ref = log_prob[None], old[None], ref[None]
            return forward_kl_estimate(log_prob, old, ref, mask, estimator=name, rho_max=RHO_MAX).loss[0]

        return ours
    if name not in VERL:
        raise ValueError(f"unknown estimator {name!r}; allowed: {', '.join((*OURS, *VERL))}")
    from verl.trainer.ppo.core_algos import kl_penalty

    return lambda log_prob, old, ref: kl_penalty(log_prob, ref, name)


def moments(name: str, pair: Pair) -> tuple[torch.Tensor, float]:
    """Return the expected gradient in the logits, and the trace of its covariance for one token."""
    if name in ("topk", "full"):
        return _per_token(pair, TOP_K if name == "topk" else VOCABULARY), 0.0
    log_pi = torch.log_softmax(pair.logits, -1)
    leaf = log_pi.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(sampled(name)(leaf, pair.log_old, pair.log_ref).sum(), leaf)
    pi, weight = log_pi.exp(), pair.log_old.exp()
    mean = weight * slope - pi * (weight * slope).sum()
    squared = 1 - 2 * pi + (pi**2).sum()  # |e_y - pi|^2
    return mean, float((weight * slope**2 * squared).sum() - (mean**2).sum())


def _per_token(pair: Pair, k: int) -> torch.Tensor:
    top = pair.log_ref.topk(k)
    tail = pair.log_ref.scatter(0, top.indices, -torch.inf).logsumexp(0)
    logits = pair.logits[None].clone().requires_grad_(True)
    target = Target(top.indices[None], top.values[None], tail[None])
    head(logits, torch.zeros(1, dtype=torch.long), target=target).forward_kl.sum().backward()
    assert logits.grad is not None
    return logits.grad[0]


def quality(name: str, pair: Pair) -> Quality:
    """Return how an estimator's gradient compares with the true ones."""
    mean, variance = moments(name, pair)
    truths = forward_gradient(pair), reverse_gradient(pair)
    forward, reverse = (float((mean - true).norm() / true.norm()) for true in truths)
    return Quality(forward, reverse, variance)


ROWS = {
    "bounded": "ours, default",
    "unbiased": "ours",
    "paper": "the paper's",
    "topk": f"ours, {TOP_K} of {VOCABULARY} tokens named",
    "full": "ours",
    "low_var_kl": "veRL's k3, the usual GRPO leash",
    "k2": "veRL",
    "k3+": "veRL, k3's value with k2's gradient",
    "k1": "veRL",
}


def table() -> str:
    """Return the page docs/estimators.md."""
    sections = []
    for title, distance in ((f"Near the reference (logits moved by {NEAR})", NEAR), (f"Far from it ({FAR})", FAR)):
        on, off = (make_pair(distance, off_policy=flag) for flag in (False, True))
        rows = [f"## {title}: KL(ref ‖ pi) = {forward_kl(on):.3f} nats\n\n{COLUMNS}"]
        for name, words in ROWS.items():
            values = (*quality(name, on), *quality(name, off)[:2])
            rows.append(f"| `{name}` | {words} | {' | '.join(map(_number, values))} |")
        sections.append("\n".join(rows) + "\n")
    return "\n".join([INTRODUCTION, *sections, READING])


def _number(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.2g}" if value < 1e4 else f"{value:.1e}"


INTRODUCTION = f"""\
# What each KL estimator descends

Written by `rapo figures`; `tests/test_estimator_table.py` fails if it is out of date. Exact enumeration over
{VOCABULARY} tokens in fp64 (`rapo_verl/theory/estimator_table.py`), one token's loss, its gradient in the
logits.
**error to forward / reverse**: norm of (expected gradient - true gradient) over the true one's; 0 means that
this KL is what it descends. **variance**: trace of the covariance of one token's gradient.
Off-policy: the tokens come from an older policy, as in the second mini-batch of a step.
"""
COLUMNS = """\
| estimator | | error to forward | to reverse | variance | off-policy: to forward | to reverse |
|---|---|---|---|---|---|---|"""
READING = f"""\
## Reading it

* `k1` as a loss descends nothing on-policy: its expected gradient is zero, an error of 1 to either KL.
* `low_var_kl`, usually called a reverse KL, descends the forward KL near the reference. Its clamp (no gradient
  beyond a k3 of 10) takes that away where a mode of the reference is missed, and off-policy it is biased. `k2`
  and `k3+` descend the reverse KL, on-policy alone.
* `paper` descends ½ E_ref[(log pi - log ref)²], which meets the forward KL only as pi → ref.
* `unbiased` descends the forward KL, on- and off-policy, at a variance that grows without bound with the
  distance; `bounded` trades it for a bias (rho ≤ {RHO_MAX:g}). `full` has neither; `topk` has no variance, and
  for error what the tail's inner shape would add.
"""
