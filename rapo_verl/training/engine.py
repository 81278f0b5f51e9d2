"""veRL's FSDP engines with RAPO's head, and what they share with its Megatron engine (`megatron`).

What the head returns of a micro-batch, for its response tokens alone, is told by the micro-batch's fields:

* ``rapo_top_k`` (0: the whole vocabulary) and ``rapo_phi_min``, of a reference pass: beside ``log_probs`` the fields of
  `rapo_verl.method.reference_tokens.ReferenceTokens`;
* the reference's `FIELDS`, of the actor's pass: beside ``log_probs`` and ``entropy`` the ``forward_kl``. veRL's own
  head is not run beside it: it divides and overwrites the logits that a KL would have saved.

Any other micro-batch goes through veRL's code untouched, unless ``rapo.head`` puts ours into every pass: policy and
old policy then come from one function, and their first ratio is 1 to the last bit. An engine that was told to
`use_linear_head` makes no logits at all: what veRL's fused kernels do at one temperature for all samples,
`rapo_verl.method.linear_head` does at one for each.
"""

import functools
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import slice_input_tensor
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rapo_verl.method.config import FULL_VOCABULARY
from rapo_verl.method.head import Target, head
from rapo_verl.method.linear_head import linear_head
from rapo_verl.method.reference_tokens import phi_nodes, reference_tokens
from rapo_verl.run.combinations import logit_changes

# The reweighted reference of each response token, jagged (batch, response[, k]): a `Target`.
FIELDS = ("rapo_ids", "rapo_log_prob", "rapo_log_tail")


def response_positions(sequences: Any, responses: Any) -> torch.Tensor:
    """Return where, in packed sequences, the logits of the response tokens stand: one place before each token.

    Args:
        sequences: jagged (batch, prompt + response).
        responses: jagged (batch, response), its tokens the last of each sequence.
    """
    ends, starts, lengths = sequences.offsets()[1:], responses.offsets()[:-1], responses.offsets().diff()
    first = torch.repeat_interleave(ends - 1 - lengths - starts, lengths)
    return first + torch.arange(len(first), device=first.device)


def response_index(micro_batch: TensorDict) -> torch.Tensor:
    """Return, for each place of the packed sequences, which response token it predicts, from 1; 0 for none."""
    sequences, responses = micro_batch["input_ids"], micro_batch["responses"]
    index = torch.zeros(len(sequences.values()), dtype=torch.int64, device=sequences.device)
    positions = response_positions(sequences, responses)
    index[positions] = torch.arange(1, len(positions) + 1, device=index.device)
    return index


def run_head(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    index: torch.Tensor,
    micro_batch: TensorDict,
    group: Any = None,
) -> dict[str, torch.Tensor]:
    """Return what the micro-batch asks for, for tokens in any layout: tensors of n rows, zeros off the response.

    Args:
        logits: shape (n, vocabulary), or this rank's columns of it.
        labels: next tokens, shape (n,), laid out by veRL.
        temperature: shape (n,).
        index: `response_index`, laid out as the logits are.
        micro_batch: as above.
        group: process group over which the vocabulary is split, or None.
    """
    check_layout(labels, index, micro_batch)
    rows, token = index > 0, (index - 1).clamp_min(0)
    options: dict[str, Any] = {"temperature": temperature, "rows": rows, "group": group}
    if "rapo_top_k" in micro_batch:
        k = tu.get_non_tensor_data(micro_batch, "rapo_top_k", default=None)
        nodes = phi_nodes(tu.get_non_tensor_data(micro_batch, "rapo_phi_min", default=None))
        tokens = reference_tokens(logits, labels, k=k or _whole_vocabulary(logits, group), nodes=nodes, **options)
        return {"log_probs": tokens.label_log_prob, **dict(zip(FIELDS, tokens[1:]))}
    target = Target(*(micro_batch[name].values()[token] for name in FIELDS)) if FIELDS[0] in micro_batch else None
    # Nothing reads a model's logits after us; an operation that had saved them would stop with an error of autograd's.
    out = head(logits, labels, target=target, gradient_in_place=True, **options)
    found = {"log_probs": out.log_prob}
    if target is not None:
        found["forward_kl"] = out.forward_kl
    if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
        found["entropy"] = out.entropy
    return found


def check_layout(labels: torch.Tensor, index: torch.Tensor, micro_batch: TensorDict) -> None:
    """Raise RuntimeError if veRL's labels and our `response_index` are not of the same tokens, as targets would be."""
    rows = index > 0
    if not torch.equal(labels[rows], micro_batch["responses"].values()[index[rows] - 1]):
        raise RuntimeError(
            "veRL lays its labels out in another way than RAPO its targets; this layout (padding, context or sequence "
            "parallel) is not supported by rapo.forward_kl.estimator=topk, full, rapo.reference.reading=nucleus and "
            "actor_rollout_ref.model.use_fused_kernels=true"
        )


def _whole_vocabulary(logits: torch.Tensor, group: Any) -> int:
    vocabulary = logits.shape[1] * (1 if group is None else torch.distributed.get_world_size(group))
    if vocabulary > FULL_VOCABULARY:
        raise ValueError(
            f"rapo.forward_kl.estimator=full on a vocabulary of {vocabulary}; allowed: up to {FULL_VOCABULARY}, since "
            "each response token would ship its whole distribution. Use estimator=topk"
        )
    return vocabulary


def check_linear(config: Any, bias: Any) -> None:
    """Raise ValueError if a model's logits are more than hidden states times a weight.

    Args:
        config: of Hugging Face.
        bias: of the model's head, or None.
    """
    changes = ["a bias"] * (bias is not None) + logit_changes(config.to_dict())
    if changes:
        what = " and ".join(changes)
        raise ValueError(
            f"the model's head has {what}, which a fused linear head would leave out; set "
            "actor_rollout_ref.model.use_fused_kernels=false"
        )


class HeadSwitch:
    """What `worker` may tell an engine of ours once its model is built; stands before veRL's engine.

    Each has a `use_linear_head`: from then on every pass, none of which has a gradient, goes from hidden states to
    log-probs.
    """

    own_head = False  # whether each pass takes RAPO's, also where veRL's would do
    _linear = False

    def takes_own_head(self, micro_batch: TensorDict) -> bool:
        """Whether a micro-batch's logits go to RAPO's head."""
        if "rapo_top_k" in micro_batch or FIELDS[0] in micro_batch:
            return True
        return self.own_head and not self._linear


class RapoFSDPEngine(HeadSwitch, FSDPEngineWithLMHead):
    """FSDP1 and FSDP2: packed or padded sequences, Ulysses sequence parallelism."""

    def use_linear_head(self) -> None:
        """Do as `HeadSwitch` says."""
        model: Any = getattr(self.module, "_fsdp_wrapped_module", self.module)
        layer = model.get_output_embeddings()
        check_linear(model.config, layer.bias)
        # Inside the head's own call, for which FSDP2 gathers a weight that is not tied.
        layer.forward = functools.partial(self._without_logits, layer)
        # On the instance: veRL's fused kernels have replaced the forward of its class, the actor's too.
        model.forward = functools.partial(self._forward, model)
        self._linear = True

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        """Return veRL's inputs of the model, and what it needs afterwards."""
        if not self._linear:
            return super().prepare_model_inputs(micro_batch)
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:1162: allows its fused kernels one temperature.
        plain = micro_batch.copy()
        tu.assign_non_tensor(plain, use_fused_kernels=False)
        inputs, output_args = super().prepare_model_inputs(plain)
        self._pass = output_args, micro_batch
        return inputs, output_args

    def _forward(self, model: Any, **inputs: Any) -> Any:
        """Return what veRL's fused forward does, from our head."""
        # verl 0.9.1 models/transformers/dense_common.py:82: its form of output, which the engine reads.
        from verl.models.transformers.dense_common import CausalLMOutputForPPO

        log_probs, entropy = model.get_output_embeddings()(model.base_model(**inputs)[0])
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)

    def _without_logits(self, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return log-probs and entropy, shape (batch, length), for hidden states (batch, length, width)."""
        labels, temperature, index, _ = self._laid_out(*self._pass, width=hidden.shape[1])
        check_layout(labels, index, self._pass[1])
        found = linear_head(hidden.flatten(0, 1), layer.weight, labels, temperature=temperature, rows=index > 0)
        return tuple(x.view(hidden.shape[:2]) for x in found)

    def _laid_out(self, output_args: dict, micro_batch: TensorDict, width: int) -> tuple[Any, ...]:
        """Return labels, temperature and response index of each row of the logits; if padded, which rows are real."""
        index, labels = response_index(micro_batch), output_args["input_ids_rmpad_rolled"]
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
            index = torch.nn.functional.pad(index, (0, output_args["pad_size"]))
            if self.use_ulysses_sp:
                index = slice_input_tensor(index, dim=0, padding=False)
            return labels, output_args["temperature_rmpad"], index, None
        lengths = micro_batch["input_ids"].offsets().diff()
        real = (torch.arange(width, device=index.device) < lengths[:, None]).flatten()
        labels, index = (torch.zeros_like(real, dtype=x.dtype).masked_scatter_(real, x) for x in (labels, index))
        return labels, output_args["temperature"].repeat_interleave(width), index, real

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict:
        """Return the model's outputs of a micro-batch, jagged (batch, prompt + response[, ...])."""
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:1332: its head has no place for a KL of ours.
        if not self.takes_own_head(micro_batch):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        logits = output.logits
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        labels, temperature, index, real = self._laid_out(output_args, micro_batch, logits.shape[1])
        # Not logits[0], whose backward makes and fills another tensor of this size.
        flat = logits.squeeze(0) if real is None else logits.flatten(0, 1)
        found = run_head(flat, labels, temperature, index, micro_batch)
        if real is None:
            # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:680: undoes its own padding and sequence parallelism.
            found = {k: self._gather_and_unpad_packed(value, output_args["pad_size"]) for k, value in found.items()}
        else:
            found = {name: value[real] for name, value in found.items()}
        offsets = micro_batch["input_ids"].offsets()
        return {name: torch.nested.nested_tensor_from_jagged(value, offsets) for name, value in found.items()}


class CpuFSDPEngine(RapoFSDPEngine):
    """FSDP2 on gloo; the reference is not "offloaded to the CPU", where it already is."""

    def _build_fsdp_module(self, module: Any) -> Any:
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:459: gives every forward-only model
        # CPUOffloadPolicy(pin_memory=True); pinned memory needs an accelerator.
        forward_only, self.engine_config.forward_only = self.engine_config.forward_only, False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only
