"""The GPU that a plan is made for: by its name, or the one that is here."""

import math
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from rapo_verl import Refused


@dataclass(frozen=True)
class Gpu:
    """A card as its data sheet gives it: usable GiB, dense bf16 TFLOP/s, TB/s of its memory (NaN: not known)."""

    memory_gib: float
    tflops: float = math.nan
    bandwidth: float = math.nan
    name: str = ""


# NVIDIA data sheets; memory as the driver reports it.
GPUS = {
    "h100": Gpu(79.6, 989, 3.35),
    "h200": Gpu(140.4, 989, 4.8),
    "h20": Gpu(95.6, 148, 4.0),
    "a100": Gpu(79.3, 312, 2.04),
    "a100-40": Gpu(39.4, 312, 1.56),
    "l40s": Gpu(44.7, 362, 0.86),
    "a10": Gpu(22.1, 125, 0.6),
    "rtx4090": Gpu(23.6, 165, 1.01),
}
SMI_SECONDS = 30
NO_SMI = "there is no nvidia-smi"


def card(name: str | None) -> Gpu:
    """Return the card of that name (Refused: none is known by it), without one this machine's, else an H100."""
    if name is None:
        return _card_here() or replace(GPUS["h100"], name="H100: there is no card here, --gpu takes another")
    if name.lower() not in GPUS:
        raise Refused(f"unknown gpu {name!r}; allowed: {', '.join(GPUS)}")
    return replace(GPUS[name.lower()], name=name)


def _card_here() -> Gpu | None:
    """Return the smallest card of this machine, its memory as its driver says; None without one that answers."""
    _, rows = nvidia_smi("memory.total,name")
    cards = [(int(row[0]), row[1]) for row in rows if len(row) == 2 and row[0].isdigit()]
    if not cards:
        return None
    mib, name = min(cards)
    words = re.findall(r"[a-z]*\d+[a-z]*", name.lower())
    known = next((gpu for key, gpu in GPUS.items() if key.removeprefix("rtx") in words), Gpu(0))
    return replace(known, memory_gib=mib / 1024, name=f"{name}, the card here")


def nvidia_smi(fields: str) -> tuple[str, list[list[str]]]:
    """Return what nvidia-smi says, and its rows: a GPU each, none if it failed, hangs or is not there (`NO_SMI`)."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return NO_SMI, []
    query = [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        # Not waited for: where the driver hangs, the kernel keeps it even from a SIGKILL.
        process.kill()
        return f"nvidia-smi hangs ({SMI_SECONDS} s)", []
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines()]
    return said.strip() or f"nvidia-smi ended with {process.returncode}", [] if process.returncode else rows
