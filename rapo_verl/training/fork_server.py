"""One process imports veRL, vLLM and torch, the others of a run are forked from it: each import is paid for once.

A run on one machine has ten Python processes, started one after another by Ray and by vLLM, each of which imports
for 5 to 15 s of processor time. Both let the executable be named: Ray by ``runtime_env.py_executable``, multiprocessing
by ``set_executable``. `fork_client` is that executable.
"""

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import random
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from rapo_verl.run.processes import end_with_parent

# The allocator of pyarrow's library, which mends itself after a fork.
_SAFE_THREADS = {"jemalloc_bg_thd"}
# Bytes of a Unix socket's address (sys/un.h), seconds for a client to say what it wants.
_LONGEST_ADDRESS, _CLIENT_SECONDS = 107, 30.0


@contextmanager
def fork_server(modules: Sequence[str], under_ray: Sequence[str]) -> Iterator[str | None]:
    """Import the modules, fork the server off this process, and yield the executable that stands for ``python``.

    To be entered before the process has threads, which a fork does not copy. None, with a line in the log that says
    why, where it cannot be: then every process imports for itself. Modules that import Ray go into ``under_ray``: Ray
    reads the numbers of its job and its raylet from the environment when it is imported, so that the server waits for
    the first of Ray's processes. A fork has not the niceness of the process that it stands for: Ray's 15 starves its
    workers on a machine that does anything else.
    """
    for name in modules:
        importlib.import_module(name)
    folder = Path(tempfile.mkdtemp(prefix="rapo-fork-"))  # a TemporaryDirectory would end with the first fork that ends
    executable = folder / "python"
    address = str(folder / "socket")
    client = Path(__file__).with_name("fork_client.py")
    executable.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-I", "-S", str(client), address])} "$@"\n')
    executable.chmod(0o700)
    try:
        reason = _obstacle(executable, address)
        if reason:
            print(f"no fork server: {reason}; every process imports for itself")
            yield None
            return
        _serve(address, str(executable), under_ray)
        multiprocessing.set_executable(str(executable))
        yield str(executable)
    finally:
        multiprocessing.set_executable(sys.executable)
        shutil.rmtree(folder, ignore_errors=True)


def _obstacle(executable: Path, address: str) -> str:
    """Return why there can be no server, or nothing."""
    threads = _threads()
    if threads:
        return f"importing has started the threads {threads}"
    if len(os.fsencode(address)) > _LONGEST_ADDRESS or " " in address or not os.access(executable, os.X_OK):
        return f"TMPDIR must be short, without spaces and executable; it is {executable.parents[1]}"
    return ""


def _threads() -> list[str]:
    """Return the names of this process's other threads, Python's and libraries'."""
    names = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            names |= {task.joinpath("comm").read_text().strip()} if int(task.name) != os.getpid() else set()
    return sorted(names - _SAFE_THREADS)


def _serve(address: str, executable: str, under_ray: Sequence[str]) -> None:
    """Fork the server, which listens at the address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        gc.collect()
        gc.freeze()  # what is shared stays shared: the collector would write to every page
        if os.fork() == 0:
            try:
                end_with_parent(signal.SIGKILL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                _Server(listener, executable, under_ray).serve()
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(1)  # whatever it was: nothing of the parent's may be undone here
        gc.unfreeze()


class _Server:
    """Forks on demand; tells each client the pid and, in the end, the exit code; ends what has lost its client."""

    def __init__(self, listener: socket.socket, executable: str, under_ray: Sequence[str]):
        self.listener, self.executable, self.under_ray = listener, executable, under_ray
        self.clients: dict[int, socket.socket] = {}  # by pid

    def serve(self) -> NoReturn:
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as ready:
            ready.register(self.listener, selectors.EVENT_READ)
            ready.register(wake, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    if key.fileobj is self.listener:
                        self._accept(ready)
                    elif key.fd == wake:
                        os.read(wake, 512)
                    else:  # a client says nothing: it has ended
                        ready.unregister(key.fileobj)
                        os.kill(key.data, signal.SIGKILL)
                self._collect(ready)

    def _accept(self, ready: selectors.BaseSelector) -> None:
        client, _ = self.listener.accept()
        client.settimeout(_CLIENT_SECONDS)
        files: list[int] = []
        try:
            head, files, _, _ = socket.recv_fds(client, 8, 253)
            with client.makefile("rb") as stream:
                job = json.loads(stream.read(int.from_bytes(head, "little")))
            if self.under_ray and job["environment"].get("RAY_JOB_ID"):
                self._import_under_ray(job["environment"])
            pid = os.fork()
        except (OSError, ValueError, ImportError):  # the client has gone, or becomes a Python of its own
            traceback.print_exc()
            pid = -1
        if pid == 0:
            signal.set_wakeup_fd(-1)
            ready.close()
            self.listener.close()
            for other in (client, *self.clients.values()):
                other.close()
            _become(job, files, self.executable)
        for fd in files:
            os.close(fd)
        if pid < 0:
            client.close()
            return
        client.settimeout(None)
        _tell(client, pid)
        ready.register(client, selectors.EVENT_READ, pid)
        self.clients[pid] = client

    def _import_under_ray(self, environment: dict[str, str]) -> None:
        os.environ.update({name: value for name, value in environment.items() if name.startswith("RAY_")})
        for name in self.under_ray:
            importlib.import_module(name)
        self.under_ray = ()
        if _threads():
            print(f"the fork server's imports have started the threads {_threads()}, which no process will have")
        gc.collect()
        gc.freeze()

    def _collect(self, ready: selectors.BaseSelector) -> None:
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            client = self.clients.pop(pid, None)
            if client is None:
                continue
            if client in ready.get_map():
                ready.unregister(client)
                _tell(client, os.waitstatus_to_exitcode(status))
            client.close()


def _tell(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it has ended: the next look ends its process
        client.sendall(f"{number}\n".encode())


def _become(job: dict[str, Any], files: list[int], executable: str) -> NoReturn:
    """Turn this fork into the ``python`` that a client was started as, and end with its exit code."""
    code = 1
    try:
        end_with_parent(signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _take_files(files, job["files"])
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        random.seed()
        np.random.seed()
        multiprocessing.set_executable(executable)
        code = _run(job["arguments"])
    except BaseException:  # KeyboardInterrupt too: an interpreter prints whatever ends its main module
        traceback.print_exc()
    finally:
        try:  # as an interpreter ends
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                if not stream.closed:
                    stream.flush()
        finally:
            os._exit(code)


def _take_files(have: list[int], numbers: list[int]) -> None:
    """Give each open file the number that it had in the client."""
    above = 1 + max(*have, *numbers)
    moved = [os.dup2(fd, above + i) for i, fd in enumerate(have)]
    for fd in have:
        os.close(fd)
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _run(arguments: list[str]) -> int:
    """Do what ``python *arguments`` does and return its exit code."""
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-c", "-m"):
        if rest.pop(0) in ("-X", "-W"):
            rest.pop(0)
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        if rest[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[2:]], ""
            exec(compile(rest[1], "<string>", "exec"), main.__dict__)
        elif rest[0] == "-m":
            sys.argv, sys.path[0] = rest[1:], os.getcwd()
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = rest, str(Path(rest[0]).parent)
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0
