"""Seconds and processor seconds from the command to a toy run's first step, with and without the fork server.

    python benchmarks/startup.py --toy-dir runs/toy/base0

Each process's processor time is read twice a second until the first record of metrics; what lives shorter is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from rapo_verl.run.folder import read_metrics
from rapo_verl.run.names import FORK_SERVER_VARIABLE

STEPS = 4


def start_up(toy_dir: Path, fork_server: bool) -> tuple[float, float, float, Counter]:
    """Return wall seconds and processor seconds to the first step, median seconds a step, and the latter by process."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "-m", "rapo_verl.cli", "train", "experiment=toy_rapo_cpu", f"toy_dir={toy_dir}"]
        command += [f"run_dir={run_dir}", f"trainer.total_training_steps={STEPS}", "trainer.save_freq=-1"]
        environment = {**os.environ, FORK_SERVER_VARIABLE: str(int(fork_server))}
        began, used = time.monotonic(), {}
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while run.poll() is None and not (run_dir.exists() and read_metrics(run_dir)):
            for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
                try:
                    used[process.pid] = (process.name()[:28], sum(process.cpu_times()[:2]))
                except psutil.Error:
                    continue
            time.sleep(0.5)
        wall = time.monotonic() - began
        if run.wait() != 0:
            raise SystemExit(f"the run ended with exit code {run.returncode}")
        steps = [step["timing_s/step"] for step in read_metrics(run_dir)[1:]]
    by_name: Counter = Counter()
    for name, seconds in used.values():
        by_name[name] += seconds
    return wall, by_name.total(), statistics.median(steps), by_name


def main() -> None:
    """Print one row for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy-dir", type=Path, required=True, help="of `rapo toy make`")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print("| fork server | to the first step, s | processor s | a step, s | most of it |\n|---|---|---|---|---|")
    for _ in range(options.rounds):
        for fork_server in (True, False):
            wall, total, step, by_name = start_up(options.toy_dir, fork_server)
            most = ", ".join(f"{name} {seconds:.1f}" for name, seconds in by_name.most_common(4))
            print(f"| {'yes' if fork_server else 'no'} | {wall:.0f} | {total:.0f} | {step:.1f} | {most} |", flush=True)


if __name__ == "__main__":
    main()
