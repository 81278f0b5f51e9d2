"""``rapo doctor``: what is installed, which platform this is, what is wrong and how to mend it."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rapo_verl import Refused
from rapo_verl.plan.card import Gpu, card

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
PADDED = (
    "train with actor_rollout_ref.model.use_remove_padding=false and "
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa"
)
MODULES = {
    "vllm": "make gpu",
    "flash_attn": f"no wheel fits every torch: {PADDED}, or take requirements/rapo.def",
    "flashinfer": "vLLM 0.24 dies as it makes its sampler: export VLLM_USE_FLASHINFER_SAMPLER=0",
    "transformer_engine": "only Megatron needs it: requirements/rapo.def",
    "megatron.core": "only Megatron needs it: requirements/rapo.def",
    "apex": "only Megatron needs it: requirements/rapo.def",
}
# Without these a run is made otherwise, or is of another kind; one that is there must import all the same.
OPTIONAL = {"flash_attn", "transformer_engine", "megatron.core", "apex"}
MIN_DRIVER = 580
IMPORT_SECONDS = 120
MIN_MEMORY, MIN_SHM, MIN_DISK = 12 << 30, 256 << 20, 5 << 30
INSTALL = "install the lock: make install (CPU) or make gpu"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what it is, what was found, and how to mend it where it is wrong."""

    what: str
    found: str
    ok: bool = True
    mend: str = ""


def examine() -> list[Finding]:
    """Return everything that `rapo doctor` looks at on this machine; starts neither Ray nor a model."""
    cpu = not has_gpu()
    return [
        Finding("platform", "cpu" if cpu else "cuda"),
        _python(),
        *(_version(name, pins[0 if cpu else 1]) for name, pins in VERSIONS.items()),
        _ray(),
        _plugin(),
        _recipes(),
        *_resources(),
        *([] if cpu else [driver(), *map(imports, MODULES), two_flash_attentions(), *_cards()]),
    ]


def has_gpu() -> bool:
    """Return whether this machine has an accelerator that CUDA builds can use."""
    import torch

    return torch.cuda.device_count() > 0  # by NVML: is_available would make a later fork of this process useless


def _python() -> Finding:
    found = sys.version.split()[0]
    return Finding(
        "python", found, (3, 11) <= sys.version_info[:2] < (3, 13), "this project runs on Python 3.11 and 3.12"
    )


def _version(name: str, pin: str | None) -> Finding:
    found = None
    for distribution in (name, f"{name}-cpu"):
        try:
            found = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if found is None:
        return Finding(name, "missing", False, INSTALL)
    same = pin is None or found.split("+")[0] == pin
    return Finding(name, found, same, f"this project is tested with {pin}: {INSTALL}")


def _ray() -> Finding:
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Finding("ray", "missing", False, INSTALL)
    version = tuple(int(part) for part in found.split(".")[:2])
    return Finding("ray", found, version >= MIN_RAY, f"ray >= {'.'.join(map(str, MIN_RAY))} has token authentication")


def driver() -> Finding:
    """Return what nvidia-smi says of the driver, against CUDA 13."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("NVIDIA driver", str(error), False, "the site's: nvidia-smi must answer")
    if not said or not said[0].split(".")[0].isdigit():
        return Finding("NVIDIA driver", "nvidia-smi names none", False, "the site's: nvidia-smi must answer")
    new = int(said[0].split(".")[0]) >= MIN_DRIVER
    return Finding("NVIDIA driver", said[0], new, f"CUDA 13 wants {MIN_DRIVER} or newer")


def imports(module: str, mend: str = "", seconds: float = IMPORT_SECONDS) -> Finding:
    """Return whether a module imports, tried in a process of its own, which it may crash or hang."""
    what, mend = f"import {module}", mend or MODULES.get(module, INSTALL)
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Finding(what, f"not done after {seconds:.0f} s", False, mend)
    if done.returncode == 0:
        return Finding(what, "works")
    missing = f"No module named '{module.split('.')[0]}'" in done.stderr
    if missing and module in OPTIONAL:
        return Finding(what, f"not installed; {mend}")
    if done.returncode < 0:
        return Finding(
            what, f"crashes: {signal.Signals(-done.returncode).name}", False, f"built for another torch? {mend}"
        )
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding(what, last, False, f"built for another torch: {mend}" if "undefined symbol" in last else mend)


def two_flash_attentions() -> Finding:
    """Look for flash-attn 4 beside 2.8: both own the package flash_attn, and the last one breaks the other."""
    found = installed(("flash-attn", "flash-attn-4"))
    text = ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
    return Finding(
        "flash-attn", text, len(found) < 2, "pip uninstall flash-attn-4, then install flash-attn 2.8.3 again"
    )


def _cards() -> list[Finding]:
    """Look at the GPUs here: free memory, and the largest of our recipes that fits them."""
    import torch

    count = torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info()
    used = "somebody's process holds the rest: nvidia-smi"
    found = [Finding("free GPU memory", f"{gib(free)} of {gib(total)}", free > 0.95 * total, used)]
    try:
        gpu = card(None)
    except Refused as error:
        return [*found, Finding("what fits", f"not said: {error}")]
    return [*found, what_fits(gpu, count)]


def what_fits(gpu: Gpu, count: int) -> Finding:
    """Return the largest of our recipes that fits so many cards by its plan."""
    from rapo_verl.plan.job import job_of, violations
    from rapo_verl.plan.memory import GIB, memory
    from rapo_verl.plan.model import shape_of
    from rapo_verl.plan.report import misfits
    from rapo_verl.run.compose import compose_config, experiments
    from rapo_verl.run.preflight import cpus_needed

    best: tuple[int, str] = (0, "")
    for name in experiments():
        if not name.startswith("qwen") or "grpo" in name:
            continue
        config = compose_config([f"experiment={name}"])
        shape, job = shape_of(config.actor_rollout_ref.model.path), job_of(config, gpus=count)
        if shape.parameters <= best[0] or violations(job, shape):
            continue
        if not misfits(job, memory(shape, job, gpu_bytes=gpu.memory_gib * GIB), gpu):
            cpus = cpus_needed(config)
            short = f"; Ray wants {cpus} CPUs" if cpus > (os.cpu_count() or 1) else ""
            best = shape.parameters, f"{name}{short}"
    what = f"fits {count} x {gpu.memory_gib:.0f} GiB"
    return Finding(
        what, best[1] or "none as it is", bool(best[1]), "rapo plan RECIPE --gpus N names the nearest that does"
    )


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
        names = experiments()
    except FileNotFoundError as error:
        return Finding("recipes", "missing", False, str(error))
    return Finding("recipes", f"{len(names)} experiments")


def _resources() -> list[Finding]:
    memory = psutil.virtual_memory().available
    disk = shutil.disk_usage(Path.cwd()).free
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    return [
        Finding("cores", str(len(os.sched_getaffinity(0)))),
        Finding("free memory", gib(memory), memory >= MIN_MEMORY, f"the demo wants {gib(MIN_MEMORY)}"),
        Finding("free /dev/shm", gib(shm), shm >= MIN_SHM, "weights and Ray's objects travel through it: enlarge it"),
        Finding("free disk here", gib(disk), disk >= MIN_DISK, "checkpoints need room"),
    ]


def gib(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / (1 << 30):.1f} GiB"


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed; none is imported, which takes seconds."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def print_findings(findings: list[Finding]) -> None:
    """Print a table, what is wrong last and with how to mend it."""
    table = Table("", "what", "found", "to mend")
    for finding in sorted(findings, key=lambda finding: not finding.ok):
        mark, mend = ("ok", "") if finding.ok else ("[red]WRONG[/red]", finding.mend)
        table.add_row(mark, finding.what, finding.found, mend)
    # In a job's log nothing tells a width, and 80 columns would fold the table.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
