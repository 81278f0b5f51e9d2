"""What the methods of the ladder differ in: their settings, advantages and losses.

veRL's own advantages, policy losses and KL penalties and the library's forward KL, by name; what neither has (SimKO,
the analytic pass@k advantage) is written down here after its paper.
"""

import math
from dataclasses import dataclass, fields

import torch
from verl.trainer.ppo.core_algos import agg_loss, get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from rapo_verl.method.forward_kl import forward_kl_estimate
from rapo_verl.method.reference_answers import reference_answers_loss

# As in recipe/experiment/toy_cpu.yaml.
GROUP, LR, CLIP = 8, 5e-4, 0.2


@dataclass(frozen=True)
class Settings:
    """What a method may change; the defaults are GRPO without any leash."""

    n: int = GROUP
    lr: float = LR
    # verl's name of the policy loss, "simko", or "none": no reinforcement learning at all.
    surrogate: str = "vanilla"
    # Share of tokens that clip_cov clips and kl_cov pulls back, and the latter's coefficient.
    cov_ratio: float = 0.0
    cov_kl: float = 0.0
    # simko: share of the gradient that goes to the three likeliest tokens, at the 20 % tokens of highest entropy.
    top_share: float = 0.0
    # verl's name of the advantage estimator, "passk" (analytic, over subsets of `passk`) or "negative".
    advantage: str = "grpo"
    passk: int = 1
    # negative: advantage of a right response, where a wrong one has -1.
    positive: float = 0.0
    entropy: float = 0.0
    # A KL against the base: verl's kl_penalty by name, "ratio_k3" (times policy / old policy) or "k1_reward".
    kl: str = ""
    kl_coef: float = 0.0
    # RAPO's forward KL.
    estimator: str = "bounded"
    alpha: float = 0.0
    phi_min: float = 1.0
    # Reference answers: samples of the base a prompt, coefficient, weight of a wrong one; "prompt", "sample" or
    # "mixture" (with the policy's own responses, under the balance heuristic).
    m: int = 0
    answers: float = 0.0
    omega_wrong: float = 0.0
    weights: str = "prompt"
    # DPH-RL: prompts that the base solves at this rate or above get the answers' term instead of the surrogate, the
    # others the surrogate alone. Above 1: all prompts get both.
    rehearse_from: float = 2.0

    def name(self) -> str:
        """Return what differs from the defaults: a label and a file name."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        values = (getattr(self, name) for name in changed)
        pairs = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in zip(changed, values))
        return ",".join(pairs) or "default"


@dataclass
class Batch:
    """Responses, row by row, and what is known of each.

    Attributes:
        prompt: index of its prompt within the step, [rows].
        tokens: ids [rows, MAX_TOKENS].
        log_prob: of the tokens under the model that drew them, same shape.
        mask: bool, same shape: up to the end token.
        reward: 1 for right, 0 for wrong, [rows].
        ref_log_prob: of the tokens under the (reweighted) reference.
        advantages: same shape.
        weight: of each token of an answer of the base, [rows].
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    log_prob: torch.Tensor
    mask: torch.Tensor
    reward: torch.Tensor
    ref_log_prob: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    def rows(self, keep: torch.Tensor) -> "Batch":
        """Return the rows that a mask or an index names."""
        return Batch(**{k: None if v is None else v[keep] for k, v in vars(self).items()})


def advantages_of(settings: Settings, rollout: Batch) -> torch.Tensor:
    """Return the advantages of a step's responses, shape of the tokens."""
    if settings.advantage == "negative":
        return torch.where(rollout.reward > 0, settings.positive, -1.0)[:, None] * rollout.mask
    if settings.advantage == "passk":
        return _passk_advantages(rollout.reward.view(-1, settings.n), settings.passk).view(-1, 1) * rollout.mask
    last = rollout.mask.sum(1, keepdim=True) - 1
    scores = torch.zeros_like(rollout.log_prob).scatter(1, last, rollout.reward[:, None])
    if settings.kl == "k1_reward":
        scores -= settings.kl_coef * kl_penalty(rollout.log_prob, rollout.ref_log_prob, "kl") * rollout.mask
    config = {"norm_adv_by_std_in_grpo": True}
    advantages, _ = get_adv_estimator_fn(settings.advantage)(
        token_level_rewards=scores, response_mask=rollout.mask, index=rollout.prompt.numpy(), config=config
    )
    return advantages


def _passk_advantages(reward: torch.Tensor, k: int) -> torch.Tensor:
    """Return the analytic advantages [prompts, n] of pass@k over all k-subsets of a group; arXiv 2508.10751."""
    n = reward.shape[1]
    wrong = [n - int(right) for right in reward.sum(1)]
    none = torch.tensor([[math.comb(w, k) / math.comb(n, k)] for w in wrong])
    none_beside = torch.tensor([[math.comb(max(w - 1, 0), k - 1) / math.comb(n - 1, k - 1)] for w in wrong])
    deviation = (none * (1 - none)).sqrt() + 1e-6
    return torch.where(reward > 0, none, none - none_beside) / deviation


def answers_loss(log_prob: torch.Tensor, answers: Batch) -> torch.Tensor:
    """Return the mean over the prompts that have answers of the mean of -log pi over the tokens of those."""
    # A prompt's token weights times lengths sum to 1, so that this is the number of prompts.
    prompts = (answers.weight * answers.mask.sum(1)).sum()
    return reference_answers_loss(log_prob, answers.mask, answers.weight / prompts.clamp(min=1e-9))


def rollout_loss(full: torch.Tensor, log_prob: torch.Tensor, batch: Batch, settings: Settings) -> torch.Tensor:
    """Return the policy loss, the KL terms and the entropy bonus on the policy's own responses."""
    old, ref, mask = batch.log_prob, batch.ref_log_prob, batch.mask
    steered = log_prob if settings.surrogate != "simko" else _simko(full, log_prob, batch, settings.top_share)
    name = "vanilla" if settings.surrogate == "simko" else settings.surrogate
    loss, _ = get_policy_loss_fn(name)(old, steered, batch.advantages, mask, "token-mean", config=_actor(settings))
    terms = torch.zeros_like(log_prob)
    if settings.kl == "ratio_k3":
        terms = terms + settings.kl_coef * (log_prob - old).exp() * kl_penalty(log_prob, ref, "k3")
    elif settings.kl and settings.kl != "k1_reward":
        terms = terms + settings.kl_coef * kl_penalty(log_prob, ref, settings.kl)
    if settings.alpha:
        estimate = forward_kl_estimate(log_prob, old, ref, mask, estimator=settings.estimator, rho_max=6.0)
        terms = terms + settings.alpha * estimate.loss
    if settings.entropy:
        terms = terms + settings.entropy * (full.exp() * full).sum(-1)
    return loss + agg_loss(terms, mask, "token-mean")


def _simko(full: torch.Tensor, log_prob: torch.Tensor, batch: Batch, share: float) -> torch.Tensor:
    """Return log_prob with SimKO's gradient (arXiv 2510.14807), at the 20 % tokens of highest entropy.

    Of a right response `share` of it goes to the three likeliest tokens; of a wrong one it is 1.1 times as large where
    the token was the likeliest.
    """
    probs = full.detach().exp()
    entropy = -(probs * full.detach()).sum(-1)
    forking = batch.mask & (entropy >= entropy[batch.mask].quantile(0.8))
    right = forking & (batch.reward > 0)[:, None]
    top = full.topk(3, -1)
    spread = (1 - share) * log_prob + share * top.values.mean(-1)
    harder = 1.1 * log_prob
    likeliest = forking & ~right & (top.indices[..., 0] == batch.tokens)
    steered = torch.where(right, spread, torch.where(likeliest, harder, log_prob))
    # The value stays that of the sampled token: only the gradient is redistributed.
    return log_prob.detach() + steered - steered.detach()


def _actor(settings: Settings) -> ActorConfig:
    """Return the part of veRL's actor config that its policy losses read."""
    ratios = {"clip_cov_ratio": settings.cov_ratio, "kl_cov_ratio": settings.cov_ratio} if settings.cov_ratio else {}
    policy_loss = PolicyLossConfig(ppo_kl_coef=settings.cov_kl, **ratios)
    return ActorConfig(
        strategy="fsdp2", rollout_n=settings.n, ppo_micro_batch_size_per_gpu=1, clip_ratio=CLIP, clip_ratio_low=CLIP,
        clip_ratio_high=CLIP, policy_loss=policy_loss,
    )  # fmt: skip


def mixture_weights(ref_log_prob: torch.Tensor, old_log_prob: torch.Tensor, *, n: int, m: int) -> torch.Tensor:
    r"""Return rho = (n + m) ref(y) / (n pi_old(y) + m ref(y)): the balance heuristic for n + m answers to a prompt.

    For n answers of the old policy and m of the reference together, (1 / (n + m)) sum_i rho_i f(y_i) is an unbiased
    estimate of E_ref[f], whoever gave y_i; with f = -log pi it has the forward KL's gradient, on- and off-policy. rho
    is at most (n + m) / m, where ref / pi_old has no bound.

    Args:
        ref_log_prob: log ref(y) of whole answers, any shape, nats.
        old_log_prob: log pi_old(y), same shape.
        n: answers of the old policy, at least 0.
        m: answers of the reference, at least 1.

    Returns:
        Same shape, at least fp32, detached.

    Source: Veach and Guibas, SIGGRAPH 1995 (balance heuristic).
    """
    if m < 1 or n < 0:
        raise ValueError(
            f"n is {n} and m is {m}; allowed: n >= 0, m >= 1, since without answers of it rho is unbounded"
        )
    dtype = torch.promote_types(ref_log_prob.dtype, torch.float32)
    # .detach(): a weight, not a term of the loss. exp may overflow to infinity: the weight is then 0, as it should be.
    ratio = (old_log_prob.to(dtype) - ref_log_prob.to(dtype)).detach().exp()
    return (n + m) / (m + n * ratio)
