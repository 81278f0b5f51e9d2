"""veRL's FSDP2 engine on a processor."""

from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rapo_verl.training.engine import FSDPHead


class CpuFSDPEngine(FSDPHead, FSDPEngineWithLMHead):
    """FSDP2 on gloo; the reference is not "offloaded to the CPU", where it already is."""

    def _build_fsdp_module(self, module: Any) -> Any:
        # verl 0.9.1 workers/engine/fsdp/transformer_impl.py:459 gives every forward-only model
        # CPUOffloadPolicy(pin_memory=True); pinned memory needs an accelerator.
        forward_only, self.engine_config.forward_only = self.engine_config.forward_only, False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only
