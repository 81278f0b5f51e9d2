"""Ends a training one of whose actors has died, where veRL would wait for it for ever."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from rapo_verl.run.processes import repeating

logger = logging.getLogger(__name__)

# Seconds between two looks at whether the run's actors live.
LIVENESS_SECONDS = 5.0
ACTOR_DIED = 1


def _end(gone: set[str]) -> None:
    print(
        f"rapo: {len(gone)} actor(s) of the run died: {', '.join(sorted(gone))}; the reason is in the log above (too "
        "little memory, most often). Ending the run",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ACTOR_DIED)


@contextmanager
def actors_watched(end: Callable[[set[str]], None] = _end) -> Iterator[None]:
    """Watch the named actors of this Ray job, in a thread, while the body runs.

    Not every loss reaches the trainer as an exception.

    Args:
        end: called once with the names of the dead, at the second look that misses them, so that an exception that
            says more comes first. By default it ends this process, and with it the run.
    """
    # verl 0.9.1 trainer/ppo/v1/agent_loop_tq.py:104: sends a prompt to an actor and forgets it. Likewise
    # workers/rollout/vllm_rollout/bucketed_weight_transfer.py:195 waits in a socket for a vLLM server that is gone.
    known: set[str] = set()
    missed: set[str] = set()

    def look() -> bool:
        nonlocal missed
        try:
            alive = set(ray.util.list_named_actors())  # of this job: its namespace is its own
        except ray.exceptions.RayError as error:  # Ray's control store is busy or restarting: look again later
            logger.warning("the run's actors could not be listed: %s", error)
            return False
        if gone := missed - alive:
            end(gone)
            return True
        missed = known - alive
        known.update(alive)
        return False

    with repeating(LIVENESS_SECONDS, look, "rapo-liveness"):
        yield
