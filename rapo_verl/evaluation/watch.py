"""How far a folder is: samples, tokens per second, time left; from file names and footers alone."""

import time
from pathlib import Path
from typing import NamedTuple

from rapo_verl.evaluation.store import SHARDS, Store, read_stated

# Seconds that the rate looks back.
WINDOW_S = 600.0


class State(NamedTuple):
    """How far a folder is."""

    done: int
    total: int
    # Over the last WINDOW_S of work; nan before the second shard.
    tokens_per_s: float
    samples_per_s: float
    # Seconds since the last shard was finished.
    idle_s: float

    @property
    def left_s(self) -> float:
        """Seconds until all samples are there, at this rate."""
        return (self.total - self.done) / self.samples_per_s


class Watcher:
    """Reads each shard's footer once."""

    def __init__(self, folder: Path):
        self.store = Store.open(folder)
        self._seen: dict[Path, tuple[float, int, int]] = {}

    def look(self) -> State:
        """Return how far the folder is now."""
        for path in (self.store.folder / SHARDS).glob("*/*.parquet"):
            if path not in self._seen:
                stated = read_stated(path)
                self._seen[path] = (path.stat().st_mtime, stated["count"], stated["tokens"])
        total = self.store.manifest["n"] * len(self.store.problems)
        shards = sorted(self._seen.values())
        done = sum(count for _, count, _ in shards)
        if not shards:
            return State(0, total, float("nan"), float("nan"), float("nan"))
        last = shards[-1][0]
        recent = [shard for shard in shards if shard[0] >= last - WINDOW_S]
        span = last - recent[0][0]
        # The first shard only starts the clock.
        tokens, samples = (sum(shard[i] for shard in recent[1:]) for i in (2, 1))
        rates = (tokens / span, samples / span) if span > 0 else (float("nan"), float("nan"))
        return State(done, total, *rates, time.time() - last)


def describe(state: State) -> str:
    """Return a state as one line."""
    line = f"{state.done:,} of {state.total:,} samples ({100 * state.done / state.total:.1f} %)"
    if state.done == state.total:
        return f"{line}: complete"
    if state.samples_per_s != state.samples_per_s:
        return f"{line}; no rate yet"
    hours, rest = divmod(int(state.left_s), 3600)
    rate = f"{state.tokens_per_s:,.0f} tokens/s, {hours} h {rest // 60:02d} min left"
    return f"{line}; {rate}; last shard {state.idle_s:.0f} s ago"
