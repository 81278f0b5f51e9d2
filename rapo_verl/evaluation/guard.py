"""Ends vLLM's processes when the one that started them is gone, by SIGKILL too: they do not look after themselves.

Run as ``python -m rapo_verl.evaluation.guard PID:CREATED ...`` with a pipe as standard input that ends with the parent.
"""

import subprocess
import sys

import psutil


def guard(processes: list[psutil.Process]) -> subprocess.Popen:
    """Start a guard over processes; closing its standard input, or this process's end in any way, ends them."""
    named = [f"{process.pid}:{process.create_time()}" for process in processes]
    command = [sys.executable, "-m", "rapo_verl.evaluation.guard", *named]
    # A session of its own: Ctrl-C reaches vLLM and its parent, which end in order.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def main() -> None:
    """Wait for the end of standard input, then kill what is left of the named processes."""
    sys.stdin.buffer.read()
    for name in sys.argv[1:]:
        pid, created = name.split(":")
        try:
            process = psutil.Process(int(pid))
            # The pid may have gone to another process.
            if str(process.create_time()) == created:
                process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    main()
