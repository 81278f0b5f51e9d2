"""The reward-reweighted reference pi_ref^phi(r): the map from reward to phi, and what the power means per token.

Pure torch. Source: arXiv 2510.03865, section 3: pi_hat_ref(y|x) ∝ pi_ref(y|x)^phi(r), phi increasing in the reward.
A high reward leaves the reference as it is (phi = 1); a low one flattens it, so that the forward KL pushes the policy
to spread out there. The normaliser over whole sequences is intractable; three readings of it, p the reference's
next-token distribution at the rollout's temperature (docs/forward-kl.md says what each assumes):

* ``token``: every next-token distribution is tempered and renormalised, p^phi / sum p^phi. That is the reference at
  temperature T / phi.
* ``nucleus``: tempered inside the reference's nucleus alone, which keeps its mass; the tail keeps its shape. The
  nucleus is the smallest set of most likely tokens with mass ``top_p``, of ``top_k`` tokens at most.
* ``unnormalized``: log pi_hat = phi * log pi_ref of the sampled tokens, the normaliser dropped.

Two ways to it. Where a reference pass knows phi and only the sampled tokens count, `rapo_verl.training.worker` runs it
at T / phi (``token``) or multiplies its log-probs (``unnormalized``). `reweight_tokens` gives all readings, for the
sampled and for the named tokens, from a pass that knows no phi (`rapo_verl.method.reference_tokens`).
"""

import torch

from rapo_verl.method.config import ReferenceConfig
from rapo_verl.method.head import Target
from rapo_verl.method.reference_tokens import ReferenceTokens, tail_at


def reward_to_phi(reward: torch.Tensor, config: ReferenceConfig) -> torch.Tensor:
    r"""Return phi(r) in [phi_min, 1], non-decreasing in the reward.

    With u = clamp((r - reward_min) / (reward_max - reward_min), 0, 1):
    ``linear`` phi_min + (1 - phi_min) u; ``power`` phi_min + (1 - phi_min) u^exponent; ``step`` 1 if r >= step_at else
    phi_min.

    Args:
        reward: of each response, shape (batch,).
        config: the shape of phi and its bounds.

    Returns:
        Shape (batch,), fp32.

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


def nucleus(log_prob: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which of the named tokens belong to the nucleus: the fewest most likely ones with mass ``top_p``.

    Args:
        log_prob: nats, shape (n, k), in descending order.
        top_p: in (0, 1]; where k tokens do not reach it, all k are in.

    Returns:
        bool, shape (n, k); the first is always in.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; allowed: (0, 1]")
    before = log_prob.exp().cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    return before < top_p


def reweight_tokens(
    tokens: ReferenceTokens,
    labels: torch.Tensor,
    phi: torch.Tensor,
    *,
    reading: str,
    top_p: float,
    nodes: tuple[float, ...],
) -> tuple[torch.Tensor, Target]:
    """Return the reweighted reference: log pi_hat of the sampled tokens, and the target of a per-token forward KL.

    Args:
        tokens: of the reference pass at the rollout's temperature; n tokens, k of them named.
        labels: sampled tokens, shape (n,), int.
        phi: phi of each token's response, shape (n,), in (0, 1].
        reading: "token", "nucleus" or "unnormalized".
        top_p: of the nucleus.
        nodes: values of phi at which ``tokens.log_tail`` was measured.

    Returns:
        log pi_hat(label), nats, shape (n,); and the `Target`. "token" and "nucleus" sum to one; "unnormalized" to
        sum p^phi >= 1, so that its KL is the generalised one: token's direction, weighted by that sum.

    Raises:
        ValueError: an unknown reading; phi outside (0, 1], named with its row; top_p outside (0, 1].
    """
    if not ((phi > 0) & (phi <= 1)).all():
        row = int((~((phi > 0) & (phi <= 1))).nonzero()[0])
        raise ValueError(f"phi of row {row} is {phi[row].item()}; allowed: (0, 1]")
    phi = phi.to(tokens.log_prob.dtype)
    flat, label = phi[:, None] * tokens.log_prob, phi * tokens.label_log_prob
    if reading == "unnormalized":
        return label, Target(tokens.ids, flat, tail_at(tokens.log_tail, phi, nodes))
    if reading == "token":
        log_tail = tail_at(tokens.log_tail, phi, nodes)
        shift = torch.logaddexp(flat.logsumexp(1), log_tail)
        return label - shift, Target(tokens.ids, flat - shift[:, None], log_tail - shift)
    if reading != "nucleus":
        raise ValueError(f"unknown reading {reading!r}; allowed: token, nucleus, unnormalized")
    inside = nucleus(tokens.log_prob, top_p)
    mass = tokens.log_prob.masked_fill(~inside, -torch.inf).logsumexp(1)
    shift = flat.masked_fill(~inside, -torch.inf).logsumexp(1) - mass
    log_prob = torch.where(inside, flat - shift[:, None], tokens.log_prob)
    # By the ids and not by a threshold: in bf16 many tokens share one logit.
    label_inside = ((tokens.ids == labels[:, None]) & inside).any(1)
    return torch.where(label_inside, label - shift, tokens.label_log_prob), Target(
        tokens.ids, log_prob, tokens.log_tail[:, 0]
    )
