"""The side of the verifier that may hang or die: a nursery that has math-verify loaded and forks workers from itself.

Run by `pool` as ``python -m rapo_verl.reward.worker FD PARENT MEMORY_MB``. A fork of a warm process takes
milliseconds where a new interpreter with sympy takes a second, and nothing of the caller (its main module, threads,
accelerator) is in it. The parent's end of a socket closing ends everything here.
"""

import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
from multiprocessing.connection import Connection

from sympy import PolynomialError

from rapo_verl.reward.answer import normalize
from rapo_verl.reward.equality import equal, kind_of

_PR_SET_PDEATHSIG = 1
# What sympy raises on two things that it cannot bring together; PolynomialError is no ValueError.
_INCOMPARABLE = (
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    PolynomialError,
    RecursionError,
    TypeError,
    ValueError,
)
# Parsed before the first fork: they fill the parser's tables, which every worker then shares.
_WARM_UP = (
    r"\frac{\sqrt{2}}{2}",
    r"3\frac{1}{2}",
    "(x-1)(x+1)=y^2",
    r"(-\infty,2]\cup[3,\infty)",
    "1<x<2",
    r"\{1,2,3\}",
    "(1,-2,3)",
    r"5\text{ cm}",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"2\pi i+\sin x",
    "0.5",
)


def compare(gold: str, box: str, strictness: str) -> bool:
    """Return whether two answers are equal, or whether math-verify says so if it is to be itself."""
    if strictness != "math_verify":
        try:
            return equal(normalize(gold), normalize(box))
        except _INCOMPARABLE:
            return False
    from math_verify import LatexExtractionConfig, parse, verify

    # Boxed, since math-verify finds nothing in a bare "\\frac34" or "(4,-2,3)".
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found = [parse(f"\\boxed{{{text}}}", [config], parsing_timeout=None) for text in (gold, box)]
    return bool(verify(*found, timeout_seconds=None))


def _serve(connection: Connection) -> None:
    while True:
        try:
            task, *arguments = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = compare(*arguments) if task == "compare" else kind_of(normalize(*arguments))
        except MemoryError:
            # Whatever was half done when memory ran out goes with the process.
            connection.send_bytes(b'"out of memory"')
            return
        connection.send_bytes(json.dumps(answer).encode())


def _become_worker(fd: int, memory_mb: int) -> None:
    # A worker that hangs in C code would outlive a nursery that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # GMP reports on stderr before it aborts.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _serve(Connection(fd))


def _nurse(control: socket.socket, parent: int, memory_mb: int) -> None:
    """Fork a worker per "fork" message, kill and reap one per "kill PID" message, until the parent is gone."""
    # A child that died stays a zombie, and its pid its own, until it is reaped here.
    workers: set[int] = set()
    while True:
        if not select.select([control], [], [], 1.0)[0]:
            # The socket stays open where a fork of the parent has a copy of it.
            if os.getppid() != parent:
                return
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if message == b"fork":
            pid = os.fork()
            if pid == 0:
                control.close()
                _become_worker(descriptors[0], memory_mb)
                os._exit(0)
            workers.add(pid)
            os.close(descriptors[0])
            control.send(str(pid).encode())
        else:
            pid = int(message.split()[1])
            if pid in workers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                workers.discard(pid)
            control.send(b"dead")


def main() -> None:
    """Load math-verify, warm it up, say so, and serve."""
    fd, parent, memory_mb = (int(argument) for argument in sys.argv[1:])
    # Ctrl-C is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()
    for answer in _WARM_UP:
        compare(answer, "x+0.7", "symmetric")
        compare(answer, "x>0.7", "symmetric")
    control = socket.socket(fileno=fd)
    control.send(b"ready")
    _nurse(control, parent, memory_mb)


if __name__ == "__main__":
    main()
