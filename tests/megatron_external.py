"""``model.external_lib`` of a whole run with verl's Megatron engine on a processor: RAPO's engines on the stand-ins.

verl imports it in every process; the stand-ins are set up only where an engine is used, in each thread that uses it.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import megatron_cpu
from verl.workers.engine import MegatronEngine, MegatronEngineWithLMHead


@functools.cache
def _stand_ins() -> None:
    megatron_cpu.stand_in_for_cuda()
    megatron_cpu.stand_in_for_transformer_engine()
    megatron_cpu.in_fp32()


def _here() -> None:
    _stand_ins()
    megatron_cpu.cuda_is_cpu_in_this_thread()


def _on_stand_ins(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        _here()
        return method(*args, **kwargs)

    return call


def _consumed_on_stand_ins(weights: Iterator) -> Iterator:
    _here()  # in the thread that takes the first
    yield from weights


def _get_per_tensor_param(method: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        weights, adapters = method(*args, **kwargs)
        return _consumed_on_stand_ins(weights), adapters

    return call


for cls in (MegatronEngine, MegatronEngineWithLMHead):
    for name, member in list(vars(cls).items()):
        if inspect.isfunction(member):
            setattr(cls, name, _on_stand_ins(member))
MegatronEngine.get_per_tensor_param = _get_per_tensor_param(MegatronEngine.get_per_tensor_param)
# Its engines are made of the classes above, patched by now.
import rapo_verl.training.external_lib  # noqa: E402, F401
