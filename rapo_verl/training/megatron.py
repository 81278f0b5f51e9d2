"""veRL's Megatron engine with RAPO's head, which stops before it steps on a gradient that is not finite."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from tensordict import TensorDict
from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from rapo_verl.method.linear_head import linear_head
from rapo_verl.training.engine import HeadSwitch, check_layout, check_linear, response_index, run_head


class RapoMegatronEngine(HeadSwitch, MegatronEngineWithLMHead):
    """Tensor-, sequence-, context- and pipeline-parallel, packed (thd) or padded (bshd).

    ``optimizer_step`` raises on every rank when any rank's gradient is not finite; that costs one pass over the
    gradient buffers and an all-reduce of one number.
    """

    _updates = 0
    _losses: Any = None

    def use_linear_head(self) -> None:
        """Do as `HeadSwitch` says."""
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

    def _hidden_states(self, layer: Any, hidden: Any, weight: Any = None, **_: Any) -> tuple[Any, None]:
        """Return, where Megatron expects this rank's logits, the hidden states (length, batch, width)."""
        self._head_weight = layer.weight if weight is None else weight  # given where it is the embedding's
        return (gather_from_sequence_parallel_region(hidden) if layer.sequence_parallel else hidden), None

    def _lm_head_logits_processor(
        self,
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
        takes_own = self.takes_own_head(batch)
        if not takes_own and not self._linear:
            options |= {"batch": batch, "data_format": data_format}
            return super()._lm_head_logits_processor(logits, label, temperature, **options)
        index, shape = self._index_laid_out(batch, data_format), label.shape[:2]
        if index.shape != shape:
            raise RuntimeError(f"veRL's labels have shape {tuple(shape)}, RAPO's targets {tuple(index.shape)}")
        labels, temperature, index = label.flatten(), temperature.flatten(), index.flatten()
        group = parallel_state.get_tensor_model_parallel_group()
        group = group if torch.distributed.get_world_size(group) > 1 else None
        if not takes_own:
            check_layout(labels, index, batch)
            # Megatron has made the last stage's output fp32, from the weight's dtype.
            hidden, rows = logits.flatten(0, 1).to(self._head_weight.dtype), index > 0
            log_prob, entropy = linear_head(
                hidden, self._head_weight, labels, temperature=temperature, rows=rows, group=group
            )
            found = {"log_probs": log_prob, "entropy": entropy}
        else:
            found = run_head(logits.flatten(0, 1), labels, temperature, index, batch, group)
        return {name: value.unflatten(0, shape) for name, value in found.items()}

    def _index_laid_out(self, batch: TensorDict, data_format: str) -> torch.Tensor:
        """Return `response_index` as veRL lays out the labels, shape (rows, columns) of this rank."""
        index = torch.nested.nested_tensor_from_jagged(response_index(batch), batch["input_ids"].offsets())
        if data_format == "thd":
            config = self.engine_config
            bucket = config.pad_to_length_bucket if config.pad_to_length else None
            cp_size = tu.get_non_tensor_data(batch, "local_cp_size", default=None)
            return preprocess_thd_engine(index, local_cp_size=cp_size, pad_to_length_bucket=bucket)[0]
        width = tu.get_non_tensor_data(batch, "forced_max_seqlen", default=None)
        return preprocess_bshd_engine(index, forced_max_seqlen=width)[0]

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """Return veRL's output, remembering the losses of the micro-batches of an update."""
        # verl 0.9.1 workers/engine/megatron/transformer_impl.py:834: has the losses, which optimizer_step has not.
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if not forward_only:
            self._losses = output.get("loss")  # on the last pipeline stage, whose error then names them
        return output

    def optimizer_step(self) -> Any:
        """Return veRL's gradient norm; FloatingPointError, and nothing changed, if a gradient is NaN or infinite."""
        # verl 0.9.1 workers/engine/megatron/transformer_impl.py:693: steps whatever the norm is (its FSDP
        # engine skips), and Megatron looks for infinities only where it scales an fp16 loss.
        self._updates += 1
        norms = torch.stack(
            [
                torch.linalg.vector_norm(buffer.grad_data)
                for chunk in self.module
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
            ]
        )
        finite = torch.isfinite(norms).all().float()
        where = "on another rank" if finite else f"norms of the buffers here: {norms.tolist()}"
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise FloatingPointError(
                f"update {self._updates} of this start: the gradient is not finite ({where}; losses of the "
                f"micro-batches: {self._losses}); stopping before the optimizer steps"
            )
        return super().optimizer_step()
