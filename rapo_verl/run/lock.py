"""One process at a time in a folder, and a dead one's lock in nobody's way."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

from rapo_verl import Refused
from rapo_verl.run.names import LOCK_FILE
from rapo_verl.run.processes import repeating

logger = logging.getLogger(__name__)

# Seconds between two beats of the process that holds a run's folder, and after which a silent one is dead.
BEAT_SECONDS, DEAD_SECONDS = 10.0, 40.0


class NoLocksHereError(OSError):
    """A filesystem without locks."""


@contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[IO[str]]:
    """Hold a lock on a file while the body runs; the kernel takes it back when the process ends, however it ends.

    Args:
        path: made if it is not there.
        shared: others may hold it beside this process, if they share it too.

    Raises:
        BlockingIOError: another process holds it.
        NoLocksHereError: the filesystem knows no locks.
    """
    path.touch()
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            raise NoLocksHereError(error.errno, f"{path}: {os.strerror(error.errno or 0)}") from error
        yield lock


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder for this process while the body runs.

    The kernel's lock is enough on one machine, and on shared filesystems that pass it on. For the others the holder
    beats: it counts up in the lock file. One that is silent for DEAD_SECONDS is dead, and its lock blocks nobody.

    Raises:
        Refused: another process holds it.
    """
    path = run_dir / LOCK_FILE
    with ExitStack() as stack:
        kernel_knows = True
        try:
            lock = stack.enter_context(held(path))
        except BlockingIOError as error:
            raise Refused(_taken(run_dir, _owner(path))) from error
        except NoLocksHereError:
            kernel_knows = False
            lock = stack.enter_context(path.open("r+"))
        owner = _owner(path)
        if owner and not (kernel_knows and owner["host"] == os.uname().nodename):
            _refuse_beating(path, owner)
        stack.enter_context(_beating(lock))
        yield


def _owner(path: Path) -> dict[str, Any]:
    # Opened anew each time: then a network filesystem asks its server, and not its cache.
    try:
        return json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}


def _taken(run_dir: Path, owner: dict[str, Any]) -> str:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return f"{who} trains in {run_dir}; wait for it, end it, or give this run a folder of its own (run_dir=...)"


def _refuse_beating(path: Path, owner: dict[str, Any]) -> None:
    """Refuse if the lock's owner lives, of which the kernel here does not know."""
    print(
        f"{path.parent} was held by {owner['host']}: listening for {DEAD_SECONDS:.0f} s whether it still is", flush=True
    )
    ends = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < ends:
        time.sleep(min(1.0, DEAD_SECONDS / 10))
        now = _owner(path)
        if not now:
            return
        if now != owner:
            raise Refused(_taken(path.parent, now))


@contextmanager
def _beating(lock: IO[str]) -> Iterator[None]:
    """Count up in the lock file while the body runs, and leave it empty."""
    beats = count()

    def beat() -> None:
        owner = {"host": os.uname().nodename, "pid": os.getpid(), "beat": next(beats)}
        try:
            os.pwrite(lock.fileno(), json.dumps(owner).ljust(200).encode(), 0)
        except OSError as error:  # the next one may come through
            logger.warning("%s could not be written: %s", lock.name, error)

    os.ftruncate(lock.fileno(), 0)
    beat()
    try:
        with repeating(BEAT_SECONDS, beat, "rapo-lock"):
            yield
    finally:
        os.ftruncate(lock.fileno(), 0)
