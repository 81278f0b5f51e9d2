"""RAPO's head inside veRL's engines: mixins for its FSDP and Megatron engines, registered in `plugin`.

A micro-batch asks for it by its fields, on response tokens only; any other goes through veRL's code untouched:

* the reference pass carries ``rapo_top_k`` (0: the whole vocabulary) and ``rapo_phi_min``, and gets, beside
  ``log_probs``, the fields of `rapo_verl.method.reference_tokens.ReferenceTokens`;
* the actor's pass carries the reference's `FIELDS`, and gets ``log_probs``, ``entropy`` and ``forward_kl`` from one
  function. veRL's own head is not run beside it: it divides and overwrites the logits that a KL would have saved.

An engine that was told to `use_linear_head` makes no logits at all: what veRL's fused kernels do at one temperature for
all samples, `rapo_verl.method.linear_head` does at one for each.
"""

import functools
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import slice_input_tensor

from rapo_verl.method.config import FULL_VOCABULARY
from rapo_verl.method.head import Target, head
from rapo_verl.method.linear_head import linear_head
from rapo_verl.method.reference_tokens import phi_nodes, reference_tokens
from rapo_verl.run.head_config import logit_changes

# The reweighted reference of each response token, jagged (batch, response[, k]): a `Target`.
FIELDS = ("rapo_ids", "rapo_log_prob", "rapo_log_tail")


def asks_for_head(micro_batch: TensorDict) -> bool:
    """Whether a micro-batch is one for RAPO's head."""
    return "rapo_top_k" in micro_batch or FIELDS[0] in micro_batch


def response_positions(sequences: Any, responses: Any) -> torch.Tensor:
    """Return where, in packed sequences, the logits of the response tokens stand: one place before each token.

    Args:
        sequences: jagged (batch, prompt + response).
        responses: jagged (batch, response), its tokens the last of each sequence.

    Returns:
        Shape (response tokens), int64, in the order of ``responses.values()``.
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
    """Return what the micro-batch asks for, for tokens in any layout.

    Args:
        logits: shape (n, vocabulary), or this rank's columns of it.
        labels: next tokens, shape (n,), laid out by veRL.
        temperature: shape (n,).
        index: `response_index`, laid out as the logits are.
        micro_batch: as above.
        group: process group over which the vocabulary is split, or None.

    Returns:
        Tensors of n rows, zeros off the response.

    Raises:
        RuntimeError: labels and index are laid out differently, so that targets would belong to other tokens.
        ValueError: from the head.
    """
    rows, token = index > 0, (index - 1).clamp_min(0)
    _check_layout(labels, index, micro_batch)
    options: dict[str, Any] = {"temperature": temperature, "rows": rows, "group": group}
    if "rapo_top_k" in micro_batch:
        k = tu.get_non_tensor_data(micro_batch, "rapo_top_k", default=None)
        nodes = phi_nodes(tu.get_non_tensor_data(micro_batch, "rapo_phi_min", default=None))
        tokens = reference_tokens(logits, labels, k=k or _whole_vocabulary(logits, group), nodes=nodes, **options)
        return {"log_probs": tokens.label_log_prob, **dict(zip(FIELDS, tokens[1:]))}
    target = Target(*(micro_batch[name].values()[token] for name in FIELDS))
    # Nothing reads a model's logits after us; an operation that had saved them would stop with an error of autograd's.
    out = head(logits, labels, target=target, gradient_in_place=True, **options)
    found = {"log_probs": out.log_prob, "forward_kl": out.forward_kl}
    if tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False):
        found["entropy"] = out.entropy
    return found


def _check_layout(labels: torch.Tensor, index: torch.Tensor, micro_batch: TensorDict) -> None:
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
        config: Hugging Face config of the model.
        bias: of its head, or None.
    """
    changes = ["a bias"] * (bias is not None) + logit_changes(config.to_dict())
    if changes:
        what = " and ".join(changes)
        raise ValueError(
            f"the model's head has {what}, which a fused linear head would leave out; set "
            "actor_rollout_ref.model.use_fused_kernels=false"
        )


class FSDPHead:
    """For veRL's FSDP engines: packed or padded sequences, Ulysses sequence parallelism."""

    _linear = False

    def use_linear_head(self: Any) -> None:
        """Let every pass of this engine, which has none with a gradient, go from hidden states to log-probs."""
        model = getattr(self.module, "_fsdp_wrapped_module", self.module)
        layer = model.get_output_embeddings()
        check_linear(model.config, layer.bias)
        # Inside the head's own call, for which FSDP2 gathers a weight that is not tied.
        layer.forward = functools.partial(self._without_logits, layer)
        # On the instance: veRL's fused kernels have replaced the forward of its class, the actor's too.
        model.forward = functools.partial(self._forward, model)
        self._linear = True

    def prepare_model_inputs(self: Any, micro_batch: TensorDict) -> tuple[dict, dict]:
        """Return veRL's inputs of the model, and what it needs afterwards."""
        if not self._linear:
            return super().prepare_model_inputs(micro_batch)  # type: ignore[misc]
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:1162 allows its fused kernels one temperature.
        plain = micro_batch.copy()
        tu.assign_non_tensor(plain, use_fused_kernels=False)
        inputs, output_args = super().prepare_model_inputs(plain)  # type: ignore[misc]
        self._pass = output_args, micro_batch
        return inputs, output_args

    def _forward(self: Any, model: Any, **inputs: Any) -> Any:
        """Return what veRL's fused forward does (verl 0.9.1 models/transformers/dense_common.py:82)."""
        from verl.models.transformers.dense_common import CausalLMOutputForPPO

        log_probs, entropy = model.get_output_embeddings()(model.base_model(**inputs)[0])
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)

    def _without_logits(self: Any, layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return log-probs and entropy, shape (batch, length), for hidden states (batch, length, width)."""
        labels, temperature, index, _ = self._laid_out(*self._pass, width=hidden.shape[1])
        _check_layout(labels, index, self._pass[1])
        found = linear_head(hidden.flatten(0, 1), layer.weight, labels, temperature=temperature, rows=index > 0)
        return tuple(x.view(hidden.shape[:2]) for x in found)

    def _laid_out(self: Any, output_args: dict, micro_batch: TensorDict, width: int) -> tuple[Any, ...]:
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
        self: Any, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict:
        """Return the model's outputs of a micro-batch, jagged (batch, prompt + response[, ...])."""
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:1313: its head has no place for a KL of ours.
        if not asks_for_head(micro_batch):
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)  # type: ignore[misc]
        logits = output.logits
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        labels, temperature, index, real = self._laid_out(output_args, micro_batch, logits.shape[1])
        # Not logits[0], whose backward makes and fills another tensor of this size.
        flat = logits.squeeze(0) if real is None else logits.flatten(0, 1)
        found = run_head(flat, labels, temperature, index, micro_batch)
        if real is None:
            found = {k: self._gather_and_unpad_packed(value, output_args["pad_size"]) for k, value in found.items()}
        else:
            found = {name: value[real] for name, value in found.items()}
        offsets = micro_batch["input_ids"].offsets()
        return {name: torch.nested.nested_tensor_from_jagged(value, offsets) for name, value in found.items()}


class MegatronHead:
    """For veRL's Megatron engine: tensor-, sequence- and context-parallel, packed (thd) or padded (bshd)."""

    _linear = False

    def use_linear_head(self: Any) -> None:
        """Let every pass of this engine, which has none with a gradient, go from hidden states to log-probs."""
        from verl.utils.megatron_utils import unwrap_model

        if self.engine_config.use_fused_kernels:
            from verl.models.mcore.model_forward_fused import unpatch_fused_forward

            # verl 0.9.1 workers/engine/megatron/transformer_impl.py:522: its fused forward is not in our way then.
            for chunk in self.module:
                unpatch_fused_forward(chunk)
            self.engine_config.use_fused_kernels = False
        for layer in (m.output_layer for m in map(unwrap_model, self.module) if m.post_process):
            check_linear(self.model_config.hf_config, layer.bias)
            layer.forward = functools.partial(self._hidden_states, layer)
        self._linear = True

    def _hidden_states(self: Any, layer: Any, hidden: Any, weight: Any = None, **_: Any) -> tuple[Any, None]:
        """Return, where Megatron expects this rank's logits, the hidden states (length, batch, width)."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        self._head_weight = layer.weight if weight is None else weight  # given where it is the embedding's
        return (gather_from_sequence_parallel_region(hidden) if layer.sequence_parallel else hidden), None

    def _lm_head_logits_processor(
        self: Any,
        logits: torch.Tensor,
        label: torch.Tensor,
        temperature: torch.Tensor,
        *,
        batch: TensorDict,
        data_format: str,
        **options: Any,
    ) -> dict:
        # verl 0.9.1 workers/engine/megatron/transformer_impl.py:1191: divides the logits in place, and its
        # cross-entropy overwrites them (megatron.core tensor_parallel/cross_entropy.py).
        if not asks_for_head(batch) and not self._linear:
            options |= {"batch": batch, "data_format": data_format}
            return super()._lm_head_logits_processor(logits, label, temperature, **options)  # type: ignore[misc]
        from megatron.core import parallel_state
        from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

        index = torch.nested.nested_tensor_from_jagged(response_index(batch), batch["input_ids"].offsets())
        if data_format == "thd":
            config = self.engine_config
            bucket = config.pad_to_length_bucket if config.pad_to_length else None
            cp_size = tu.get_non_tensor_data(batch, "local_cp_size", default=None)
            index = preprocess_thd_engine(index, local_cp_size=cp_size, pad_to_length_bucket=bucket)[0]
        else:
            width = tu.get_non_tensor_data(batch, "forced_max_seqlen", default=None)
            index = preprocess_bshd_engine(index, forced_max_seqlen=width)[0]
        group = parallel_state.get_tensor_model_parallel_group()
        shape, flat = label.shape[:2], (label.flatten(), temperature.flatten(), index.flatten())
        if flat[2].shape != flat[0].shape:
            raise RuntimeError(f"veRL's labels have shape {tuple(shape)}, RAPO's targets {tuple(index.shape)}")
        group = group if torch.distributed.get_world_size(group) > 1 else None
        if asks_for_head(batch):
            found = run_head(logits.flatten(0, 1), *flat, batch, group)
        else:
            # Megatron has made the last stage's output fp32, from the weight's dtype.
            hidden, rows = logits.flatten(0, 1).to(self._head_weight.dtype), flat[2] > 0
            _check_layout(flat[0], flat[2], batch)
            log_prob, entropy = linear_head(
                hidden, self._head_weight, flat[0], temperature=flat[1], rows=rows, group=group
            )
            found = {"log_probs": log_prob, "entropy": entropy}
        return {name: value.unflatten(0, shape) for name, value in found.items()}
