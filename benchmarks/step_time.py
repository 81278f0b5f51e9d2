"""Step time and peak memory of RAPO against veRL's built-in GRPO, same settings, runs interleaved.

    python benchmarks/step_time.py --rounds 2 --steps 14

Both load a reference; they differ in RAPO's reference pass (a temperature per sample) and loss. The first steps of a
run (warm-up of vLLM and the allocator) are left out. Prints the ratio of the medians, and each run's peak memory: the
sum of the unique set sizes (what ending its processes would free, shared pages not counted), sampled twice a second.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rapo_verl.run.folder import read_metrics

EXPERIMENTS = {"GRPO": "toy_grpo_cpu", "RAPO": "toy_rapo_cpu"}
WARM_UP = 4
STAGES = ("gen", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "step")


def unique_memory(pid: int) -> int:
    """Return the bytes that ending a process and its children would free."""
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total


def one_run(experiment: str, folder: Path, steps: int, toy_dir: str) -> tuple[list[dict], float]:
    """Return the metrics of the steps after warm-up, and the peak memory in GiB."""
    command = [
        sys.executable, "-m", "rapo_verl.cli", "train", f"experiment={experiment}", f"run_dir={folder}",
        f"toy_dir={toy_dir}", f"trainer.total_training_steps={steps}", "trainer.save_freq=-1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, unique_memory(process.pid))
        time.sleep(0.5)
    if process.returncode != 0:
        raise SystemExit(f"{experiment} ended with exit code {process.returncode}; see {folder}")
    return [step for step in read_metrics(folder) if step["step"] > WARM_UP], peak / (1 << 30)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--toy-dir", default="runs/toy/base0")
    args = parser.parse_args()
    steps: dict[str, list[dict]] = {name: [] for name in EXPERIMENTS}
    peaks: dict[str, list[float]] = {name: [] for name in EXPERIMENTS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            # The order alternates, so that a drift of the machine does not favour one.
            for name in list(EXPERIMENTS)[:: 1 if number % 2 == 0 else -1]:
                run_dir = Path(folder) / f"{name}{number}"
                found, peak = one_run(EXPERIMENTS[name], run_dir, args.steps, args.toy_dir)
                steps[name] += found
                peaks[name].append(peak)
    print(f"{'median seconds':16}" + "".join(f"{name:>8}" for name in EXPERIMENTS) + "   RAPO/GRPO")
    for stage in STAGES:
        times = {name: statistics.median(step[f"timing_s/{stage}"] for step in steps[name]) for name in EXPERIMENTS}
        print(f"{stage:16}" + "".join(f"{t:8.3f}" for t in times.values()) + f"{times['RAPO'] / times['GRPO']:12.3f}")
    print(f"{'peak GiB':16}" + "".join(f"{max(peaks[name]):8.2f}" for name in EXPERIMENTS))
    print(f"steps counted: {', '.join(f'{name} {len(found)}' for name, found in steps.items())}")


if __name__ == "__main__":
    main()
