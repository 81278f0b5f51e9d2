"""``rapo doctor``: what is installed, which platform this is, what is wrong and how to mend it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from rapo_verl import Refused
from rapo_verl.plan.card import card, nvidia_smi
from rapo_verl.run.finding import Finding, gib
from rapo_verl.run.trials import trials, tried

# Exact versions that run together: (cpu, gpu); the gpu ones are veRL 0.9.1's own pins.
VERSIONS = {
    "verl": ("0.9.1", "0.9.1"),
    "torch": ("2.13.0", "2.11.0"),
    "transformers": ("5.9.0", "5.9.0"),
    "vllm": ("0.28.0", "0.24.0"),
    "tensordict": ("0.10.0", None),
    "TransferQueue": ("0.1.11", None),
    "math-verify": ("0.9.0", "0.9.0"),
}
# Ray before this has no token authentication.
MIN_RAY = (2, 52)
# What a run on a GPU imports, and what to do where it cannot. Built for another torch, they take the process with them.
# torch's attention, over padded sequences: what trains where flash-attn is missing.
PADDED_ATTENTION = (
    "actor_rollout_ref.model.use_remove_padding=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
)
_MEGATRON = "only Megatron needs it: requirements/rapo.def"
MODULES = {
    "vllm": "make gpu",
    "flash_attn": f"no wheel fits every torch: train with {' and '.join(PADDED_ATTENTION)}, or take "
    "requirements/rapo.def",
    "flashinfer": "vLLM 0.24 dies as it makes its sampler: export VLLM_USE_FLASHINFER_SAMPLER=0",
    "transformer_engine": _MEGATRON,
    "megatron.core": _MEGATRON,
    "apex": _MEGATRON,
}
# Without these a run is made otherwise, or is of another kind; one that is there must import all the same.
OPTIONAL = {"flash_attn", "transformer_engine", "megatron.core", "apex"}
MIN_DRIVER = 580
# The newest that a wheel of either lock wants: llguidance's, manylinux_2_31.
MIN_GLIBC = (2, 31)
IMPORT_SECONDS = 120
MIN_MEMORY, MIN_SHM, MIN_DISK = 12 << 30, 256 << 20, 5 << 30
INSTALL = "install the lock: make install (CPU) or make gpu"


def examine(gpu: bool = False) -> list[Finding]:
    """Return everything that `rapo doctor` looks at on this machine, in order; Ray is not started.

    Args:
        gpu: whether to try, too, what every run does on a GPU (`rapo_verl.run.trials`).
    """
    on_gpu = has_gpu()
    cpus, *fits = _what_fits() if on_gpu else [Finding("cores", str(len(os.sched_getaffinity(0))))]
    return [
        Finding("platform", "cuda" if on_gpu else _without_gpu()),
        *([driver()] if on_gpu else []),
        _python(),
        glibc(),
        *(_version(name, pins[0 if _is_cpu_build() else 1]) for name, pins in VERSIONS.items()),
        ray_version(),
        _plugin(),
        _recipes(),
        *([*map(imports, MODULES), two_flash_attentions()] if on_gpu else []),
        *(_trials() if gpu else []),
        cpus,
        *_resources(),
        *([free_memory()] if on_gpu else []),
        *fits,
    ]


def has_gpu() -> bool:
    """Return whether this machine has an accelerator that CUDA builds can use."""
    import torch

    return torch.cuda.device_count() > 0  # by NVML: is_available would make a later fork of this process useless


def _without_gpu() -> str:
    _, rows = nvidia_smi("name")
    if not rows:
        return "cpu"
    why = ".venv-gpu's does (make gpu)" if _is_cpu_build() else "CUDA_VISIBLE_DEVICES, or libcuda, hides them"
    return f"cpu: this torch sees none of the GPUs of nvidia-smi ({len(rows)}); {why}"


def _is_cpu_build() -> bool:
    """Whether the CPU lock is meant, and not the GPU's on a machine without one, as a login node."""
    return installed(("torch",)).get("torch", "+cpu").endswith("+cpu")


def _python() -> Finding:
    found = sys.version.split()[0]
    return Finding(
        "python", found, (3, 11) <= sys.version_info[:2] < (3, 13), "this project runs on Python 3.11 and 3.12"
    )


def glibc() -> Finding:
    """Return this system's C library: older ones load no wheel of the locks."""
    name, version = platform.libc_ver()
    new = name == "glibc" and tuple(map(int, version.split("."))) >= MIN_GLIBC
    wanted = ".".join(map(str, MIN_GLIBC))
    mend = (
        f"the locks' wheels want glibc {wanted} (Debian 11, Ubuntu 20.04, RHEL 9): a container, requirements/rapo.def"
    )
    return Finding("glibc", f"{name} {version}".strip() or "none", new, mend)


def _version(name: str, pin: str | None) -> Finding:
    found = next(iter(installed((name, f"{name}-cpu")).values()), None)
    if found is None:
        return Finding(name, "missing", False, INSTALL)
    same = pin is None or found.split("+")[0] == pin
    return Finding(name, found, same, f"this project is tested with {pin}: {INSTALL}")


def ray_version() -> Finding:
    """Return Ray's version: those before `MIN_RAY` have no token authentication."""
    found = installed(("ray",)).get("ray", "missing")
    new = found != "missing" and tuple(int(part) for part in found.split(".")[:2]) >= MIN_RAY
    return Finding("ray", found, new, f"ray >= {'.'.join(map(str, MIN_RAY))} has token authentication: {INSTALL}")


def driver() -> Finding:
    """Return what nvidia-smi says of the driver, against CUDA 13."""
    said, rows = nvidia_smi("driver_version")
    if not rows or not rows[0][0].split(".")[0].isdigit():
        return Finding("NVIDIA driver", f"nvidia-smi names none: {said}", False, "the site's: it must answer")
    new = int(rows[0][0].split(".")[0]) >= MIN_DRIVER
    return Finding("NVIDIA driver", rows[0][0], new, f"CUDA 13 wants {MIN_DRIVER} or newer")


def imports(module: str, mend: str = "", seconds: float = IMPORT_SECONDS) -> Finding:
    """Return whether a module imports, tried in a process of its own."""
    mend = mend or MODULES.get(module, INSTALL)
    found = tried(f"import {module}", [sys.executable, "-c", f"import {module}"], mend, seconds)
    if found.ok:
        return Finding(found.what, "works")
    if f"No module named '{module.split('.')[0]}'" in found.found and module in OPTIONAL:
        return Finding(found.what, f"not installed; {mend}")
    return found


def two_flash_attentions() -> Finding:
    """Look for flash-attn 4 beside 2.8: both own the package flash_attn, and the last one breaks the other."""
    found = installed(("flash-attn", "flash-attn-4"))
    text = ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
    return Finding(
        "flash-attn", text, len(found) < 2, "pip uninstall flash-attn-4, then install flash-attn 2.8.3 again"
    )


def _trials() -> list[Finding]:
    import torch

    if count := torch.cuda.device_count():
        return trials(count)
    return [Finding("GPU", "torch sees none", False, "make gpu, CUDA_VISIBLE_DEVICES; without a GPU leave --gpu out")]


def free_memory() -> Finding:
    """Return what is free on the fullest card here."""
    mend = "somebody's process holds the rest: nvidia-smi"
    said, rows = nvidia_smi("memory.free,memory.total")
    cards = [(int(free) << 20, int(total) << 20) for free, total in rows if free.isdigit() and total.isdigit()]
    if not cards:
        return Finding("free GPU memory", said, bool(rows), mend)  # MIG's slices say [N/A]
    free, total = min(cards, key=lambda memory: memory[0] / memory[1])
    return Finding("free GPU memory", f"{gib(free)} of {gib(total)}", free > 0.95 * total, mend)


def _what_fits() -> list[Finding]:
    import torch

    from rapo_verl.run.fits import what_fits

    try:
        return what_fits(card(None), torch.cuda.device_count())
    except Refused as error:
        return [Finding("CPUs for Ray", str(os.cpu_count())), Finding("what fits", f"not said: {error}")]


def _plugin() -> Finding:
    """Look at our plugin as a process of a run does: a failing one must be loud here, since veRL drops it silently."""
    code = (
        "import verl; from verl.plugin.platform.platform_manager import PlatformRegistry as P; "
        "import sys; sys.exit(0 if 'cpu' in P.registered_names() else 3)"
    )
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "rapo_verl.training.plugin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return Finding("verl plugin", "loads, cpu platform registered")
    lines = done.stderr.strip().splitlines()
    found = lines[-1] if lines else f"exit code {done.returncode}"
    return Finding("verl plugin", found, False, "pip install --no-deps -e .")


def _recipes() -> Finding:
    from rapo_verl.run.compose import experiments

    try:
        return Finding("recipes", f"{len(experiments())} experiments")
    except Refused as error:
        return Finding("recipes", "missing", False, str(error))


def _resources() -> list[Finding]:
    memory = psutil.virtual_memory().available
    disk = shutil.disk_usage(Path.cwd()).free
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    return [
        Finding("free memory", gib(memory), memory >= MIN_MEMORY, f"the demo wants {gib(MIN_MEMORY)}"),
        Finding("free /dev/shm", gib(shm), shm >= MIN_SHM, "weights and Ray's objects travel through it: enlarge it"),
        Finding("free disk here", gib(disk), disk >= MIN_DISK, "checkpoints need room"),
    ]


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed; none is imported, which takes seconds."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
