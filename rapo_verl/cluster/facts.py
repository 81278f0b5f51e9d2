"""What slurm/launch.sh and slurm/env tell a node, read from its environment once."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapo_verl import Refused


@dataclass(frozen=True)
class Facts:
    """The settings of a job on this node; outside a job (`rapo doctor --cluster`) their defaults.

    Attributes:
        tag: of the job and its attempt, for names that no other job may have.
        gpus: GPUs of a node; None: as many as there are.
        smoke: auto, off, or the backend of the all-reduce.
        command: what runs `rapo`.
    """

    job: int
    tag: str
    gpus: int | None
    cpus: int
    object_store_bytes: int | None
    interface: str | None
    tmp: Path
    join_seconds: float
    lost_seconds: float
    smoke: str
    dry_run: bool
    command: list[str]

    @classmethod
    def read(cls) -> "Facts":
        """Return what the environment says; slurm/env may leave a name empty."""

        def get(name: str) -> str | None:
            return os.environ.get(name) or None

        def number(name: str, default: Any = None, kind: Callable[[str], float] = int) -> Any:
            text = get(name)
            try:
                return default if text is None else kind(text)
            except ValueError as error:
                raise Refused(f"{name} is {text!r}; allowed: a number (slurm/env)") from error

        return cls(
            job=number("SLURM_JOB_ID", 0),
            tag=get("RAPO_TAG") or "0-0",
            gpus=number("RAPO_GPUS_PER_NODE"),
            cpus=number("RAPO_RAY_CPUS", number("SLURM_CPUS_PER_TASK", os.cpu_count() or 1)),
            object_store_bytes=number("RAPO_OBJECT_STORE_BYTES"),
            interface=get("RAPO_INTERFACE"),
            tmp=Path(get("RAPO_NODE_TMP") or "/tmp"),
            join_seconds=number("RAPO_JOIN_SECONDS", 300.0, float),
            lost_seconds=number("RAPO_LOST_SECONDS", 120.0, float),
            smoke=get("RAPO_SMOKE") or "auto",
            dry_run=get("RAPO_DRY_RUN") is not None,
            command=shlex.split(get("RAPO_COMMAND") or "") or [sys.executable, "-m", "rapo_verl.cli"],
        )
