"""A small all-reduce over every GPU of a job, before anything expensive starts: broken links show in seconds."""

import shutil
import subprocess
import sys

from rapo_verl.cluster.board import Board
from rapo_verl.cluster.facts import Facts

# Importing torch from a shared filesystem on a cold node is most of it.
SECONDS = 180


def try_links(board: Board, facts: Facts) -> str | None:
    """Return what is wrong with the links between the nodes' GPUs; None if nothing is, or if there are no GPUs."""
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
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            return f"the {backend} all-reduce hangs ({SECONDS} s): is RAPO_INTERFACE right, are the ports open?"
    return None if code == 0 else f"the {backend} all-reduce failed"
