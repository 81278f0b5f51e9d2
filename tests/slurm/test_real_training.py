"""The real thing: veRL, Ray, FSDP2 on gloo and vLLM, one worker on each of two nodes; and an evaluation as an array."""

import re
import sys
from pathlib import Path

import psutil
import pytest
from harness import CLONE

from rapo_verl.run.checkpoints import read_checkpoints
from rapo_verl.run.folder import read_metrics

pytestmark = pytest.mark.slurm

SCRIPT = """#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
exec {clone}/slurm/launch.sh train experiment=toy_rapo_cpu toy_dir={toy} data.train_batch_size=8 "$@"
"""
STEPS = 6
# Looked up from inside a node: what its dashboard answers without a token, and whether the neighbour reaches it.
UNASKED = """
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print("unreachable", error)
"""


@pytest.fixture(scope="module")
def env(cluster):
    (cluster.work / "real").mkdir()
    env = cluster.work / "real" / "env"
    venv = Path(sys.executable).parent.parent
    env.write_text(
        f"RAPO_RUNS={cluster.runs}\nRAPO_RUNTIME=venv\nRAPO_VENV={venv}\nRAPO_GPUS_PER_NODE=1\nRAPO_RAY_CPUS=16\n"
        "RAPO_OBJECT_STORE_BYTES=200000000\nHF_HUB_OFFLINE=1\nOMP_NUM_THREADS=1\n"
    )
    env.chmod(0o600)
    return env


def need_memory(gib):
    """Ray ends a worker of ours, or of somebody else, where memory runs out."""
    available = psutil.virtual_memory().available / (1 << 30)
    if available < gib:
        pytest.skip(f"{available:.0f} GiB of memory are available, {gib} are wanted")


def test_toy_on_two_nodes_saves_on_a_signal_and_goes_on(cluster, toy_dir, env):
    need_memory(12)
    script = cluster.work / "toy.sh"
    script.write_text(SCRIPT.format(clone=CLONE, toy=toy_dir))
    settings = [
        f"trainer.total_training_steps={STEPS}", "trainer.save_freq=100", "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "survival.stall_minutes=15",
        f"reward.custom_reward_function.path={CLONE / 'tests' / 'rewards.py'}",
        "reward.custom_reward_function.name=early_letter",
    ]  # fmt: skip
    waits = {"RAPO_JOIN_SECONDS": 300, "RAPO_LOST_SECONDS": 120}
    job = cluster.submit("toy", *settings, script=script, command="", RAPO_ENV_FILE=env, **waits)
    job.until(lambda job: read_metrics(job.run_dir), timeout=900)
    port = int(re.search(r"n1: Ray runs at 10.77.0.11, ports from (\d+)", job.output)[1]) + 7
    mine = cluster.on(1, sys.executable, "-c", UNASKED, f"http://127.0.0.1:{port}/api/version")
    theirs = cluster.on(2, sys.executable, "-c", UNASKED, f"http://10.77.0.11:{port}/api/version")
    assert mine.strip() == "401" and "unreachable" in theirs, (mine, theirs)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.id))
    output = job.ended("COMPLETED", 0, timeout=1200)
    assert job.facts["Restarts"] == "1" and "going on from step" in output
    assert [step["step"] for step in read_metrics(job.run_dir)] == list(range(1, STEPS + 1))
    first, last = read_checkpoints(job.run_dir / "checkpoints")
    assert first.complete and last.complete and last.step == STEPS > first.step > 0
    # A shard from each node, and the one model on both.
    assert {f"actor/model_world_size_2_rank_{rank}.pt" for rank in (0, 1)} <= set(last.manifest["files"])
    assert cluster.processes() == []


def test_array_of_evaluations_samples_its_parts_and_is_judged(cluster, toy_dir, env):
    need_memory(6)
    out = cluster.work / "evals" / "toy"
    options = ("--data", toy_dir / "eval.parquet", "--limit=4", "--n=4", "--shard=2", "--max-tokens=8", "--engines=1")
    # One task after the other: two at once would want twice the memory, and prove nothing more.
    array = {"script": "eval_passk.sh", "options": ("--array=0-1%1", "--gpus-per-node=1")}
    job = cluster.submit("real_eval", toy_dir / "model", out, *options, **array, command="", RAPO_ENV_FILE=env)
    for task in (0, 1):
        assert f"part {task}/2 is complete" in job.task(task).ended("COMPLETED", 0, timeout=600)
    assert len(list(out.glob("shards/*/*.parquet"))) == 4 * 2
    report = cluster.submit("real_report", cluster.work / "report", out, script="eval_report.sh", command="",
                            RAPO_ENV_FILE=env)  # fmt: skip
    report.ended("COMPLETED", 0, timeout=600)
    assert (cluster.work / "report" / "report.html").exists() and cluster.processes() == []
