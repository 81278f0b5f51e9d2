"""RAPO's reference: veRL's worker, whose reference pass is reweighted by each response's reward.

Rewards are known before veRL asks for the reference's log-probs, so reweighting costs nothing: it is a temperature
per sample, which veRL's FSDP and Megatron engines both take (``data["temperature"]`` of shape (batch,)).
"""

from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker

from rapo_verl.config import rapo_config_from
from rapo_verl.policy_loss import rapo_policy_loss
from rapo_verl.reweighting import reference_temperature, response_phi, reweight_log_prob


class RapoWorker(ActorRolloutRefWorker):
    """veRL's actor, rollout and reference in one worker, with RAPO's reference pass and policy loss.

    The settings arrive as ``actor_rollout_ref.rapo``. Switched off (alpha = 0) nothing of veRL's is touched.
    """

    def __init__(self, config: DictConfig, role: str, **kwargs: Any):
        super().__init__(config, role, **kwargs)
        self.rapo = rapo_config_from(OmegaConf.to_container(config.rapo))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build veRL's models, then put RAPO's loss in place of veRL's."""
        super().init_model()
        if self.rapo.enabled and self._is_actor:
            # use_kl_loss made veRL build the reference; its reverse-KL term is left out of the loss.
            actor = OmegaConf.merge(self.config.actor, {"use_kl_loss": False})
            self.loss_fn = partial(rapo_policy_loss, config=omega_conf_to_dataclass(actor), rapo=self.rapo)
            self.actor.set_loss_fn(self.loss_fn)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="ref"))
    def compute_ref_log_prob(self, data: TensorDict) -> TensorDict | None:
        """Return ``log_probs`` of the reward-reweighted reference, jagged (batch, prompt + response), nats.

        Args:
            data: batch with ``rm_scores``, jagged (batch, response): the reward of a response is its sum.

        Returns:
            veRL's output, or None on ranks without outputs.
        """
        if not self.rapo.enabled:
            return super().compute_ref_log_prob(data)
        reference = self.rapo.reference
        phi = response_phi(data["rm_scores"], reference)
        temperature = tu.get_non_tensor_data(data, "temperature", default=None)
        if self.rapo.reweights and reference.reading == "token":
            del data["temperature"]
            data["temperature"] = reference_temperature(phi, temperature=temperature, reading=reference.reading)
        output = super().compute_ref_log_prob(data)
        if output is None:
            return None
        log_probs = output["log_probs"]
        if reference.reading == "unnormalized":
            rows = [reweight_log_prob(x[None], p[None], reading=reference.reading)[0] for x, p in zip(log_probs, phi)]
            output["log_probs"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return output
