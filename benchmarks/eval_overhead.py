"""Tokens per second of `rapo eval generate` against bare `vllm.LLM.generate`, same settings, in turns on one machine.

    python benchmarks/eval_overhead.py --toy-dir runs/toy/base0 --n 512 --problems 24 --rounds 2

Each measurement is a process of its own; loading is left out of both. Ours includes shard files, flushed to disk.
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

from rapo_verl.evaluation.engines import CPU_ENVIRONMENT, EngineSpec, VllmEngine, has_gpu
from rapo_verl.evaluation.generate import Request, generate
from rapo_verl.evaluation.plan import Sampling
from rapo_verl.evaluation.session import read_subject


def bare(spec: EngineSpec, plan) -> tuple[int, float]:
    """Return tokens and seconds of one call of vLLM's own `LLM.generate` over all requests."""
    from vllm import LLM, SamplingParams

    arguments = {key: value for key, value in spec.arguments().items() if key != "disable_log_stats"}
    llm = LLM(**arguments)
    asked = plan.sampling
    params = [
        SamplingParams(
            n=job.samples, seed=job.seed, temperature=asked.temperature, top_p=asked.top_p, max_tokens=asked.max_tokens,
            stop_token_ids=list(asked.stop_token_ids), logprobs=0 if asked.logprobs else None,
        )
        for job in plan.jobs
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": list(plan.prompts[job.problem])} for job in plan.jobs]
    llm.generate(prompts[:1], SamplingParams(n=8, max_tokens=4, seed=1), use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(o.token_ids) for output in outputs for o in output.outputs), seconds


def ours(spec: EngineSpec, draw) -> tuple[int, float]:
    """Return tokens and seconds of the evaluator, engine start left out."""
    engine = VllmEngine(spec)
    tokens = 0

    async def measured() -> float:
        await engine.sample(Request(draw.plan.prompts[0], 8, 1, Sampling(max_tokens=4)))
        start = time.perf_counter()

        def done(_: int, of_them: int) -> None:
            nonlocal tokens
            tokens += of_them

        await generate([draw], lambda alive: [] if alive else [engine], started=lambda *_: None, done=done)
        return time.perf_counter() - start

    seconds = asyncio.run(measured())
    return tokens, seconds


def one(args: argparse.Namespace) -> None:
    """Measure one side and print it as JSON."""
    sampling = Sampling(max_tokens=24, logprobs=args.logprobs)
    subject = read_subject(str(args.toy_dir / "model"), [args.toy_dir / "eval.parquet"], sampling, limit=args.problems)
    spec = EngineSpec(str(subject.folder), subject.longest)
    with tempfile.TemporaryDirectory() as folder:
        draw = subject.draw(Path(folder), n=args.n)
        tokens, seconds = bare(spec, draw.plan) if args.side == "bare" else ours(spec, draw)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


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
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    environment = {**({} if has_gpu() else CPU_ENVIRONMENT), **os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    for number in range(args.rounds):
        # The order alternates, so that a drift of the machine does not favour one.
        for side in list(rates)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr[-3000:])
            found = json.loads(done.stdout.splitlines()[-1])
            rates[side].append(found["tokens"] / found["seconds"])
            print(f"{side}: {found['tokens']} tokens in {found['seconds']:.1f} s, {rates[side][-1]:,.0f} tokens/s")
    medians = {side: statistics.median(values) for side, values in rates.items()}
    ratio = medians["ours"] / medians["bare"]
    print(f"median {medians['bare']:,.0f} and {medians['ours']:,.0f} tokens/s; ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
