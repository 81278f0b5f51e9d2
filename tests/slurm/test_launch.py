"""The launcher on a real Slurm, with a stub trainer and a stub Ray: every way in which a job can end."""

import re
import subprocess
import sys
import time

import pytest
from harness import CLONE, HERE, SECRET

pytestmark = pytest.mark.slurm

TWO = ("--nodes=2",)
ALL_STEPS = [1, 2, 3, 4, 5, 6]


@pytest.fixture(autouse=True)
def no_process_left(cluster):
    yield
    end = time.monotonic() + 20
    while (left := cluster.processes()) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left


def test_clean_run_completes_and_leaves_nothing(cluster):
    job = cluster.submit("clean", "data.train_batch_size=512", options=TWO)
    output = job.ended("COMPLETED", 0)
    assert job.steps() == ALL_STEPS and "16 GPUs on 2 node(s) have joined" in output
    assert output.index("plan: train trainer.nnodes=2 ") < output.index("Ray runs at")
    assert " experiment=qwen2.5_7b_rapo data.train_batch_size=512 run_dir=" in output
    latest = job.run_dir / "slurm" / "latest"
    assert latest.resolve().name == f"{job.id}.0" and not (latest / "token").exists()
    assert list(latest.glob("driver.0.*.log")) and list(latest.glob("ray.1.*.log"))
    for node in (1, 2):
        assert "rapo-" not in cluster.on(node, "ls", "/tmp/rapo-mini").replace("rapo-ports", "")
    assert oct((latest / "verdict").stat().st_mode & 0o777) == "0o600"


def test_failing_trainer_gives_its_own_code_and_first_error(cluster):
    output = cluster.submit("exit7", options=TWO, FAULT="exit7").ended("FAILED", 7)
    last = output.strip().splitlines()[-1]
    assert "ValueError: the stub was told to fail" in last and "driver.0.n1.log; its first error" in output


@pytest.mark.parametrize(("host", "code"), [("n1", 90), ("n2", 93)])
def test_ray_that_does_not_start_is_named(cluster, host, code):
    output = cluster.submit(f"noray-{host}", options=TWO, RAY_FAILS_ON=host).ended("FAILED", code)
    assert f"Ray does not start on {host}" in output and "no route to the GCS" in output.splitlines()[-1]


@pytest.mark.parametrize("host", ["n1", "n2"])
def test_dead_raylet_ends_the_job(cluster, host):
    job = cluster.submit(f"raylet-{host}", options=TWO, RAYLET_DIES_ON=host, STEP_SECONDS=2, STEPS=50)
    assert f"raylet died on {host}" in job.ended("FAILED", 94)


def test_all_reduce_over_the_nodes_runs_before_ray(cluster):
    job = cluster.submit("smoke", options=TWO, STEPS=1, RAPO_SMOKE="gloo", RAPO_GPUS_PER_NODE=1)
    job.ended("COMPLETED", 0, timeout=400)
    (log,) = (job.run_dir / "slurm" / "latest").glob("smoke.0.*.log")
    assert "all-reduce of 64 MiB over 2 ranks" in log.read_text()


def test_killed_trainer_gives_137(cluster):
    job = cluster.submit("killed", options=TWO, STEP_SECONDS=1, STEPS=50).until("step 2")
    cluster.on(1, "bash", "-c", "kill -9 $(pgrep -f [s]tub_trainer.py)")
    assert "train ended with 137" in job.ended("FAILED", 137)


def test_killed_agent_of_a_worker_ends_the_job(cluster):
    job = cluster.submit("agent", options=TWO, STEP_SECONDS=1, STEPS=60).until("step 2")
    cluster.on(2, "bash", "-c", "kill -9 $(pgrep -nf [r]apo_verl.cluster.node)")
    assert "the agent of n2 was killed by signal 9" in job.ended("FAILED", 95)


def test_stop_signal_saves_requeues_and_resumes_to_every_step_once(cluster):
    job = cluster.submit("usr1", options=TWO, STEP_SECONDS=1, SAVE_FREQ=100, STEPS=20).until("attempt 0 step 3")
    assert not any(SECRET in cluster.on(node, "ps", "-eo", "args") for node in (1, 2))
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.id))
    output = job.ended("COMPLETED", 0)
    assert job.steps() == list(range(1, 21)) and job.facts["Restarts"] == "1"
    # Nothing was saved by schedule: what the second attempt goes on from is what the signal made the first save.
    assert "attempt 1 step 1\n" not in output and "attempt 1 step 20\n" in output
    assert {path.name for path in (job.run_dir / "slurm").glob(f"{job.id}.*")} == {f"{job.id}.0", f"{job.id}.1"}


def test_time_limit_saves_in_time(cluster):
    # Slurm signals up to a minute early, so that with a limit of two minutes the signal comes in the first.
    options = (*TWO, "--time=2", "--signal=B:USR1@60")
    job = cluster.submit("limit", options=options, STEP_SECONDS=2, SAVE_FREQ=1000, STEPS=1000, RAPO_MAX_REQUEUES=1)
    output = job.ended("FAILED", 75, timeout=420)
    assert job.facts["Restarts"] == "1" and "not requeued again: RAPO_MAX_REQUEUES=1" in output
    assert job.steps() == list(range(1, len(job.steps()) + 1)) and "time is nearly up" in output


def test_wall_clock_budget_saves_without_a_signal(cluster):
    # Slurm may send its signal up to 60 s early: one that does nothing, in place of the script's own.
    options = (*TWO, "--time=1", "--signal=B:CONT@1", "--no-requeue")
    job = cluster.submit("budget", options=options, STEP_SECONDS=1, SAVE_FREQ=1000, STEPS=1000, MARGIN=25)
    output = job.ended("FAILED", 75)
    assert "might take" in output and "Slurm would not requeue: submit the same line again" in output


def test_preempted_twice_loses_no_step(cluster):
    job = cluster.submit("preempted", options=("--nodes=3",), STEP_SECONDS=1, SAVE_FREQ=1000, STEPS=24)
    for attempt, step in ((0, 3), (1, 9)):
        job.until(lambda job, a=attempt, s=step: any(f"attempt {a} step {n}\n" in job.output for n in range(s, 24)))
        options = ("--nodes=3", "--partition=urgent", "--cpus-per-task=64")
        cluster.submit(f"urgent{attempt}", options=options, STEPS=1).ended("COMPLETED", 0)
    job.ended("COMPLETED", 0)
    assert job.steps() == list(range(1, 25)) and job.facts["Restarts"] == "2"


@pytest.mark.parametrize("node", [1, 2])
def test_lost_node_requeues_and_resumes(cluster, node):
    job = cluster.submit(f"lost{node}", options=TWO, STEP_SECONDS=1, STEPS=25).until("attempt 0 step 4")
    cluster("lose", node)
    try:
        output = job.ended("COMPLETED", 0)
    finally:
        cluster("restore", node)
        cluster.run("bash", "-c", "until [[ $(sinfo -h -p gpu -t idle -o %D) == 3 ]]; do sleep 0.5; done")
    assert job.steps() == list(range(1, 26)) and int(job.facts["Restarts"]) == 1
    assert "attempt 1 step 1\n" not in output


def test_node_that_never_starts_is_named(cluster):
    output = cluster.submit("missing", options=TWO, HANGS_ON="n2", RAPO_JOIN_SECONDS=8).ended("FAILED", 91)
    assert "no sign of n2" in output and "step 1" not in output


def test_filesystem_that_is_not_shared_is_named(cluster):
    cluster.on(2, "mount", "-t", "tmpfs", "tmpfs", cluster.runs)
    try:
        output = cluster.submit("unshared", options=TWO, RAPO_JOIN_SECONDS=8).ended("FAILED", 91)
    finally:
        cluster.on(2, "umount", cluster.runs)
    assert "no sign of n2" in output and "n2 does not see" in output


def test_taken_ports_are_passed_over(cluster):
    from rapo_verl.cluster.ray_node import BLOCK, FIRST_PORT, SLOTS

    probe = cluster.submit("before", options=TWO, STEPS=1)
    probe.ended("COMPLETED", 0)
    taken = FIRST_PORT + BLOCK * ((probe.id + 1) % SLOTS)
    listen = f"import socket, time; s = socket.create_server(('', {taken + 3})); time.sleep(40)"
    listener = subprocess.Popen(
        ["bash", str(CLONE / "tests/slurm/mini_cluster.sh"), str(cluster.root), "on", "1", sys.executable, "-c", listen]
    )
    try:
        output = cluster.submit("taken", options=TWO, STEPS=1).ended("COMPLETED", 0)
    finally:
        cluster.on(1, "pkill", "-f", f"{taken + 3}")  # in the node's own PID namespace
        listener.wait()
    assert f"n1: Ray runs at 10.77.0.11, ports from {taken + BLOCK}" in output
    assert f"n2: Ray runs at 10.77.0.12, ports from {taken}" in output


def test_two_jobs_on_one_node_do_not_touch_each_other(cluster):
    options = ("--nodes=1", "--gpus-per-node=2", "--nodelist=n1")
    long = cluster.submit("long", options=options, STEP_SECONDS=1, STEPS=40).until("step 2")
    short = cluster.submit("short", options=options, STEPS=2)
    short.ended("COMPLETED", 0)
    assert long.state == "RUNNING"
    third = cluster.submit("cancelled", options=options, STEP_SECONDS=1, STEPS=99).until("step 2")
    cluster.run("scancel", str(third.id))
    third.until("CANCELLED")
    long.ended("COMPLETED", 0)
    assert long.steps() == list(range(1, 41))


def test_disk_full_while_saving_keeps_the_old_checkpoint(cluster):
    checkpoints = cluster.runs / "full" / "checkpoints"
    checkpoints.mkdir(parents=True)
    cluster.on(1, "mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", checkpoints)
    options = ("--nodes=1", "--nodelist=n1")
    output = cluster.submit("full", options=options, SAVE_BYTES=3_000_000).ended("FAILED", 1)
    assert "No space left on device" in output.splitlines()[-1]
    cluster.on(1, "mount", "-o", "remount,size=64m", checkpoints)
    output = cluster.submit("full", options=options, SAVE_BYTES=3_000_000).ended("COMPLETED", 0)
    assert "goes on from step 2" in output and "set aside as global_step_3.incomplete" in output
    assert cluster.on(1, "cat", checkpoints / "global_step_6" / "state.json").strip() == str(ALL_STEPS)
    cluster.on(1, "umount", checkpoints)


def test_scancel_ends_everything(cluster):
    job = cluster.submit("cancel", options=TWO, STEP_SECONDS=1, STEPS=99).until("step 2")
    cluster.run("scancel", str(job.id))
    job.until("CANCELLED")
    assert "requeued" not in job.output


def test_process_that_left_its_parent_is_ended(cluster):
    cluster.submit("orphan", options=TWO, FAULT="orphan").ended("COMPLETED", 0)


def test_collapsed_run_is_not_requeued(cluster):
    job = cluster.submit("collapse", options=TWO, FAULT="collapse")
    output = job.ended("FAILED", 100)
    assert "an alarm held" in output and "requeueing" not in output and "first error" not in output


def test_stalled_run_leaves_stacks_of_every_node(cluster):
    job = cluster.submit("stall", options=TWO, FAULT="stall")
    assert "no step for too long" in job.ended("FAILED", 99)
    for node, what in ((0, "stub_trainer"), (1, "raylet")):
        texts = [path.read_text() for path in (job.run_dir / "slurm" / "latest" / f"stacks.{node}").iterdir()]
        assert any(what in text for text in texts)


def test_run_folder_of_a_running_job_is_refused(cluster):
    options = ("--nodes=1", "--gpus-per-node=1")
    first = cluster.submit("first", options=options, STEP_SECONDS=1, STEPS=15).until("step 1")
    second = cluster.submit("second", f"run_dir={first.run_dir}", options=options)
    assert f"job {first.id} is writing {first.run_dir}" in second.ended("FAILED", 2)
    first.ended("COMPLETED", 0)


def test_missing_facts_are_all_named_at_once(cluster):
    bad = cluster.work / "bad"
    bad.mkdir()
    (bad / "env").write_text("RAPO_RUNTIME=docker\nRAPO_RUNS=\n")
    output = cluster.submit("facts", options=TWO, RAPO_ENV_FILE=bad / "env").ended("FAILED", 2)
    assert "RAPO_RUNS is not set" in output and "allowed: venv, apptainer, pyxis" in output


def test_refused_config_ends_before_ray_starts(cluster):
    job = cluster.submit("refused", options=TWO, FAULT="refuse")
    output = job.ended("FAILED", 2)
    assert "Ray runs at" not in output and "problem(s); nothing was started" in output.splitlines()[-1]


def test_readable_secrets_are_refused(cluster):
    bad = cluster.work / "open"
    bad.mkdir()
    (bad / "env").write_text((cluster.work / "env").read_text())
    (bad / "secrets").write_text("MY_SECRET=1\n")
    (bad / "secrets").chmod(0o644)
    assert "chmod 600" in cluster.submit("open", RAPO_ENV_FILE=bad / "env").ended("FAILED", 2)


def test_dry_run_checks_every_node_and_trains_nothing(cluster):
    job = cluster.submit("dry", options=TWO, DRY_RUN=1)
    assert re.search(r"plan: train trainer.* experiment=qwen2.5_7b_rapo", job.ended("COMPLETED", 0))
    assert not (job.run_dir / "checkpoints").exists()
    assert {path.name for path in (job.run_dir / "slurm" / "latest").glob("check.*")} == {"check.0", "check.1"}


def test_tasks_of_an_array_evaluate_a_part_each(cluster):
    out = cluster.work / "evals"
    arguments = ("some/model", out, "--data", "a.parquet")
    job = cluster.submit("eval", *arguments, script="eval_passk.sh", options=("--array=2-3",), command="echo")
    for task in (2, 3):
        want = f"eval generate --model some/model --out {out} --ray auto --part {task - 2}/2 --data a.parquet"
        assert want in job.task(task).ended("COMPLETED", 0)


def test_evaluation_without_its_data_says_how_to_make_it(cluster):
    output = cluster.submit("nodata", "some/model", script="eval_passk.sh").ended("FAILED", 2)
    assert "rapo data prepare aime24 aime25 --model some/model --out" in output and "Ray runs at" not in output


def test_container_wraps_the_agent_and_not_slurm(cluster):
    folder = cluster.work / "apptainer"
    folder.mkdir()
    (folder / "env").write_text(
        f"RAPO_RUNS={cluster.runs}\nRAPO_RUNTIME=apptainer\nRAPO_IMAGE=/images/verl.sif\nRAPO_MOUNTS=/models\n"
        f"PATH={HERE / 'bin'}:$PATH\n"
    )
    (folder / "env").chmod(0o600)
    output = cluster.submit("contained", options=TWO, STEPS=2, RAPO_ENV_FILE=folder / "env").ended("COMPLETED", 0)
    for host in ("n1", "n2"):
        assert f"{host}: apptainer exec --nv --bind {CLONE},{cluster.runs},/models /images/verl.sif bash -c" in output


def test_every_script_is_accepted_by_slurm(cluster):
    scripts = sorted((CLONE / "slurm").glob("*_*.sh"))
    assert len(scripts) == 11
    for script in scripts:
        cluster.run("sbatch", "--test-only", str(script))


def test_no_secret_in_any_log(cluster):
    # Last of all: every job above had the token in its environment and in its secrets file.
    done = subprocess.run(["grep", "-rl", SECRET, str(cluster.work)], capture_output=True, text=True)
    assert set(done.stdout.split()) == {str(cluster.work / "secrets")}
    assert len(list(cluster.work.glob("*.out"))) > 15
