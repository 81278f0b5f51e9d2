"""veRL's Megatron engine that stops before it steps on a gradient that is not finite."""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead


class GuardedMegatronEngine(MegatronEngineWithLMHead):
    """veRL's engine, whose ``optimizer_step`` raises on every rank when any rank's gradient is not finite.

    Costs one pass over the gradient buffers and an all-reduce of one number.
    """

    _updates = 0
    _losses: Any = None

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        """Return veRL's output, remembering the losses of the micro-batches of an update."""
        output = super().forward_backward_batch(data, loss_function, forward_only)
        if not forward_only:
            self._losses = output.get("loss")  # on the last pipeline stage, whose error then names them
        return output

    def optimizer_step(self) -> Any:
        """Return veRL's gradient norm.

        Raises:
            FloatingPointError: a gradient is NaN or infinite; nothing was changed.
        """
        # verl 0.9.1 megatron/transformer_impl.py:693 steps whatever the norm is (its FSDP engine skips, fsdp/
        # transformer_impl.py:823), and Megatron looks for infinities only where it scales an fp16 loss.
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
