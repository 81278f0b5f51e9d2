"""What each KL estimator, used as a loss, really descends: by exact enumeration over a vocabulary, no sampling.

A loss term f(log pi(y)) on the sampled token y ~ mu has, for the logits, the gradient f'(y) (e_y - pi). Its expectation
and variance under mu are sums over the vocabulary. They are compared with the true gradients: of the forward
KL(ref ‖ pi), pi - ref, and of the reverse KL(pi ‖ ref), pi (log(pi / ref) - KL). veRL's estimators are called as veRL
has them, clamps included.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from rapo_verl.method.forward_kl import forward_kl_estimate
from rapo_verl.method.head import Target, head

VOCABULARY, TOP_K, RHO_MAX = 64, 16, 6.0
# Distance between policy and reference: scale of a random change of the logits.
NEAR, FAR = 0.3, 2.0
# How far one update moves the logits, in the same scale: what an older policy is older by.
UPDATE = 0.125
VERL = ("k1", "k2", "low_var_kl", "k3+", "abs")
OURS = ("paper", "unbiased", "bounded")
PER_TOKEN = ("topk", "full")
# The term of reference answers: -log pi of tokens that the reference drew.
ANSWERS = "answers"
# Behind a name: its value, detached, is a penalty in the reward, so that the surrogate alone is differentiated.
IN_REWARD = " in the reward"
# Clamp of k3 and of w x k3 in veRL, NeMo-RL and OpenRLHF, nats.
CLAMP = 10.0


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


def make_pair(distance: float, *, updates: int = 0, seed: int = 0) -> Pair:
    """Return a peaked reference, a policy at a distance from it, and who sampled: the policy some updates ago."""
    generator = torch.Generator().manual_seed(seed)
    reference, change, shift = torch.randn(3, VOCABULARY, dtype=torch.float64, generator=generator)
    logits = 2 * reference + distance * change
    old = logits + UPDATE * updates * shift
    return Pair(logits, torch.log_softmax(2 * reference, -1), torch.log_softmax(old, -1))


def two_modes(left: float) -> Pair:
    """Return a reference with two modes of one half each, and a policy that has its shape but mass ``left`` there.

    The second mode is the second half of the vocabulary.
    """
    place = torch.arange(VOCABULARY, dtype=torch.float64)
    modes = [-0.5 * ((place - centre) / (VOCABULARY / 32)) ** 2 for centre in (VOCABULARY // 4, 3 * VOCABULARY // 4)]
    log_ref = torch.log_softmax(torch.logaddexp(*modes), -1)
    second = place >= VOCABULARY // 2
    log_pi = torch.log_softmax(log_ref + torch.where(second, math.log(left), math.log1p(-left)), -1)
    return Pair(log_pi, log_ref, log_pi)


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


def divergences(pair: Pair) -> dict[str, torch.Tensor]:
    """Return, by the divergence's name, the gradients in the logits that an estimator may turn out to have."""
    log_pi, log_ref = torch.log_softmax(pair.logits, -1), pair.log_ref
    pi, ref = log_pi.exp(), log_ref.exp()
    forward, reverse = forward_gradient(pair), reverse_gradient(pair)
    half, sign, stale = (ref * (log_pi - log_ref), pi * (log_pi - log_ref).sign(), pi * (pair.log_old - log_ref))
    return {
        "the forward KL(ref ‖ pi)": forward,
        "the reverse KL(pi ‖ ref)": reverse,
        "½ E_ref[(log pi - log ref)²]": half - pi * half.sum(),
        "Σ |pi - ref|, twice the total variation": sign - pi * sign.sum(),
        "the reverse KL minus the forward KL": reverse - forward,
        # Off-policy alone: what a penalty or a weight that is as old as the samples adds.
        "the reverse KL minus KL(pi ‖ pi_old)": stale - pi * stale.sum(),
        "minus KL(pi_old ‖ pi), away from who sampled": pair.log_old.exp() - pi,
    }


Estimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _k3(log_prob: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    return (ref - log_prob).exp() - (ref - log_prob) - 1


# The forms of other frameworks, of log pi, log pi_old and log ref. TRL's are not clamped, NeMo-RL's and OpenRLHF's are.
OTHERS: dict[str, Estimator] = {
    "k3": lambda log_prob, old, ref: _k3(log_prob, ref),
    "w k3": lambda log_prob, old, ref: (log_prob - old).exp() * _k3(log_prob, ref),
    "w k3, clamped": lambda log_prob, old, ref: OTHERS["w k3"](log_prob, old, ref).clamp(-CLAMP, CLAMP),
    # Of value k3, but its weight of one is differentiated too: the score function's part of the gradient.
    "score k3, clamped": lambda log_prob, old, ref: OTHERS["w k3, clamped"](log_prob, log_prob.detach(), ref),
    "k2, clamped": lambda log_prob, old, ref: (0.5 * (log_prob - ref) ** 2).clamp(max=CLAMP),
}


def sampled(name: str) -> Estimator:
    """Return an estimator as a function of log pi, log pi_old and log ref of each token.

    The name is of `OURS` ("bounded rho<=8" for another bound), `VERL` or `OTHERS`, or one of them and `IN_REWARD`.
    """
    if name.endswith(IN_REWARD):
        value = sampled(name.removesuffix(IN_REWARD))
        # PPO's and GRPO's surrogate, unclipped; veRL takes the penalty of the policy that sampled.
        return lambda log_prob, old, ref: (log_prob - old).exp() * value(old, old, ref).detach()
    kind, _, bound = name.partition(" rho<=")
    if kind in OURS:

        def ours(log_prob, old, ref):
            mask = torch.ones_like(log_prob, dtype=torch.bool)[None]
            log_prob, old, ref = log_prob[None], old[None], ref[None]
            rho_max = float(bound or RHO_MAX)
            return forward_kl_estimate(log_prob, old, ref, mask, estimator=kind, rho_max=rho_max).loss[0]

        return ours
    if name in OTHERS:
        return OTHERS[name]
    if name not in VERL:
        raise ValueError(f"unknown estimator {name!r}; allowed: {', '.join((*OURS, *VERL, *OTHERS))}")
    from verl.trainer.ppo.core_algos import kl_penalty

    return lambda log_prob, old, ref: kl_penalty(log_prob, ref, name)


def moments(name: str, pair: Pair) -> tuple[torch.Tensor, float]:
    """Return the expected gradient in the logits, and the trace of its covariance for one token."""
    if name in PER_TOKEN:
        return _per_token(pair, TOP_K if name == "topk" else VOCABULARY), 0.0
    if name == ANSWERS:
        pi, ref = torch.softmax(pair.logits, -1), pair.log_ref.exp()
        return pi - ref, float(1 - (ref**2).sum())
    weight, pi, steep = pair.log_old.exp(), torch.softmax(pair.logits, -1), slope(name, pair)
    mean = weight * steep - pi * (weight * steep).sum()
    squared = 1 - 2 * pi + (pi**2).sum()  # |e_y - pi|^2
    return mean, float((weight * steep**2 * squared).sum() - (mean**2).sum())


def slope(name: str, pair: Pair) -> torch.Tensor:
    """Return f'(y), the derivative of a sampled estimator in log pi, at each token."""
    leaf = torch.log_softmax(pair.logits, -1).requires_grad_(True)
    return torch.autograd.grad(sampled(name)(leaf, pair.log_old, pair.log_ref).sum(), leaf)[0]


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


def pull(name: str, left: float) -> float:
    """Return how hard an estimator pulls mass into a mode that the policy keeps ``left`` of; the forward KL's is 1.

    On-policy, the sum of the downhill step over the second mode's logits (`two_modes`).
    """
    pair = two_modes(left)
    second = slice(VOCABULARY // 2, None)
    gradient = divergences(pair).get(name)
    mean = moments(name, pair)[0] if gradient is None else gradient
    return float(mean[second].sum() / forward_gradient(pair)[second].sum())


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
    "abs": "veRL",
    "k3": "TRL's, without a clamp",
    "w k3": "TRL's with `use_bias_correction_kl`",
    "score k3, clamped": "NeMo-RL's default",
    "w k3, clamped": "NeMo-RL's with `use_on_policy_kl_approximation`",
    "k2, clamped": "OpenRLHF's",
    "k1 in the reward": "veRL, OpenRLHF, TRL's RLOO",
    "low_var_kl in the reward": "veRL",
    ANSWERS: "ours: -log pi of the reference's own answers",
}
