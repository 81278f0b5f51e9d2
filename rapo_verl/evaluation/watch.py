"""How far a folder is: samples, tokens per second, time left; from file names and footers alone."""

import math
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rapo_verl.evaluation.store import SHARDS, Store, read_stated

# Seconds that the rate looks back.
WINDOW_S = 600.0


class State(NamedTuple):
    """How far a folder is; rates over the last WINDOW_S of work, nan before the second shard."""

    done: int
    total: int
    tokens_per_s: float = math.nan
    samples_per_s: float = math.nan
    # Since the last shard was finished.
    idle_s: float = math.nan

    def __str__(self) -> str:
        line = f"{self.done:,} of {self.total:,} samples ({100 * self.done / self.total:.1f} %)"
        if self.done == self.total:
            return f"{line}: complete"
        if math.isnan(self.samples_per_s):
            return f"{line}; no rate yet"
        hours, rest = divmod(int((self.total - self.done) / self.samples_per_s), 3600)
        rate = f"{self.tokens_per_s:,.0f} tokens/s, {hours} h {rest // 60:02d} min left"
        return f"{line}; {rate}; last shard {self.idle_s:.0f} s ago"


def look(store: Store) -> State:
    """Return how far a folder is now; each shard's footer is read once."""
    total = store.manifest["n"] * len(store.problems)
    shards = sorted(_shard(path) for path in (store.folder / SHARDS).glob("*/*.parquet"))
    done = sum(count for _, count, _ in shards)
    if not shards:
        return State(0, total)
    last = shards[-1][0]
    # The first shard only starts the clock.
    began, *recent = [shard for shard in shards if shard[0] >= last - WINDOW_S]
    span = last - began[0] or math.nan
    tokens, samples = (sum(shard[i] for shard in recent) / span for i in (2, 1))
    return State(done, total, tokens, samples, time.time() - last)


@cache
def _shard(path: Path) -> tuple[float, int, int]:
    """Return when a shard was finished, its samples and its tokens."""
    stated = read_stated(path)
    return path.stat().st_mtime, stated["count"], stated["tokens"]
