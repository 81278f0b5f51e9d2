"""The side of the verifier that may hang or die: a nursery that has math-verify loaded and forks workers from itself.

Run by `pool` as ``python -m rapo_verl.reward.nursery PARENT MEMORY_MB DEADLINE_S``, its stdin a socket. A fork of a
warm process takes milliseconds where a new interpreter with sympy takes a second, and nothing of the caller (its main
module, threads, accelerator) is in it. The parent's end of a socket closing ends everything here.
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

from math_verify import LatexExtractionConfig, parse, verify

from rapo_verl.reward.answer import normalize
from rapo_verl.reward.equality import equal, kind_of
from rapo_verl.reward.formula import UNSOLVED

_PR_SET_PDEATHSIG = 1
# sympy's and the parser's caches only grow; a worker that lived for ever would meet its memory limit.
_TASKS = 2000
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
        except UNSOLVED:
            return False
    # Boxed, since math-verify finds nothing in a bare "\\frac34" or "(4,-2,3)".
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found = [parse(f"\\boxed{{{text}}}", [config], parsing_timeout=None) for text in (gold, box)]
    return bool(verify(*found, timeout_seconds=None))


def _answer(task: str, *arguments: str) -> str:
    if task == "kind_of":
        return kind_of(normalize(*arguments))
    return "correct" if compare(*arguments) else "wrong"


def _serve(connection: Connection, memory_mb: int, deadline_s: float) -> None:
    """Answer tasks until the parent is gone; past the deadline, or out of memory, this process ends."""
    # A worker that hangs in C code would outlive a nursery that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # GMP reports on stderr before it aborts.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for _ in range(_TASKS):
        task = json.loads(connection.recv_bytes())
        # The default action of SIGALRM ends the process, in C code too.
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        answer = _answer(*task)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(answer).encode())


def _nurse(control: socket.socket, parent: int, memory_mb: int, deadline_s: float) -> None:
    """Fork a worker for each socket that comes, until the parent is gone."""
    # The socket stays open where a fork of the parent has a copy of it.
    while os.getppid() == parent:
        if not select.select([control], [], [], 1.0)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            try:
                _serve(Connection(descriptors[0]), memory_mb, deadline_s)
            finally:
                os._exit(1)
        os.close(descriptors[0])


def main() -> None:
    """Load math-verify, warm it up, say so, and serve."""
    # Ctrl-C is the parent's to handle; the kernel reaps the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    logging.disable()
    for answer in _WARM_UP:
        compare(answer, "x+0.7", "symmetric")
        compare(answer, "x>0.7", "symmetric")
    control = socket.socket(fileno=0)
    control.send(b"ready")
    _nurse(control, int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))


if __name__ == "__main__":
    main()
