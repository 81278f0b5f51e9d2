"""Stopping in time, refusing NaN, ending every process, and what is refused before a run starts."""

import inspect
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from omegaconf import OmegaConf
from verl.utils.logging_utils import configure_verl_logging

from rapo_verl.run.compose import compose_config, experiments
from rapo_verl.run.inspect import describe, non_finite_rows
from rapo_verl.run.launch import _child_environment
from rapo_verl.run.preflight import problems_of
from rapo_verl.run.processes import dump_stacks, repeating
from rapo_verl.run.stopping import Stopping
from rapo_verl.training.guards import dump_batch, non_finite_fields, non_finite_metrics
from rapo_verl.training.task_runner import log_apart_from_root

# --- stopping ---


def test_stop_file_stops_and_its_absence_does_not(tmp_path):
    stopping = Stopping(tmp_path / "stop", None)
    assert stopping.reason() is None
    (tmp_path / "stop").touch()
    assert "stop was made" in stopping.reason()


def test_deadline_leaves_room_for_a_step_a_save_and_the_margin():
    stopping = Stopping(None, time.time() + 200, margin=90)
    assert stopping.reason() is None
    stopping.note(step=70, save=20)  # 70 + 20 + 90 < 200
    stopping.note(step=10)
    assert stopping.reason() is None
    stopping.note(save=45)  # 70 + 45 + 90 > 200
    assert "might take 205 s" in stopping.reason()


def test_deadline_leaves_room_for_a_validation():
    stopping = Stopping(None, time.time() + 200, margin=90)
    stopping.note(step=70, save=20)
    assert stopping.reason() is None
    stopping.note(validation=30)
    assert "might take 210 s" in stopping.reason()


def test_warnings_of_ours_pass_a_root_logger_of_errors_alone(capfd, monkeypatch):
    # As it is in the process of the trainer once vLLM and veRL are imported.
    log, root = logging.getLogger("rapo_verl"), logging.getLogger()
    for logger in (log, root):
        for name in ("level", "handlers", "propagate"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
    root.setLevel(logging.ERROR)
    log.getChild("training.alarms").warning("lost")
    log_apart_from_root()
    log.getChild("training.alarms").warning("alarm %s, since step %d", "noise", 3)
    assert "verl_logger.propagate = False" in inspect.getsource(configure_verl_logging)  # veRL does so, too
    assert "lost" not in (said := capfd.readouterr().err) and "alarm noise, since step 3" in said


def test_wandb_run_goes_on_under_its_id(toy_dir, tmp_path):
    names = [f"toy_dir={toy_dir}", f"run_dir={tmp_path}"]
    config = compose_config(["experiment=toy_rapo_cpu", *names, "trainer.logger=[wandb]"])
    first, second = (_child_environment(config, tmp_path, 0) for _ in range(2))
    assert first["WANDB_RUN_ID"] == second["WANDB_RUN_ID"] != "" and first["WANDB_RESUME"] == "allow"
    assert first["RAPO_STOP_FILE"] == str(tmp_path / "stop")


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: the kernel may not let one process read another")
def test_stacks_are_python_s_where_the_environment_was_not_activated(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code = "import time\ndef hangs_here():\n    print(flush=True)\n    time.sleep(60)\nhangs_here()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        dump_stacks(tmp_path / "stacks", [psutil.Process(child.pid)])
        child.kill()
    (path,) = (tmp_path / "stacks").iterdir()
    assert path.name.startswith(f"{child.pid}.") and "hangs_here" in path.read_text().split("state: ")[1]


# --- numbers that are none ---


def test_non_finite_values_count_at_unmasked_tokens_only():
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0], [0.0, 1.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    assert non_finite_rows({"advantages": values, "rm_scores": torch.zeros(3, 2)}, mask) == {"advantages": [1]}


def test_non_finite_fields_of_a_batch_are_found_without_padding_it(monkeypatch):
    def jagged(*rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    fields = {
        "advantages": jagged([1.0, math.nan, 0.0], [math.inf, math.nan], [0.0]),
        "ref_log_prob": jagged([1.0, math.nan, -math.inf], [0.0, 0.0], [math.nan]),
        "rm_scores": jagged([0.0, math.nan, 0.0], [0.0, 1.0], [1.0]),
        "response_mask": jagged([1, 0, 1], [1, 1], [1]),
    }
    monkeypatch.setattr(torch.Tensor, "to_padded_tensor", None)
    assert non_finite_fields(fields) == {"advantages": 1, "ref_log_prob": 2}


def test_non_finite_metrics_are_the_actors():
    metrics = {"actor/grad_norm": float("nan"), "rapo/forward_kl": 1.0, "timing_s/x": float("inf"), "actor/a": "text"}
    assert non_finite_metrics(metrics) == ["actor/grad_norm = nan"]


def test_dumped_batch_says_rows_tokens_and_text(tmp_path):
    batch = {
        "responses": torch.tensor([[5, 6], [7, 8]]),
        "response_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": torch.tensor([[0.5, float("-inf")], [1.0, float("nan")]]),
    }
    text = "\n".join(describe(dump_batch(tmp_path, 3, batch, "why"), decode=lambda ids: f"<{ids}>"))
    assert "step 3: why" in text and "advantages: 1 of 3 not finite; from 0.5 to 1" in text
    assert "row 0: advantages" in text and "responses: <[5, 6]>" in text and "advantages at tokens [1]" in text
    assert "row 1" not in text


# --- processes ---


@pytest.mark.parametrize("ignored", [False, True])  # True: as a script's `rapo train &` starts
def test_process_ends_with_its_killed_parent(ignored):
    child = (
        "import time; from rapo_verl.run.processes import end_with_parent; end_with_parent(); print(1); time.sleep(600)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-uc', {child!r}]).wait()"
    how = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, how)
    )
    process.stdout.readline()
    (orphan,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    psutil.wait_procs([orphan], timeout=30)
    assert not orphan.is_running()


def pids_printed_by(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [int(pid) for pid in done.stdout.split()]


def test_daemon_that_left_its_parent_is_found_and_ended():
    code = (
        "import subprocess, sys, time\n"
        "from rapo_verl.run.processes import adopt_orphans, descendants, end_descendants\n"
        "adopt_orphans()\n"
        "subprocess.run(['bash', '-c', 'setsid sleep 777 </dev/null >/dev/null 2>&1 & setsid bash -c \"trap : TERM; "
        "while :; do sleep 1; done\" </dev/null >/dev/null 2>&1 &'])\n"
        "time.sleep(0.3)\n"
        "print(*(process.pid for process in descendants()), flush=True)\n"
        "end_descendants(0.5)\n"
        "assert not descendants()\n"
    )
    pids = pids_printed_by(code)
    assert len(pids) >= 2 and not any(psutil.pid_exists(pid) for pid in pids)


def test_what_a_command_left_behind_at_once_is_ended_and_another_s_child_is_not():
    # The daemon has lost its parent before anybody could look; the other process is beside the command.
    code = (
        "import subprocess, time\n"
        "from rapo_verl.run import processes\n"
        "processes.GRACE_SECONDS = 0.5\n"
        "other = subprocess.Popen(['sleep', '777'])\n"
        "daemon = 'setsid sleep 778 </dev/null >/dev/null 2>&1 & echo $!'\n"
        "with processes.no_process_left(['bash', '-c', daemon], stdout=subprocess.PIPE) as child:\n"
        "    print(child.stdout.read().decode(), flush=True)\n"
        "    child.wait()\n"
        "assert [process.pid for process in processes.descendants()] == [other.pid]\n"
        "other.kill()\n"
    )
    (pid,) = pids_printed_by(code)
    assert not psutil.pid_exists(pid)


# --- preflight ---


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["survival.stall_minutes=0"], "survival.stall_minutes is 0; allowed"),
        (["survival.max_minutes=-1"], "survival.max_minutes is -1; allowed"),
        (
            ["actor_rollout_ref.rollout.tensor_model_parallel_size=3"],
            "tensor_model_parallel_size 3 does not divide 1 GPUs",
        ),
        (["trainer.n_gpus_per_node=3"], "does not divide by 3 data-parallel ranks"),
    ],
)
def test_preflight_names_the_setting(toy_dir, tmp_path, overrides, said):
    config = compose_config(["experiment=toy_rapo_cpu", f"toy_dir={toy_dir}", f"run_dir={tmp_path}/run", *overrides])
    assert any(said in problem for problem in problems_of(config))


@pytest.mark.parametrize("experiment", experiments())
def test_remote_code_is_off_in_every_experiment(experiment):
    config = compose_config([f"experiment={experiment}", "actor_rollout_ref.model.path=some/model"])
    keys = [line.split()[-1] for line in OmegaConf.to_yaml(config).splitlines() if "trust_remote_code" in line]
    assert "false" in keys and "true" not in keys


def test_secret_in_the_config_is_refused(toy_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "planted-secret")
    names = [f"toy_dir={toy_dir}", f"run_dir={tmp_path}/run", "trainer.project_name=${oc.env:MY_API_KEY}"]
    problems = problems_of(compose_config(["experiment=toy_rapo_cpu", *names]))
    assert any("$MY_API_KEY" in problem for problem in problems) and "planted-secret" not in str(problems)


# --- lost actors ---


def test_a_look_is_repeated_until_it_says_enough_or_the_body_ends():
    def wait_for(count):
        deadline = time.monotonic() + 20
        while len(looks) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    looks = []
    with repeating(0.01, lambda: looks.append(0) or len(looks) == 3, "enough"):
        wait_for(3)
        time.sleep(0.1)
    assert len(looks) == 3
    with repeating(0.01, lambda: looks.append(0), "on and on"):
        wait_for(10)
    assert len(looks) >= 10
    there = len(looks)
    time.sleep(0.1)
    assert len(looks) == there and not [t for t in threading.enumerate() if t.name in ("enough", "on and on")]


@pytest.mark.slow
def test_killed_actor_of_a_run_is_named_and_a_new_one_is_no_alarm(monkeypatch):
    import ray

    from rapo_verl.training import liveness

    monkeypatch.setattr(liveness, "LIVENESS_SECONDS", 0.1)
    died = []

    class Worker:
        def pid(self):
            return os.getpid()

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actors = [ray.remote(num_cpus=0)(Worker).options(name=name).remote() for name in ("one", "two")]
        pids = ray.get([actor.pid.remote() for actor in actors])
        with liveness.actors_watched(end=died.append):
            time.sleep(1)
            later = ray.remote(num_cpus=0)(Worker).options(name="three").remote()
            ray.get(later.pid.remote())
            time.sleep(1)
            assert not died
            os.kill(pids[1], signal.SIGKILL)
            deadline = time.monotonic() + 60  # Ray notices in less than a second on an idle machine
            while not died and time.monotonic() < deadline:
                time.sleep(0.1)
        assert died == [{"two"}]
        with liveness.actors_watched(end=died.append):  # what is dead before is none of ours
            time.sleep(1)
        assert len(died) == 1
    finally:
        ray.shutdown()
