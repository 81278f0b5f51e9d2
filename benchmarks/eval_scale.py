"""Time and peak memory of `rapo eval score` and `rapo eval report` on synthetic shards.

    python benchmarks/eval_scale.py                                                   # 3 models x 60 problems x 2048
    python benchmarks/eval_scale.py --models 10 --problems 300 --n 256                # all cells of the tenfold plan
    python benchmarks/eval_scale.py --models 1 --problems 2 --n 16384                 # its largest problem

Answers are integers below 1000, right with a rate drawn for each problem; texts are words that compress as prose does.
Each command is a process of its own; memory is its peak resident set. Writing the shards is timed apart.
On a shared machine processor time is what to compare.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rapo_verl.evaluation.spec import Problem, Sampling, SamplingPlan
from rapo_verl.evaluation.store import Samples, Store

# Fifty made-up words, drawn evenly.
ENDINGS = ("", "s", "ing", "ed", "er", "ly", "al", "ic", "on", "us")
WORDS = np.array([stem + ending for stem in ("sum", "let", "find", "so", "x") for ending in ENDINGS])


def synthetic(folder: Path, model: int, draw: int, args: argparse.Namespace) -> None:
    """Write one model's shards."""
    rng = np.random.default_rng((model, draw))
    gold = np.random.default_rng(7).integers(0, 1000, args.problems)
    problems = tuple(
        Problem(f"p{i}", f"set{i % 2}", f"set{i % 2}", str(gold[i]), ({"role": "user", "content": f"Problem {i}?"},))
        for i in range(args.problems)
    )
    plan = SamplingPlan(
        model=f"{model:064d}",
        data={},
        problems=problems,
        prompts=tuple((i,) for i in range(args.problems)),
        n=args.n,
        draw=draw,
        sampling=Sampling(),
        shard=128,
        versions={},
    )
    store = Store.create(folder, plan)
    rates = rng.beta(0.3, 1.0, args.problems)
    for shard in plan.shards:
        right = rng.random(shard.samples) < rates[shard.problem]
        answers = np.where(right, gold[shard.problem], rng.integers(0, 1000, shard.samples))
        words = rng.choice(WORDS, size=(shard.samples, args.words))
        texts = [f"{' '.join(row)} \\boxed{{{answer}}}" for row, answer in zip(words.tolist(), answers)]
        lengths = (args.words + rng.integers(1, 20, shard.samples)).tolist()
        store.write(shard, Samples(lengths, ["stop"] * shard.samples, [-1.0] * shard.samples, texts))


def measured(*arguments: str) -> tuple[float, float, float]:
    """Return seconds, processor seconds and peak MiB of one command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rapo_verl.cli", "eval", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"rapo eval {arguments[0]} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Write, score, report, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--words", type=int, default=100, help="of a text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / f"model{i}" for i in range(args.models)]
        hard = Path(root) / "draw2"
        start = time.perf_counter()
        for i, folder in enumerate(folders):
            synthetic(folder, i, 1, args)
        synthetic(hard, 0, 2, args)
        print(f"{args.models} x {args.problems} x {args.n} (and a draw for Hard): {time.perf_counter() - start:.1f} s")
        everything = [str(folder) for folder in (*folders, hard)]
        rows = {
            "score, 1 process": measured("score", *everything, "--strictness", "integer", "--jobs", "1"),
            "score again": measured("score", *everything, "--strictness", "integer", "--jobs", "1"),
            "report": measured("report", *everything[:-1], "--hard-from", str(hard), "--out", f"{root}/report"),
        }
        size = (Path(root) / "report" / "report.html").stat().st_size / 2**20
        for name, (seconds, busy, memory) in rows.items():
            print(f"{name:18}{seconds:8.1f} s{busy:8.1f} s of processor time{memory:8.0f} MiB")
        print(f"report.html {size:.1f} MiB")


if __name__ == "__main__":
    main()
