"""RAPO's reference: veRL's worker, whose reference pass is reweighted by each response's reward.

Rewards are known before veRL asks for the reference's log-probs, so reweighting costs nothing: it is a temperature
per sample, which veRL's FSDP and Megatron engines both take (``data["temperature"]`` of shape (batch,)). The per-token
estimators and the nucleus need more than the sampled token's log-prob: for them the pass runs at the rollout's
temperature, names the most likely tokens, and phi is applied to what it returns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import response_from_nested

from rapo_verl.method.config import PER_TOKEN_ESTIMATORS, RapoConfig, rapo_config_from
from rapo_verl.method.reference_tokens import ReferenceTokens, phi_nodes
from rapo_verl.method.reweighting import reward_to_phi, reweight_tokens
from rapo_verl.plan.head import fast_head
from rapo_verl.training.answers import ROWS, with_reference_answers
from rapo_verl.training.engine import FIELDS, HeadSwitch, response_positions
from rapo_verl.training.loss import PHI, rapo_policy_loss


class RapoWorker(DetachActorWorker):
    """veRL's actor, rollout and reference in one worker, with RAPO's reference pass and policy loss.

    Of veRL's worker for separate sampling, which adds keeping older weights aside, and changes nothing else.

    The settings arrive as ``actor_rollout_ref.rapo``. Switched off (`RapoConfig.on`) nothing of veRL's is touched.
    """

    def __init__(self, config: DictConfig, role: str, **kwargs: Any):
        super().__init__(config, role, **kwargs)
        self.rapo = rapo_config_from(OmegaConf.to_container(config.rapo))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build veRL's models, then put RAPO's loss in place of veRL's."""
        # verl 0.9.1 workers/engine_workers.py:539: builds the engines, with no setting for the loss.
        super().init_model()
        fused = self.config.model.get("use_fused_kernels") and self.rapo.per_sample_temperature
        for worker in filter(None, (self.actor, self.ref)):
            if isinstance(worker.engine, HeadSwitch):
                worker.engine.own_head = fast_head(self.config, self.rapo)
            elif self.rapo.exports_tokens or fused or self.rapo.head == "fast":
                raise TypeError(
                    f"veRL's engine here is {type(worker.engine).__name__}, which has not RAPO's head; rapo.head=fast, "
                    "rapo.forward_kl.estimator=topk, full, rapo.reference.reading=nucleus and fused kernels beside "
                    "reading=token run on fsdp, fsdp2 and megatron of NVIDIA devices, and on the CPU"
                )
        if fused and self.ref is not None:
            self.ref.engine.use_linear_head()
        coef = self.rapo.forward_kl.samples_coef
        if not (self._is_actor and self.rapo.on):
            return
        if self.rapo.enabled:
            # use_kl_loss made veRL build the reference; its reverse-KL term is left out of the loss.
            actor = OmegaConf.merge(self.config.actor, {"use_kl_loss": False})
            self.loss_fn = partial(rapo_policy_loss, config=omega_conf_to_dataclass(actor), rapo=self.rapo)
        if coef:
            self.loss_fn = partial(with_reference_answers, policy_loss=self.loss_fn, coef=coef)
        self.actor.set_loss_fn(self.loss_fn)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict | None:
        """Update as veRL does, in mini-batches that are larger by the reference answers in them."""
        rows = tu.pop(data, key=ROWS, default=0)
        if rows:
            # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1855: sets it from the config; the normaliser beside it stays.
            tu.assign_non_tensor(data, mini_batch_size=tu.get_non_tensor_data(data, "mini_batch_size", None) + rows)
        return super().update_actor(data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="ref"))
    def compute_ref_log_prob(self, data: TensorDict) -> TensorDict | None:
        """Return ``log_probs`` of the reward-reweighted reference, jagged (batch, prompt + response), nats.

        With it phi of each response, shape (batch,), as `loss.PHI`, and for the per-token estimators the `FIELDS` of
        its next-token distributions, jagged (batch, response[, k]). None on ranks without outputs.

        Args:
            data: batch with ``rm_scores``, jagged (batch, response): the reward of a response is its sum.
        """
        # verl 0.9.1 workers/engine_workers.py:696: the same pass, at one temperature for all.
        return self._reweighted(super().compute_ref_log_prob, data)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict | None:
        """Return veRL's log-probs of the policy; with LoRA, where asked without the adapters, of RAPO's reference."""
        # verl 0.9.1 trainer/ppo/v1/trainer_base.py:1703: with LoRA the actor without its adapters is the reference.
        if tu.get_non_tensor_data(data, "no_lora_adapter", default=False):
            return self._reweighted(super().compute_log_prob, data)
        return super().compute_log_prob(data)

    def _reweighted(self, reference_pass: Callable[[TensorDict], TensorDict | None], data: TensorDict) -> Any:
        """Return what `compute_ref_log_prob` promises, by one of veRL's passes over the reference."""
        if not self.rapo.enabled:
            return reference_pass(data)
        reference = self.rapo.reference
        phi = reward_to_phi(torch.stack([row.sum() for row in data["rm_scores"].unbind()]), reference)
        temperature = tu.get_non_tensor_data(data, "temperature", default=None)
        if self.rapo.exports_tokens:
            k = 0 if self.rapo.forward_kl.estimator == "full" else reference.top_k
            tu.assign_non_tensor(data, rapo_top_k=k, rapo_phi_min=reference.phi_min)
        elif self.rapo.per_sample_temperature:
            del data["temperature"]
            data["temperature"] = temperature / phi
        output = reference_pass(data)
        if output is None:
            return None
        if self.rapo.exports_tokens:
            output = reweighted_output(output, data, phi.cpu(), self.rapo)
        elif reference.reading == "unnormalized":
            log_probs, offsets = output["log_probs"].values(), output["log_probs"].offsets()
            log_probs = log_probs * phi.to(log_probs).repeat_interleave(offsets.diff())
            output["log_probs"] = torch.nested.nested_tensor_from_jagged(log_probs, offsets)
        output[PHI] = phi.cpu()  # for the loss to log
        return output


def reweighted_output(output: TensorDict, data: TensorDict, phi: torch.Tensor, rapo: RapoConfig) -> TensorDict:
    """Return a reference pass's output with phi applied to its sampled and named tokens.

    Args:
        output: ``log_probs`` and `engine.FIELDS`, jagged (batch, prompt + response[, ...]), at the
            rollout's temperature. For a per-token estimator `FIELDS` come back as a `Target` of the response tokens,
            jagged (batch, response[, k]).
        data: the batch, with ``responses`` and ``response_mask``, jagged (batch, response).
        phi: of each response, shape (batch,).
        rapo: the settings.
    """
    mask, responses = data["response_mask"].cpu(), data["responses"].cpu()
    lengths = responses.offsets().diff()
    log_probs = output["log_probs"]
    positions = response_positions(log_probs, responses)
    named = (response_from_nested(output.pop(name), mask).values() for name in FIELDS)
    sampled, target = reweight_tokens(
        ReferenceTokens(log_probs.values()[positions], *named),
        responses.values(),
        phi.repeat_interleave(lengths),
        reading=rapo.reference.reading,
        top_p=rapo.reference.top_p,
        nodes=phi_nodes(rapo.reference.phi_min),
    )
    values = log_probs.values().index_copy(0, positions, sampled)
    output["log_probs"] = torch.nested.nested_tensor_from_jagged(values, log_probs.offsets())
    if rapo.forward_kl.estimator in PER_TOKEN_ESTIMATORS:
        for name, value in zip(FIELDS, target):
            output[name] = torch.nested.nested_tensor_from_jagged(value, responses.offsets())
    return output
