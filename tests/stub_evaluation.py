"""An evaluation whose engines are stubs, to be killed."""

import asyncio
import random

from rapo_verl.evaluation.generate import Draw, EngineLostError, generate
from rapo_verl.evaluation.spec import Problem, Sampling, SamplingPlan
from rapo_verl.evaluation.store import Samples, Store

PROBLEMS, N, SHARD = 12, 117, 6  # the last shard of a problem is smaller


def plan(**changes):
    messages = ({"role": "user", "content": "How many?"},)
    problems = tuple(Problem(f"p{i}", "set", "a" if i % 2 else "b", str(i), messages) for i in range(PROBLEMS))
    fields = {
        "model": "0" * 64, "data": {"set.parquet": "1"}, "problems": problems,
        "prompts": tuple((i,) for i in range(PROBLEMS)), "n": N, "draw": 1, "sampling": Sampling(max_tokens=8),
        "shard": SHARD, "versions": {},
    }  # fmt: skip
    return SamplingPlan(**(fields | changes))


def draw(folder, **changes):
    made = plan(**changes)
    return Draw(made, Store.create(folder, made))


def answer(seed, problem):
    """A text that only this seed gives; about a third are right."""
    value = problem if seed % 3 == 0 else seed % 5 + 100
    return f"sample {seed}: \\boxed{{{value}}}" if seed % 7 else f"sample {seed}: none"


def samples(request):
    seeds = range(request.seed, request.seed + request.samples)
    reasons = ["length" if seed % 7 == 0 else "stop" for seed in seeds]
    log_probs = [-1.0 * (seed % 11) for seed in seeds]
    return Samples([seed % 8 + 1 for seed in seeds], reasons, log_probs, [answer(s, request.prompt[0]) for s in seeds])


class StubEngine:
    capacity = 2 * SHARD

    def __init__(self, seconds=0.0, lost_after=None):
        self.seconds, self.lost_after, self.made, self.closed = seconds, lost_after, 0, False

    async def sample(self, request):
        await asyncio.sleep(self.seconds * random.random())
        if self.lost_after is not None and self.made >= self.lost_after:
            raise EngineLostError("its machine burns")
        self.made += 1
        return samples(request)

    def close(self):
        self.closed = True


def run(drawn, *engines, done=lambda *_: None, fleet=None):
    started = []
    left = list(engines)

    def hand_out(alive):
        given, left[:] = list(left), []
        return given

    work = generate(drawn, fleet or hand_out, started=lambda *counts: started.append(counts), done=done)
    return started, asyncio.run(work)


def work(folder):
    drawn = draw(folder)
    with drawn.store.locked():
        run(drawn, StubEngine(0.08), StubEngine(0.08))
