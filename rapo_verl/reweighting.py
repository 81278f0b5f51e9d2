"""The reward-reweighted reference pi_ref^phi(r): the map from reward to phi, and what the power means per token.

Pure torch. Source: arXiv 2510.03865, section 3: pi_hat_ref(y|x) ∝ pi_ref(y|x)^phi(r), phi increasing in the reward.
A high reward leaves the reference as it is (phi = 1); a low one flattens it, so that the forward KL pushes the policy
to spread out there. The normaliser over whole sequences is intractable; two readings of it:

* ``token``: every next-token distribution is tempered and renormalised, softmax(phi * logits). That is the reference
  at temperature T / phi, at no cost beyond the reference pass itself.
* ``unnormalized``: log pi_hat = phi * log pi_ref of the sampled tokens, the normaliser dropped.
"""

import torch

from rapo_verl.config import ReferenceConfig


def reward_to_phi(reward: torch.Tensor, config: ReferenceConfig) -> torch.Tensor:
    r"""Return phi(r) in [phi_min, 1], non-decreasing in the reward.

    With u = clamp((r - reward_min) / (reward_max - reward_min), 0, 1):
    ``linear`` phi_min + (1 - phi_min) u; ``power`` phi_min + (1 - phi_min) u^exponent; ``step`` 1 if r >= step_at else
    phi_min.

    Args:
        reward: scalar reward of each response, shape (batch,), float, finite.
        config: the shape of phi and its bounds.

    Returns:
        phi, shape (batch,), fp32, no unit.

    Raises:
        ValueError: a reward that is not finite, named with its row; an unknown shape.

    Source: arXiv 2510.03865, section 3; the paper leaves phi open beyond monotone and in [0, 1].
    """
    reward = reward.detach().float()
    if not torch.isfinite(reward).all():
        row = int((~torch.isfinite(reward)).nonzero()[0])
        raise ValueError(f"reward of sample {row} is {reward[row].item()}; phi(r) needs finite rewards")
    u = ((reward - config.reward_min) / (config.reward_max - config.reward_min)).clamp(0, 1)
    if config.phi == "step":
        u = (reward >= config.step_at).float()
    elif config.phi == "power":
        u = u**config.exponent
    elif config.phi != "linear":
        raise ValueError(f"unknown phi {config.phi!r}; allowed: linear, step, power")
    # Written so that u = 1 gives exactly 1 and u = 0 exactly phi_min.
    return torch.where(u == 1, torch.ones_like(u), config.phi_min + (1 - config.phi_min) * u)


def response_phi(rm_scores: torch.Tensor, config: ReferenceConfig) -> torch.Tensor:
    """Return phi of each response from veRL's per-token rewards: phi(sum over the response).

    Args:
        rm_scores: jagged (batch, response), veRL's field of that name; a verifier's reward sits on the last token.
        config: the shape of phi and its bounds.

    Returns:
        phi, shape (batch,), fp32, no unit.

    Raises:
        ValueError: a reward that is not finite.
    """
    return reward_to_phi(torch.stack([row.sum() for row in rm_scores.unbind()]), config)


def reference_temperature(phi: torch.Tensor, *, temperature: float, reading: str) -> torch.Tensor:
    """Return the temperature of the reference pass for each sample.

    Args:
        phi: shape (batch,), fp32, in (0, 1].
        temperature: sampling temperature T of the rollout, > 0.
        reading: "token" (T / phi) or "unnormalized" (T).

    Returns:
        Shape (batch,), fp32.

    Raises:
        ValueError: an unknown reading.
    """
    if reading == "token":
        return temperature / phi
    if reading == "unnormalized":
        return torch.full_like(phi, temperature)
    raise ValueError(f"unknown reading {reading!r}; allowed: token, unnormalized")


def reweight_log_prob(ref_log_prob: torch.Tensor, phi: torch.Tensor, *, reading: str) -> torch.Tensor:
    """Return log pi_hat_ref of the sampled tokens from the reference pass at `reference_temperature`.

    Args:
        ref_log_prob: nats, shape (batch, ...), from the reference pass; masked positions may hold anything.
        phi: shape (batch,), broadcast over the rest.
        reading: "token" (already tempered: returned unchanged) or "unnormalized" (phi * log pi_ref).

    Returns:
        Nats, shape and dtype of ``ref_log_prob``.

    Raises:
        ValueError: an unknown reading.
    """
    if reading == "token":
        return ref_log_prob
    if reading == "unnormalized":
        shape = (-1,) + (1,) * (ref_log_prob.dim() - 1)
        return ref_log_prob * phi.view(shape).to(ref_log_prob.dtype)
    raise ValueError(f"unknown reading {reading!r}; allowed: token, unnormalized")
