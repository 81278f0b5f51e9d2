"""A `python` that is forked: what a process sees and leaves is what it would have been as a fresh one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rapo_verl.run.names import CPU_ENVIRONMENT, FORK_SERVER_VARIABLE

HERE = Path(__file__).parent
# As a run sets it: with more, numpy's library starts threads at its import.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SERVE = """
import sys, time
from rapo_verl.training.fork_server import fork_server
with fork_server(["json", "tensordict"], []) as python:
    print(python, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def python():
    """The executable of a server that has imported tensordict."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as server:
        path = server.stdout.readline().strip()
        yield path
        server.stdin.close()
        server.wait(20)
    assert server.returncode == 0 and not Path(path).parent.exists()


def ran(python, *arguments, **options):
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=180, **options)


def test_code_is_run_with_its_arguments_environment_folder_and_files(python, tmp_path):
    code = (
        "import os, sys; print(sys.argv, os.environ['A'], os.getcwd(), sys.stdin.read(), 'tensordict' in sys.modules)"
    )
    done = ran(python, "-u", "-X", "faulthandler", "-c", code, "x", "y z", env={"A": "1"}, cwd=tmp_path, input="in")
    assert done.stdout.strip() == f"['-c', 'x', 'y z'] 1 {tmp_path} in True", done.stderr


def test_scripts_and_modules_are_run_as_main(python, tmp_path):
    (tmp_path / "beside.py").write_text("value = 7\n")
    (tmp_path / "script.py").write_text(
        "import sys, beside\nif __name__ == '__main__': print(beside.value, sys.argv[1:])\n"
    )
    assert ran(python, str(tmp_path / "script.py"), "a").stdout == "7 ['a']\n"
    assert ran(python, "-m", "script", "b", cwd=tmp_path).stdout == "7 ['b']\n"


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why"),
        ("raise ValueError('so')", 1, "ValueError: so"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os._exit(5)", 5, ""),
    ],
)
def test_exit_code_and_errors_are_those_of_the_process(python, code, exit_code, said):
    done = ran(python, "-c", code)
    assert done.returncode == exit_code and said in done.stderr


def test_two_processes_draw_other_numbers(python):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = ran(python, "-c", code).stdout.split(), ran(python, "-c", code).stdout.split()
    assert len(first) == 2 and not set(first) & set(second)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_process_ends_with_the_one_that_stands_for_it(python, number):
    client = subprocess.Popen(
        [python, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    process = psutil.Process(int(client.stdout.readline()))
    client.send_signal(number)
    assert client.wait(20) == -number
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running()


def test_multiprocessing_starts_its_processes_so(python, tmp_path):
    (tmp_path / "spawn.py").write_text(
        "import multiprocessing, sys\n"
        "def work(queue): queue.put('tensordict' in sys.modules)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=work, args=(queue,))\n"
        "    process.start()\n"
        "    print(queue.get(timeout=30)); process.join(); print(process.exitcode)\n"
    )
    done = ran(python, str(tmp_path / "spawn.py"))
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_without_a_server_it_is_a_fresh_python(tmp_path):
    client = HERE.parent / "rapo_verl" / "training" / "fork_client.py"
    done = ran(sys.executable, "-I", "-S", str(client), str(tmp_path / "nobody"), "-c", "print(6 * 7)")
    assert done.stdout == "42\n"


def test_server_and_its_processes_end_with_the_process_that_started_it():
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    path = server.stdout.readline().strip()
    client = subprocess.Popen(
        [path, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert int(client.stdout.readline()) in {p.pid for p in psutil.Process(server.pid).children(recursive=True)}
    forked = psutil.Process(server.pid).children(recursive=True)
    assert len(forked) == 2
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    gone, alive = psutil.wait_procs(forked, timeout=20)
    assert gone and not alive
    started = time.monotonic()
    assert client.wait(20) == 1 and time.monotonic() - started < 20


WIRED = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from rapo_verl.training import main

def train(config):
    import ray
    runtime_env = OmegaConf.to_container(config.ray_kwargs.ray_init.runtime_env)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)
    loaded = ray.remote(lambda: sorted({"torch", "verl", "vllm"} & set(__import__("sys").modules)))
    print("loaded", *ray.get(loaded.remote()))
    ray.shutdown()

main._train = train
main.main(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(("switch", "loaded"), [("1", "loaded torch verl vllm"), ("0", "loaded")])
def test_a_run_s_ray_workers_have_everything_imported_unless_it_is_switched_off(tmp_path, switch, loaded):
    (tmp_path / "config.yaml").write_text("trainer: {device: cpu}\nray_kwargs: {ray_init: {}}\n")
    environment = {**ENVIRONMENT, **CPU_ENVIRONMENT, "VERL_PLATFORM": "cpu", FORK_SERVER_VARIABLE: switch}
    done = ran(sys.executable, "-c", WIRED, str(tmp_path), env=environment)
    assert done.returncode == 0 and loaded in done.stdout.splitlines(), done.stderr[-2000:]


def test_a_client_that_goes_at_once_or_talks_nonsense_harms_no_other(python):
    for said in (b"", b"\x05" + bytes(7) + b"hello"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(Path(python).with_name("socket")))
            client.sendall(said)
    # A fresh Python, which stands in for a server that is gone, has not imported it.
    assert ran(python, "-c", "import sys; print('tensordict' in sys.modules)").stdout == "True\n"


@pytest.mark.parametrize("folder", ["x" * 90, "a b"])
def test_folder_for_temporary_files_that_does_not_serve_forbids_it(tmp_path, folder):
    (tmp_path / folder).mkdir()
    code = "from rapo_verl.training.fork_server import fork_server\nwith fork_server([], []) as p: print(p)"
    done = ran(sys.executable, "-c", code, env={**ENVIRONMENT, "TMPDIR": str(tmp_path / folder)})
    assert "no fork server: TMPDIR" in done.stdout and done.stdout.endswith("None\n"), done.stderr
    assert not list((tmp_path / folder).iterdir())


def test_threads_of_an_import_forbid_it(tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    )
    code = "from rapo_verl.training.fork_server import fork_server\nwith fork_server(['threaded'], []) as p: print(p)"
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = ran(sys.executable, "-c", code, env=environment)
    assert "no fork server" in done.stdout and done.stdout.endswith("None\n"), done.stderr
