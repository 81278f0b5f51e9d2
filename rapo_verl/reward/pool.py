"""Persistent worker processes with a deadline that the parent keeps: kill, respawn, and notice every death."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rapo_verl.reward.verdict import VerifierSettings

# Seconds in which a nursery must have loaded math-verify, on a machine under any load.
_START_TIMEOUT = 120.0
# sympy's and the parser's caches only grow; a worker that lived for ever would meet its memory limit.
_TASKS_PER_WORKER = 2000


class TaskTimeoutError(Exception):
    """A task ran into its deadline; its worker was killed."""


class TaskDiedError(Exception):
    """A task ran out of memory or its worker died, on a second worker too."""


@dataclass
class _Worker:
    connection: Connection
    pid: int
    nursery: "_Nursery"
    tasks: int = 0


class _Nursery:
    """The process that forks workers (`worker`); one per pool, replaced if it dies."""

    def __init__(self, memory_mb: int):
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(theirs.fileno()), str(os.getpid()), str(memory_mb)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rapo_verl.reward.worker", *arguments],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self._control.settimeout(_START_TIMEOUT)
        if self._control.recv(64) != b"ready":
            raise RuntimeError(
                f"the verifier's process did not start (exit code {self._process.wait()}); its traceback is on stderr. "
                "Is math-verify installed? `rapo doctor` says"
            )

    def _ask(self, message: bytes, descriptors: list[int]) -> bytes:
        with self._lock:
            socket.send_fds(self._control, [message], descriptors)
            reply = self._control.recv(64)
        if not reply:
            raise ConnectionResetError("the verifier's nursery died")
        return reply

    def fork(self) -> _Worker:
        """Return a new worker."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid = int(self._ask(b"fork", [theirs.fileno()]))
        return _Worker(Connection(ours.detach()), pid, self)

    def kill(self, pid: int) -> None:
        """Kill a worker and reap it; to be asked of the nursery that forked it."""
        self._ask(b"kill %d" % pid, [])

    def close(self) -> None:
        """End the nursery and its workers."""
        self._control.close()
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """Runs tasks of `worker` on at most ``settings.workers`` processes; to be used from any thread.

    Nothing is started before the first task. No signal is used, so no thread is special.
    """

    def __init__(self, settings: VerifierSettings):
        self._settings = settings
        self._lock = threading.Lock()
        self._nursery: _Nursery | None = None
        # None where a worker has still to be forked.
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(settings.workers):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="rapo-verifier")

    def submit(self, task: str, *arguments: str) -> Future:
        """Return the future of a task's result; it may raise `TaskTimeoutError` or `TaskDiedError`."""
        return self._threads.submit(self._run, task, *arguments)

    def close(self) -> None:
        """Wait for the running tasks, drop the waiting ones and end all processes."""
        self._threads.shutdown(cancel_futures=True)
        if self._nursery is not None:
            self._nursery.close()

    def pids(self) -> list[int]:
        """Return the pids of the idle workers."""
        workers = [self._idle.get() for _ in range(self._idle.qsize())]
        for worker in workers:
            self._idle.put(worker)
        return [worker.pid for worker in workers if worker is not None]

    def _run(self, task: str, *arguments: str) -> Any:
        request = json.dumps([task, *arguments]).encode()
        worker = self._idle.get()
        try:
            # A death may be another's doing (the kernel's out-of-memory killer), so it is taken for the task's own
            # only when it happens again.
            for _ in range(2):
                worker = worker or self._fork()
                try:
                    answer = self._exchange(worker.connection, request)
                except (EOFError, OSError):
                    self._discard(worker)
                    worker = None
                    continue
                if answer == "out of memory":
                    break
                worker.tasks += 1
                return answer
            raise TaskDiedError(f"{task} ran out of {self._settings.memory_mb} MiB or its process died")
        except (TaskTimeoutError, TaskDiedError):
            if worker is not None:
                self._discard(worker)
                worker = None
            raise
        finally:
            if worker is not None and worker.tasks >= _TASKS_PER_WORKER:
                self._discard(worker)
                worker = None
            self._idle.put(worker)

    def _exchange(self, connection: Connection, request: bytes) -> Any:
        connection.send_bytes(request)
        if not connection.poll(self._settings.deadline_s):
            raise TaskTimeoutError(f"no answer within {self._settings.deadline_s} s")
        return json.loads(connection.recv_bytes())

    def _fork(self) -> _Worker:
        for attempt in range(2):
            with self._lock:
                if self._nursery is None:
                    self._nursery = _Nursery(self._settings.memory_mb)
                nursery = self._nursery
            try:
                return nursery.fork()
            except OSError:
                self._drop(nursery)
                if attempt:
                    raise
        raise AssertionError("unreachable")

    def _discard(self, worker: _Worker) -> None:
        worker.connection.close()
        try:
            # Its own nursery, never a later one: to that the pid means nothing, or another process.
            worker.nursery.kill(worker.pid)
        except OSError:
            # A dead nursery takes its workers with it, and is not the pool's any more or is not to stay so.
            self._drop(worker.nursery)

    def _drop(self, nursery: _Nursery) -> None:
        with self._lock:
            if self._nursery is nursery:
                nursery.close()
                self._nursery = None
