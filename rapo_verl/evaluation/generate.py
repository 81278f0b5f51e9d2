"""The work queue: shards to engines, finished ones to disk, and what a lost engine had in hand back to the queue."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rapo_verl import Failed
from rapo_verl.evaluation.spec import Sampling, SamplingPlan, Shard
from rapo_verl.evaluation.store import Samples, Store

logger = logging.getLogger(__name__)

# How often one shard is tried before it, not the engines, is taken for the cause.
MAX_ATTEMPTS = 4
# Seconds between looks for new machines.
POLL_S = 5.0


class EngineLostError(RuntimeError):
    """An engine died, or its machine did; what it had in hand is done again elsewhere."""


class Request(NamedTuple):
    """What an engine is asked for: samples of one prompt, the i-th with seed + i."""

    prompt: tuple[int, ...]
    samples: int
    seed: int
    sampling: Sampling


class Engine(Protocol):
    """Something that samples."""

    # Samples in flight that keep it busy.
    capacity: int

    async def sample(self, request: Request) -> Samples:
        """Return the samples; raises EngineLostError."""

    def close(self) -> None:
        """Free what it holds."""


# Given the engines that live, starts and returns those that may be added now.
Fleet = Callable[[Sequence[Engine]], list[Engine]]


@dataclass
class Draw:
    """A plan, its folder, and which of its shards this process makes: the i-th of ``count`` parts."""

    plan: SamplingPlan
    store: Store
    part: tuple[int, int] = (0, 1)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of this process; of every problem some, so that no part has all the long ones."""
        index, count = self.part
        return tuple(shard for shard in self.plan.shards if (shard.problem + shard.number) % count == index)


class _Queue:
    def __init__(self, draw: Draw, fleet: Fleet, done: Callable[[int, int], None]):
        self.draw, self.fleet, self.done = draw, fleet, done
        self.pending: deque[Shard] = deque()
        self.engines: list[Engine] = []
        self.in_hand: dict[asyncio.Task, tuple[Engine, Shard]] = {}
        self.attempts: Counter[Shard] = Counter()
        # Engines lost since a shard was last finished, and the most that lived at once.
        self.barren = self.most = 0

    async def run(self) -> None:
        looked = -POLL_S
        clock = asyncio.get_running_loop().time
        while self.pending or self.in_hand:
            if self.pending and (not self.engines or clock() - looked >= POLL_S):
                self.engines += self.fleet(self.engines)
                self.most = max(self.most, len(self.engines))
                looked = clock()
            self._hand_out()
            if not self.in_hand:
                await asyncio.sleep(0.2)
                continue
            finished, _ = await asyncio.wait(self.in_hand, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                self._collect(task)

    def _hand_out(self) -> None:
        """Fill every engine up to its capacity, the least busy first."""
        load = {id(engine): 0 for engine in self.engines}
        for engine, shard in self.in_hand.values():
            if id(engine) in load:
                load[id(engine)] += shard.samples
        while self.pending and self.engines:
            engine = min(self.engines, key=lambda e: load[id(e)] / e.capacity)
            if load[id(engine)] >= engine.capacity:
                return
            shard = self.pending.popleft()
            load[id(engine)] += shard.samples
            self.in_hand[asyncio.create_task(self._make(engine, shard))] = (engine, shard)

    async def _make(self, engine: Engine, shard: Shard) -> int:
        """Sample a shard, write it, and return its number of tokens."""
        plan = self.draw.plan
        samples = await engine.sample(Request(plan.prompts[shard.problem], shard.samples, shard.seed, plan.sampling))
        # In a thread: compressing and flushing would hold up the engine's own loop.
        await asyncio.to_thread(self.draw.store.write, shard, samples)
        return sum(samples.tokens)

    def _collect(self, task: asyncio.Task) -> None:
        engine, shard = self.in_hand.pop(task)
        error = task.exception()
        if error is None:
            self.barren = 0
            self.done(shard.samples, task.result())
            return
        if not isinstance(error, EngineLostError):
            raise error
        self.pending.appendleft(shard)
        self.attempts[shard] += 1
        if engine in self.engines:
            logger.warning("an engine was lost: %s; its shards in flight are done again", error)
            self.engines.remove(engine)
            engine.close()
            self.barren += 1
        if self.barren > max(3, self.most) or self.attempts[shard] >= MAX_ATTEMPTS:
            raise Failed(
                f"{self.barren} engine(s) were lost without a shard finished, problem "
                f"{self.draw.plan.problems[shard.problem].id!r} shard {shard.number} {self.attempts[shard]} time(s); "
                f"the last error: {error}"
            ) from error


async def generate(
    draw: Draw, fleet: Fleet, *, started: Callable[[int, int], None], done: Callable[[int, int], None]
) -> list[str]:
    """Make every shard that a draw's folder lacks; return what was wrong with files that were made again.

    The caller holds the folder (`Store.locked`). ``started`` is called once with the samples still to be made and those
    that are there, ``done`` for each shard with its samples and tokens. Failed: engines are lost time and again.
    """
    queue = _Queue(draw, fleet, done)
    todo, damaged = draw.store.missing(draw.shards)
    queue.pending.extend(todo)
    missing = sum(shard.samples for shard in todo)
    started(missing, sum(shard.samples for shard in draw.shards) - missing)
    try:
        await queue.run()
    finally:
        for task in queue.in_hand:
            task.cancel()
        for engine in queue.engines:
            engine.close()
    return damaged
