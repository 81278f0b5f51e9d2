"""A process that knows every process it has started, however far they went, and leaves none behind."""

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)

# Seconds for Ray and vLLM to end by themselves once the driver has.
GRACE_SECONDS = 20
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends, so that `descendants` finds them all.

    Ray's daemons leave their parent, and a process title overwrites the environment that could be searched for.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_with_parent(number: signal.Signals = signal.SIGINT) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends; by default an interrupt."""
    # A script's `rapo train &` starts with SIGINT ignored, and so would everything below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


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


def end_descendants(grace: float) -> None:
    """Ask every descendant to end, kill after ``grace`` seconds those that have not, and collect them."""
    for process in descendants():
        _send(process, kill=False)
    _, alive = psutil.wait_procs(descendants(), timeout=grace)
    # A process that is killed may have started another meanwhile.
    for _ in range(10):
        alive = descendants()
        if not alive:
            break
        for process in alive:
            _send(process, kill=True)
        psutil.wait_procs(alive, timeout=2)


def _send(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


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
def no_process_left(child: subprocess.Popen) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether the child runs; in the end, end it and every process it started."""
    known: dict[int, psutil.Process] = {}

    def running() -> bool:
        # Remembered while they can be found; psutil compares creation times, so a reused pid is not taken for ours.
        known.update((process.pid, process) for process in descendants(child.pid))
        return child.poll() is None

    try:
        yield running
    finally:
        if running():
            child.send_signal(signal.SIGINT)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                running()
                child.kill()
                child.wait()
        _, alive = psutil.wait_procs(list(known.values()), timeout=GRACE_SECONDS)
        for process in alive:
            logger.warning("ending a process that the run left: %s", process)
            process.kill()
