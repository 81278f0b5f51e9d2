"""Ray on one node of a job: its address, its ports, its folder, its start."""

import fcntl
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import IO

import psutil

from rapo_verl.cluster.facts import Facts

# A block of ports for each job and node, all below Linux's ephemeral range (32768), where anything may take one.
FIRST_PORT, BLOCK, SLOTS = 10000, 500, 45
GCS, NODE_MANAGER, OBJECT_MANAGER, RUNTIME_ENV, AGENT_GRPC, AGENT_HTTP, METRICS, DASHBOARD, CLIENT, SMOKE = range(10)
FIRST_WORKER = 20
# Ray puts "/session_<date>_<pid>/sockets/plasma_store" behind its folder; the kernel allows 107 bytes.
MAX_FOLDER = 40


class RayNodeError(RuntimeError):
    """This node cannot run Ray; the message says why and what to do."""


def node_ip(interface: str | None) -> str:
    """Return the IPv4 address that the other nodes reach this one by."""
    if interface:
        for address in psutil.net_if_addrs().get(interface, []):
            if address.family == socket.AF_INET:
                return address.address
        raise RayNodeError(
            f"RAPO_INTERFACE={interface} has no IPv4 address here; interfaces: {', '.join(psutil.net_if_addrs())}"
        )
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        ip = socket.gethostbyname(name)
    except OSError as error:
        raise RayNodeError(f"{name} has no address ({error}); set RAPO_INTERFACE in slurm/env") from error
    if ip.startswith("127."):
        raise RayNodeError(f"{name} resolves to {ip}, which other nodes cannot reach; set RAPO_INTERFACE in slurm/env")
    return ip


def claim_ports(job: int, locks: Path) -> tuple[int, IO]:
    """Return the first port of a block that is free here, and the open file whose lock holds it.

    Starts at the job's own block; another job's or a stranger's is passed over.
    """
    for slot in range(SLOTS):
        base = FIRST_PORT + BLOCK * ((job + slot) % SLOTS)
        lock = (locks / f"rapo-ports-{os.getuid()}-{base}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        if all(_is_free(port) for port in range(base, base + BLOCK)):
            return base, lock
        lock.close()
    raise RayNodeError(
        f"no block of {BLOCK} free ports from {FIRST_PORT} to {FIRST_PORT + BLOCK * SLOTS}: `ss -ltnp` says whose"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def ray_folder(parent: Path, tag: str) -> Path:
    """Return Ray's folder: local to the node, one per job, the same path on every node, as Ray wants."""
    folder = parent / f"rapo-{tag}"
    if len(str(folder)) > MAX_FOLDER:
        raise RayNodeError(f"{folder} is too long for Ray's sockets ({MAX_FOLDER} bytes); set RAPO_NODE_TMP=/tmp")
    return folder


def start_ray(facts: Facts, head: str | None, ip: str, ports: int, folder: Path, log: Path) -> None:
    """Start Ray here: the head, or a worker of the head at the address ``head``. Its daemons go on running."""
    command = [
        shutil.which("ray") or "ray", "start", "--disable-usage-stats",
        f"--node-ip-address={ip}", f"--num-gpus={facts.gpus}", f"--num-cpus={facts.cpus}",
        f"--node-manager-port={ports + NODE_MANAGER}", f"--object-manager-port={ports + OBJECT_MANAGER}",
        f"--runtime-env-agent-port={ports + RUNTIME_ENV}", f"--dashboard-agent-grpc-port={ports + AGENT_GRPC}",
        f"--dashboard-agent-listen-port={ports + AGENT_HTTP}", f"--metrics-export-port={ports + METRICS}",
        f"--temp-dir={folder}",
        f"--min-worker-port={ports + FIRST_WORKER}", f"--max-worker-port={ports + BLOCK - 1}",
    ]  # fmt: skip
    if facts.object_store_bytes:
        command.append(f"--object-store-memory={facts.object_store_bytes}")
    if head is None:
        command += [
            "--head", f"--port={ports + GCS}",
            # Whoever reaches the dashboard runs code as this user.
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports + DASHBOARD}",
            f"--ray-client-server-port={ports + CLIENT}",
        ]  # fmt: skip
    else:
        command.append(f"--address={head}")
    folder.mkdir(mode=0o700, parents=True)
    with log.open("ab") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    if code != 0:
        raise RayNodeError(f"ray start ended with {code}")


def remove_ray_folder(folder: Path, keep_logs: Path | None) -> None:
    """Remove Ray's folder; on failure, keep the last of its logs for reading."""
    logs = folder / "session_latest" / "logs"
    if keep_logs is not None and logs.is_dir():
        keep_logs.mkdir(exist_ok=True)
        for log in logs.iterdir():
            if log.is_file() and log.stat().st_size:
                with log.open("rb") as stream:
                    stream.seek(max(0, log.stat().st_size - (1 << 18)))
                    (keep_logs / log.name).write_bytes(stream.read())
    shutil.rmtree(folder, ignore_errors=True)
