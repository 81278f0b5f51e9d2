"""RAPO's head inside veRL's engines: mixins for its FSDP and Megatron engines, registered in `rapo_verl.plugin`.

A micro-batch asks for it by its fields, on response tokens only; any other goes through veRL's code untouched:

* the reference pass carries ``rapo_top_k`` (0: the whole vocabulary) and ``rapo_phi_min``, and gets, beside
  ``log_probs``, the fields of `rapo_verl.reference_tokens.ReferenceTokens`;
* the actor's pass carries the reference's `FIELDS`, and gets ``log_probs``, ``entropy`` and ``forward_kl`` from one
  function. veRL's own head is not run beside it: it divides and overwrites the logits that a KL would have saved.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.ulysses import slice_input_tensor

from rapo_verl.config import FULL_VOCABULARY
from rapo_verl.head import Target, head
from rapo_verl.reference_tokens import phi_nodes, reference_tokens

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
    if not torch.equal(labels[rows], micro_batch["responses"].values()[token[rows]]):
        raise RuntimeError(
            "veRL lays its labels out in another way than RAPO its targets; this layout (padding, context or sequence "
            "parallel) is not supported by rapo.forward_kl.estimator=topk, full or rapo.reference.reading=nucleus"
        )
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


def _whole_vocabulary(logits: torch.Tensor, group: Any) -> int:
    vocabulary = logits.shape[1] * (1 if group is None else torch.distributed.get_world_size(group))
    if vocabulary > FULL_VOCABULARY:
        raise ValueError(
            f"rapo.forward_kl.estimator=full on a vocabulary of {vocabulary}; allowed: up to {FULL_VOCABULARY}, since "
            "each response token would ship its whole distribution. Use estimator=topk"
        )
    return vocabulary


class FSDPHead:
    """For veRL's FSDP engines: packed or padded sequences, Ulysses sequence parallelism."""

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
        offsets, index = micro_batch["input_ids"].offsets(), response_index(micro_batch)
        labels = output_args["input_ids_rmpad_rolled"]
        if tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True):
            padding = output_args["pad_size"]
            index = torch.nn.functional.pad(index, (0, padding))
            if self.use_ulysses_sp:
                index = slice_input_tensor(index, dim=0, padding=False)
            # squeeze and not [0], whose backward makes and fills another tensor of this size.
            found = run_head(logits.squeeze(0), labels, output_args["temperature_rmpad"], index, micro_batch)
            found = {name: self._gather_and_unpad_packed(value, padding) for name, value in found.items()}
        else:
            width = logits.shape[1]
            real = (torch.arange(width, device=index.device) < offsets.diff()[:, None]).flatten()
            labels, index = (torch.zeros_like(real, dtype=x.dtype).masked_scatter_(real, x) for x in (labels, index))
            temperature = output_args["temperature"].repeat_interleave(width)
            found = run_head(logits.flatten(0, 1), labels, temperature, index, micro_batch)
            found = {name: value[real] for name, value in found.items()}
        return {name: torch.nested.nested_tensor_from_jagged(value, offsets) for name, value in found.items()}


class MegatronHead:
    """For veRL's Megatron engine: tensor-, sequence- and context-parallel, packed (thd) or padded (bshd)."""

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
        if not asks_for_head(batch):
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
        found = run_head(
            logits.flatten(0, 1), *flat, batch, group if torch.distributed.get_world_size(group) > 1 else None
        )
        return {name: value.unflatten(0, shape) for name, value in found.items()}
