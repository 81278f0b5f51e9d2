"""A process that knows every process it has started, however far they went, and leaves none behind."""

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)

# Seconds for Ray and vLLM to end by themselves once the driver has.
GRACE_SECONDS = 20
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends, so that `descendants` finds them all.

    Ray's daemons leave their parent, and a process title overwrites the environment that could be searched for.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(number: signal.Signals = signal.SIGINT) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends; by default an interrupt."""
    # A script's `rapo train &` starts with SIGINT ignored, and so would everything below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _prctl(_PR_SET_PDEATHSIG, number)


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Return the living processes below ``pid``, by default this one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def repeating(seconds: float, look: Callable[[], bool | None], name: str) -> Iterator[None]:
    """Call ``look`` every so many seconds in a thread of this name, while the body runs or until it returns True."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds) and not look():
            pass

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs and is not a zombie; one that ends meanwhile does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _all_but(spare: Collection[psutil.Process]) -> list[psutil.Process]:
    """Return the children of this process and all below them, but for those in ``spare`` and what is below those."""
    children = [child for child in psutil.Process().children() if child not in spare]
    return [process for child in children for process in (child, *descendants(child.pid))]


def end_descendants(grace: float, spare: Collection[psutil.Process] = ()) -> None:
    """Ask all descendants `_all_but` some to end, kill after ``grace`` seconds those that have not, collect them."""
    for how, seconds in (("terminate", grace), *[("kill", 2.0)] * 10):  # what is killed may have started another
        found = _all_but(spare)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                getattr(process, how)()
        psutil.wait_procs(found, timeout=seconds)


def dump_stacks(folder: Path, processes: list[psutil.Process]) -> None:
    """Write the Python stacks of these processes into ``folder``, by py-spy, or what the kernel tells without it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Beside this Python first: a virtual environment need not have been activated.
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    py_spy = shutil.which("py-spy", path=os.pathsep.join(folders))
    for process in processes:
        try:
            name = f"{process.pid}.{process.name().replace('/', '_')}.txt"
            text = f"{' '.join(process.cmdline())[:300]}\nstate: {process.status()}\n"
        except psutil.Error:
            continue
        (folder / name).write_text(text + _stack(py_spy, process.pid))


def _stack(py_spy: str | None, pid: int) -> str:
    if py_spy is not None:
        command = [py_spy, "dump", "--pid", str(pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return "py-spy took longer than 20 s\n"
        if done.returncode == 0:
            return done.stdout
        logger.debug("py-spy %s: %s", pid, done.stderr)
    try:
        return f"no Python stack; it waits in: {Path(f'/proc/{pid}/wchan').read_text()}\n"
    except OSError as error:
        return f"no stack: {os.strerror(error.errno or 0)}\n"


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM take the way of Ctrl-C, so that it ends the run's processes too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def no_process_left(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a command (``options`` as for Popen); in the end, end it and every process that came of it."""
    adopt_orphans()
    others = psutil.Process().children()
    child = subprocess.Popen(command, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        psutil.wait_procs(_all_but(others), timeout=GRACE_SECONDS)  # Ray's daemons and W&B's uploads end by themselves
        end_descendants(GRACE_SECONDS / 4, spare=others)
