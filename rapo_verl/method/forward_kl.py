"""Sample estimators of the forward KL(reference ‖ policy), the term of RAPO's loss.

Pure torch. All functions work on log-probabilities (nats) of the *sampled* tokens, drawn from the old policy, and
compute at least in fp32. Source: arXiv 2510.03865, section 3 (``paper``).
"""

import math
from typing import NamedTuple

import torch

# |log rho| is clamped here before exp, as verl does in core_algos.kl_penalty: e^20 still has a finite square in fp32.
LOG_RHO_CLAMP = 20.0


class ForwardKL(NamedTuple):
    """A loss term per sampled token and what to log about it.

    Attributes:
        loss: at least fp32, shape of the inputs, nats; its gradient is the estimator's, zero at masked positions.
        log_rho: same dtype and shape, detached: log(reference / policy), unclamped, zero at masked positions.
        ratio: same dtype and shape, detached: policy / old policy, zero at masked positions.
        clipped: bool, same shape: rho was beyond the bound (or the numerical clamp) there.
    """

    loss: torch.Tensor
    log_rho: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def forward_kl_estimate(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    ref_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    estimator: str,
    rho_max: float = math.inf,
) -> ForwardKL:
    r"""Return the forward-KL loss per sampled token, y ~ pi_old.

    With rho = pi_ref / pi and w = pi / pi_old:

    * ``paper``: rho log rho - rho + 1, differentiated as it stands. On-policy its value estimates KL(ref ‖ pi); its
      expected gradient is that of 1/2 E_ref[(log pi - log ref)^2], which is not the forward KL's.
    * ``unbiased``: w (rho log rho - rho + 1). Expected value KL(ref ‖ pi) and expected gradient exactly the forward
      KL's, on- and off-policy; d/dlog pi = w (1 - rho). Where ref is not normalised, the generalised KL
      sum(ref log(ref/pi) - ref + pi).
    * ``bounded``: the same with rho log rho - rho + 1 continued beyond ``rho_max`` by its tangent, so that
      d/dlog pi = w (1 - min(rho, rho_max)): biased towards a weaker pull where the policy misses a mode of the
      reference, but never without one. Its value underestimates the KL there.

    Args:
        log_prob: log pi(y_t), shape (batch, response), float; the only argument that receives a gradient.
        old_log_prob: log pi_old(y_t), same shape.
        ref_log_prob: log of the (reweighted) reference at y_t, same shape.
        response_mask: bool or 0/1, same shape; elsewhere the others may hold anything, NaN included.
        estimator: "paper", "unbiased" or "bounded".
        rho_max: bound of ``bounded``, > 1.

    Returns:
        `ForwardKL`.

    Raises:
        ValueError: unknown estimator, shapes that differ, rho_max <= 1.

    Source: arXiv 2510.03865 (``paper``); the gradient identities are proved by enumeration in tests/test_forward_kl.py.
    """
    if not log_prob.shape == old_log_prob.shape == ref_log_prob.shape == response_mask.shape:
        raise ValueError(
            "log_prob, old_log_prob, ref_log_prob and response_mask must have one shape, got "
            f"{tuple(log_prob.shape)}, {tuple(old_log_prob.shape)}, {tuple(ref_log_prob.shape)}, "
            f"{tuple(response_mask.shape)}"
        )
    if not rho_max > 1:
        raise ValueError(f"rho_max must be > 1, got {rho_max}")
    mask = response_mask.bool()
    # NaN at masked positions must not reach the arithmetic: nan * 0 is nan, in values and in gradients.
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=log_prob.device)
    log_prob, old_log_prob, ref_log_prob = (
        torch.where(mask, x.to(dtype), zero) for x in (log_prob, old_log_prob.detach(), ref_log_prob.detach())
    )
    log_rho = ref_log_prob - log_prob
    if estimator == "paper":
        d = log_rho.clamp(-LOG_RHO_CLAMP, LOG_RHO_CLAMP)
        loss, bound = d.exp() * d - d.exp() + 1, LOG_RHO_CLAMP
    elif estimator in ("unbiased", "bounded"):
        bound = min(math.log(rho_max), LOG_RHO_CLAMP) if estimator == "bounded" else LOG_RHO_CLAMP
        loss = _ratio_weighted(log_prob, old_log_prob, log_rho.detach(), log_rho_max=bound)
    else:
        raise ValueError(f"unknown estimator {estimator!r}; allowed: paper, unbiased, bounded")
    # .detach(): the rest is for logging.
    return ForwardKL(
        loss=torch.where(mask, loss, zero),
        log_rho=log_rho.detach(),
        ratio=torch.where(mask, _ratio(log_prob, old_log_prob), zero).detach(),
        clipped=log_rho.detach() > bound,
    )


def _ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    return (log_prob - old_log_prob).clamp(-LOG_RHO_CLAMP, LOG_RHO_CLAMP).exp()


def _ratio_weighted(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, log_rho: torch.Tensor, *, log_rho_max: float
) -> torch.Tensor:
    """Return w g(rho) with gradient w (1 - min(rho, rho_max)), g the estimator continued by its tangent."""
    # .detach(): the gradient is written down below instead of being left to autograd, which would lose it beyond
    # every clamp (and turn its sign, since w g would then be differentiated through w alone).
    ratio = _ratio(log_prob.detach(), old_log_prob)
    rho = log_rho.clamp(max=LOG_RHO_CLAMP).exp()
    rho_inside = log_rho.clamp(max=log_rho_max).exp()
    inside = rho_inside * log_rho.clamp(-LOG_RHO_CLAMP, log_rho_max) - rho_inside + 1
    value = ratio * (inside + (rho - rho_inside) * log_rho_max)
    coefficient = ratio * (1 - rho_inside)
    return value + coefficient * (log_prob - log_prob.detach())
