"""Persistent worker processes that end themselves at a deadline: notice every death, and fork anew."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

from rapo_verl.reward.verdict import Verdict, VerifierSettings

# Seconds in which a nursery must have loaded math-verify, on a machine under any load.
_START_TIMEOUT = 120.0


class _Nursery:
    """The process that forks workers (`nursery`); one per pool, replaced if it dies."""

    def __init__(self, settings: VerifierSettings):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [os.getpid(), settings.memory_mb, settings.deadline_s]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rapo_verl.reward.nursery", *map(str, arguments)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._control.settimeout(_START_TIMEOUT)
        if self._control.recv(64) != b"ready":
            raise RuntimeError(
                f"the verifier's process did not start (exit code {self._process.wait()}); its traceback is on stderr. "
                "Is math-verify installed? `rapo doctor` says"
            )

    def fork(self) -> Connection:
        """Return the connection to a new worker, which ends when this end closes; OSError if the nursery is dead."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        return Connection(ours.detach())

    def close(self) -> None:
        """End the nursery and its workers."""
        self._control.close()
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """Runs tasks of `nursery` on at most ``settings.workers`` processes; to be used from any thread.

    Nothing is started before the first task. No signal of this process is used, so no thread is special.
    """

    def __init__(self, settings: VerifierSettings):
        self._settings = settings
        self._lock = threading.Lock()
        self._nursery: _Nursery | None = None
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="rapo-verifier")
        # Each thread talks to a worker of its own.
        self._mine = threading.local()

    def submit(self, task: str, *arguments: str) -> Future:
        """Return the future of a task's answer: the worker's, or `Verdict.timeout` or `Verdict.error`."""
        return self._threads.submit(self._run, task, *arguments)

    def close(self) -> None:
        """Wait for the running tasks, drop the waiting ones and end all processes."""
        self._threads.shutdown(cancel_futures=True)
        if self._nursery is not None:
            self._nursery.close()

    def _run(self, *task: str) -> str:
        # A death may be another's doing (the kernel's out-of-memory killer), so it is taken for the task's own only
        # when it happens again.
        for _ in range(2):
            worker = self._worker()
            started = time.monotonic()
            try:
                worker.send_bytes(json.dumps(task).encode())
                return json.loads(worker.recv_bytes())
            except (EOFError, OSError):
                # Its clock started after ours.
                if time.monotonic() - started >= self._settings.deadline_s:
                    return Verdict.timeout
        return Verdict.error

    def _worker(self) -> Connection:
        """Return the connection to this thread's worker, a new one if it has none or that has ended."""
        worker: Connection | None = getattr(self._mine, "worker", None)
        if worker is None or worker.poll():  # with nothing asked, all there is to read is its end
            if worker is not None:
                worker.close()
            self._mine.worker = worker = self._fork()
        return worker

    def _fork(self) -> Connection:
        with self._lock:
            if self._nursery is not None:
                try:
                    return self._nursery.fork()
                except OSError:  # it was killed, and its workers with it
                    self._nursery.close()
            self._nursery = _Nursery(self._settings)
            return self._nursery.fork()
