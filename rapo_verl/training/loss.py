"""RAPO's policy loss: veRL's clipped surrogate and entropy bonus, plus alpha times the forward KL.

    L = L_clip(A) - beta * H(pi) + alpha * KL(pi_ref^phi(r) ‖ pi)

The first two terms are veRL's ``ppo_loss`` itself; alpha = ``rapo.forward_kl.coef``, beta = ``actor.entropy_coeff``.
The per-token estimators come from the engine's head (`engine`), the others from the sampled tokens here.
Source: arXiv 2510.03865, section 3.
"""

from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from rapo_verl.method.config import PER_TOKEN_ESTIMATORS, RapoConfig
from rapo_verl.method.forward_kl import LOG_RHO_CLAMP, ForwardKL, forward_kl_estimate

# phi of each response, shape (batch,), as the reference pass used it.
PHI = "rapo_phi"


def rapo_policy_loss(
    config: ActorConfig, model_output: dict, data: TensorDict, dp_group: Any = None, *, rapo: RapoConfig
) -> tuple[torch.Tensor, dict]:
    """Return the loss of one micro-batch and its metrics, in the signature that veRL's engines call.

    Args:
        config: veRL's actor config, ``use_kl_loss`` off (the leash is ours).
        model_output: ``log_probs``, optionally ``entropy``, and for a per-token estimator ``forward_kl``, jagged
            (batch, prompt + response), nats.
        data: micro-batch with ``old_log_probs``, ``ref_log_prob``, ``advantages``, ``response_mask``, jagged
            (batch, response), and `PHI`. NaN in it has stopped the step before (`guards`).
        dp_group: unused.
        rapo: the settings; alpha > 0.

    Returns:
        Scalar loss (scaled for veRL's global-batch normalisation) and metrics ``rapo/*`` beside veRL's.
    """
    # verl 0.9.1 workers/utils/losses.py:57: its clipped surrogate and entropy bonus, called as they are.
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    batch = data.select("response_mask", "old_log_probs", "ref_log_prob").to_padded_tensor()
    mask = batch["response_mask"].bool()
    per_token = rapo.forward_kl.estimator in PER_TOKEN_ESTIMATORS
    estimate = forward_kl_estimate(
        no_padding_2_padding(model_output["log_probs"], data),
        batch["old_log_probs"],
        batch["ref_log_prob"],
        mask,
        # Of the sampled tokens a per-token estimator takes only what is logged.
        estimator="unbiased" if per_token else rapo.forward_kl.estimator,
        rho_max=rapo.forward_kl.rho_max,
    )
    if per_token:
        estimate = estimate._replace(loss=torch.where(mask, no_padding_2_padding(model_output["forward_kl"], data), 0))
    forward_kl = agg_loss(
        loss_mat=estimate.loss, loss_mask=mask, loss_agg_mode=config.loss_agg_mode, **config.global_batch_info
    )
    metrics.update(_metrics(config, estimate, mask, data[PHI], forward_kl))
    return loss + rapo.forward_kl.coef * forward_kl, metrics


def _metrics(
    config: ActorConfig, estimate: ForwardKL, mask: torch.Tensor, phi: torch.Tensor, forward_kl: torch.Tensor
) -> dict[str, Metric]:
    """Return the ``rapo/*`` metrics of one micro-batch, each a share of its mini-batch's mean, minimum or maximum."""

    def token_mean(values: torch.Tensor) -> Metric:
        info = {k: v for k, v in config.global_batch_info.items() if k != "loss_scale_factor"}
        return Metric(AggregationType.SUM, agg_loss(values.float(), mask, "token-mean", **info))

    real = mask.any(dim=1)  # rows that veRL adds to fill a batch have an empty mask
    rho = estimate.log_rho.clamp(max=LOG_RHO_CLAMP).exp()
    # Every key in every micro-batch: veRL gathers them over data-parallel ranks by position.
    return {
        "rapo/forward_kl": Metric(AggregationType.SUM, forward_kl),
        "rapo/forward_kl_clipped_fraction": token_mean(estimate.clipped),
        "rapo/log_rho_mean": token_mean(estimate.log_rho),
        "rapo/rho_max": Metric(AggregationType.MAX, torch.where(mask, rho, 0).max()),
        # E_old[(pi/pi_old) rho] = the reference's mass on what the policy samples: 1 for a normalised reference that
        # the policy covers, below 1 by the mass that is never sampled (heavy-tailed: read its trend).
        "rapo/reference_mass_sampled": token_mean(estimate.ratio * rho),
        "rapo/phi_mean": token_mean(phi[:, None].expand_as(mask)),
        "rapo/phi_min": Metric(AggregationType.MIN, torch.where(real, phi, 1.0).min()),
        "rapo/phi_max": Metric(AggregationType.MAX, torch.where(real, phi, 0.0).max()),
    }
