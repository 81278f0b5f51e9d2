"""Tokens per second of `rapo eval generate` against bare `vllm.LLM.generate`, same settings, in turns on one machine.

    python benchmarks/eval_overhead.py --toy-dir runs/toy/base0 --n 512 --problems 24 --rounds 2

Each measurement is a process of its own; loading is left out of both. Ours includes shard files, flushed to disk.
On a shared machine the ratio per processor second, of all processes of a side, is what to compare.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rapo_verl.evaluation.engines import CPU_ENVIRONMENT, EngineSpec, VllmEngine, has_gpu
from rapo_verl.evaluation.generate import Draw, Request, generate
from rapo_verl.evaluation.session import read_plan
from rapo_verl.evaluation.spec import Sampling
from rapo_verl.evaluation.store import Store


class Clock:
    """Seconds, and processor seconds of this process and its children, since it was made."""

    def __init__(self) -> None:
        self.start = self.read()

    @staticmethod
    def read() -> tuple[float, float]:
        """Return now, and the processor seconds so far."""
        me = psutil.Process()
        times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
        return time.perf_counter(), sum(spent.user + spent.system for spent in times)

    def elapsed(self) -> tuple[float, float]:
        """Return both since the start."""
        now, busy = self.read()
        return now - self.start[0], busy - self.start[1]


def bare(spec: EngineSpec, plan) -> tuple[int, float, float]:
    """Return tokens, seconds and processor seconds of one call of vLLM's own `LLM.generate` over all requests."""
    from vllm import LLM, SamplingParams

    arguments = {key: value for key, value in spec.arguments().items() if key != "disable_log_stats"}
    llm = LLM(**arguments)
    asked = plan.sampling
    params = [
        SamplingParams(
            n=shard.samples, seed=shard.seed, temperature=asked.temperature, top_p=asked.top_p,
            max_tokens=asked.max_tokens, stop_token_ids=list(asked.stop_token_ids),
            logprobs=0 if asked.logprobs else None,
        )
        for shard in plan.shards
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": list(plan.prompts[shard.problem])} for shard in plan.shards]
    llm.generate(prompts[:1], SamplingParams(n=8, max_tokens=4, seed=1), use_tqdm=False)
    clock = Clock()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = clock.elapsed()
    return sum(len(o.token_ids) for output in outputs for o in output.outputs), *elapsed


def ours(spec: EngineSpec, draw) -> tuple[int, float, float]:
    """Return tokens, seconds and processor seconds of the evaluator, engine start left out."""
    engine = VllmEngine(spec)
    tokens, elapsed = 0, (0.0, 0.0)

    async def measured() -> None:
        await engine.sample(Request(draw.plan.prompts[0], 8, 1, Sampling(max_tokens=4)))
        clock = Clock()

        def done(_: int, of_them: int) -> None:
            nonlocal tokens, elapsed
            tokens += of_them
            # Before the engine, whose time counts, is closed.
            elapsed = clock.elapsed()

        await generate(draw, lambda alive: [] if alive else [engine], started=lambda *_: None, done=done)

    asyncio.run(measured())
    return tokens, *elapsed


def one(args: argparse.Namespace) -> None:
    """Measure one side and print it as JSON."""
    sampling = Sampling(max_tokens=24, logprobs=args.logprobs)
    model, files = args.toy_dir / "model", [args.toy_dir / "eval.parquet"]
    plan = read_plan(str(model), files, sampling, n=args.n, limit=args.problems)
    spec = EngineSpec(str(model), plan.longest)
    with tempfile.TemporaryDirectory() as folder:
        draw = Draw(plan, Store.create(Path(folder), plan))
        tokens, seconds, busy = bare(spec, plan) if args.side == "bare" else ours(spec, draw)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "busy": busy}))


def main() -> None:
    """Run the rounds and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy-dir", type=Path, default=Path("runs/toy/base0"))
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--logprobs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--side", choices=("bare", "ours"))
    args = parser.parse_args()
    if args.side:
        return one(args)
    rates: dict[str, dict[str, list[float]]] = {side: {"seconds": [], "busy": []} for side in ("bare", "ours")}
    environment = {**({} if has_gpu() else CPU_ENVIRONMENT), **os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    for number in range(args.rounds):
        # The order alternates, so that a drift of the machine does not favour one.
        for side in list(rates)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr[-3000:])
            found = json.loads(done.stdout.splitlines()[-1])
            for kind, values in rates[side].items():
                values.append(found["tokens"] / found[kind])
            words = f"{found['tokens']} tokens in {found['seconds']:.1f} s, {found['busy']:.1f} s of processor time"
            print(f"{side}: {words}", flush=True)
    for kind, unit in (("seconds", "second"), ("busy", "processor second")):
        medians = [statistics.median(rates[side][kind]) for side in ("bare", "ours")]
        shown = f"{medians[0]:,.0f} bare, {medians[1]:,.0f} ours; ratio {medians[1] / medians[0]:.3f}"
        print(f"median tokens per {unit}: {shown}")


if __name__ == "__main__":
    main()
