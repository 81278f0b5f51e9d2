"""What slurm/launch.sh and slurm/env tell a node, read from its environment once."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


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

        def get(*names: str) -> str | None:
            return next((os.environ[name] for name in names if os.environ.get(name)), None)

        gpus, store = get("RAPO_GPUS_PER_NODE"), get("RAPO_OBJECT_STORE_BYTES")
        return cls(
            job=int(get("SLURM_JOB_ID") or 0),
            tag=get("RAPO_TAG") or "0-0",
            gpus=int(gpus) if gpus else None,
            cpus=int(get("RAPO_RAY_CPUS", "SLURM_CPUS_PER_TASK") or os.cpu_count() or 1),
            object_store_bytes=int(store) if store else None,
            interface=get("RAPO_INTERFACE"),
            tmp=Path(get("RAPO_NODE_TMP") or "/tmp"),
            join_seconds=float(get("RAPO_JOIN_SECONDS") or 300),
            lost_seconds=float(get("RAPO_LOST_SECONDS") or 120),
            smoke=get("RAPO_SMOKE") or "auto",
            dry_run=get("RAPO_DRY_RUN") is not None,
            command=shlex.split(get("RAPO_COMMAND") or "") or [sys.executable, "-m", "rapo_verl.cli"],
        )
