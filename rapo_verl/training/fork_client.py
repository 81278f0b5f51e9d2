"""Run in place of ``python`` by Ray and multiprocessing: asks `fork_server` for a process that has imported everything.

A script of the standard library alone, started with ``-I -S``: it lives as long as the process it stands for, passes
signals on to it and ends with its exit code. Where no server answers it becomes a fresh Python.
"""

import array
import json
import os
import signal
import socket
import sys


def main(address: str, arguments: list[str]) -> None:
    """Have the server at ``address`` run ``python *arguments`` with this process's environment, folder and files."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address)
    except OSError:
        server.close()
        os.execv(sys.executable, [sys.executable, *arguments])
    inherited = sorted(int(name) for name in os.listdir("/proc/self/fd"))  # with the one that lists, closed by now
    files = [fd for fd in inherited if fd != server.fileno() and os.path.exists(f"/proc/self/fd/{fd}")]
    job = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}
    text = json.dumps(job).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
    server.sendmsg([len(text).to_bytes(8, "little")], [rights])
    server.sendall(text)
    answers = server.makefile("r")
    pid = int(answers.readline() or 0)
    if pid == 0:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: _pass_on(pid, number))
    for fd in files:
        os.close(fd)
    answer = answers.readline()
    if not answer:  # the server has ended, and its forks with it
        os._exit(1)
    code = int(answer)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _pass_on(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
