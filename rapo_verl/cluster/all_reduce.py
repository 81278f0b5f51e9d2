"""A small all-reduce over every GPU of a job, before anything expensive starts: broken links show in seconds."""

import os
import shutil
import subprocess
import sys
import time

from rapo_verl.cluster.board import Board
from rapo_verl.cluster.facts import Facts

# Importing torch from a shared filesystem on a cold node is most of it.
SECONDS = 180
ELEMENTS = 1 << 24  # 64 MiB of float32


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
        "-m", "rapo_verl.cluster.all_reduce", backend,
    ]  # fmt: skip
    with board.log_file("smoke").open("wb") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            return f"the {backend} all-reduce hangs ({SECONDS} s): is RAPO_INTERFACE right, are the ports open?"
    return None if code == 0 else f"the {backend} all-reduce failed"


def main() -> None:
    """Run one rank; the first prints the bandwidth."""
    import torch
    import torch.distributed as dist

    backend, rank = sys.argv[1], int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    values = torch.full((ELEMENTS,), float(dist.get_rank()), device=device)
    started = time.monotonic()
    dist.all_reduce(values)
    total = values[0].item()
    world = dist.get_world_size()
    if total != world * (world - 1) / 2:
        raise RuntimeError(f"the sum over ranks is {total}, not {world * (world - 1) / 2}: a link corrupts data")
    if dist.get_rank() == 0:
        print(f"all-reduce of {ELEMENTS * 4 >> 20} MiB over {world} ranks: {time.monotonic() - started:.2f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
