"""End to end: real veRL, Ray, FSDP2 on gloo, vLLM, TransferQueue and weight sync, on the processor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from rapo_verl.launch import read_metrics

HERE = Path(__file__).parent
# Small, and reproducible to the bit: one request at a time, so that no batch's composition changes a rounding.
SMALL = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    f"reward.custom_reward_function.path={HERE / 'rewards.py'}",
    "reward.custom_reward_function.name=early_letter",
]
OFF = ["rapo.forward_kl.coef=0", "rapo.reference.phi_min=1"]
VERL_KL = ["actor_rollout_ref.actor.kl_loss_coef=0.05", "actor_rollout_ref.actor.kl_loss_type=low_var_kl"]
# Clocks and memory differ between any two runs.
UNREPRODUCIBLE = ("timing", "perf/", "actor/perf", "critic/perf")


def command(toy_dir, run_dir, experiment, steps, *overrides):
    return [
        sys.executable, "-m", "rapo_verl.cli", "train", f"experiment={experiment}", f"toy_dir={toy_dir}",
        f"run_dir={run_dir}", f"trainer.total_training_steps={steps}", *SMALL, *overrides,
    ]  # fmt: skip


def train(*args, timeout=400):
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def last_weights(run_dir):
    folders = sorted((Path(run_dir) / "checkpoints").glob("global_step_*"), key=lambda p: int(p.name.split("_")[-1]))
    state = torch.load(folders[-1] / "actor" / "model_world_size_1_rank_0.pt", weights_only=False)
    return {name: getattr(t, "_local_tensor", t) for name, t in state.items()}


def comparable(run_dir):
    return [
        {key: value for key, value in step.items() if not key.startswith(UNREPRODUCIBLE)}
        for step in read_metrics(Path(run_dir))
    ]


def assert_same_run(first, second):
    assert comparable(first) == comparable(second)
    a, b = last_weights(first), last_weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def rapo_run(toy_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("rapo") / "run"
    code, output = train(toy_dir, run_dir, "toy_rapo_cpu", 4, "trainer.save_freq=2")
    assert code == 0, output[-4000:]
    return run_dir


def test_switched_off_equals_builtin_grpo_bit_for_bit(toy_dir, tmp_path, rapo_run):
    for name, experiment, switch in (("grpo", "toy_grpo_cpu", []), ("off", "toy_rapo_cpu", OFF)):
        code, output = train(toy_dir, tmp_path / name, experiment, 3, *VERL_KL, *switch)
        assert code == 0, output[-4000:]
    assert_same_run(tmp_path / "grpo", tmp_path / "off")
    grpo = comparable(tmp_path / "grpo")
    assert len(grpo) == 3
    # The comparison would be empty if nothing had been learnt, or if RAPO switched on gave the same.
    assert all(step["actor/grad_norm"] > 0 for step in grpo)
    assert not any(key.startswith("rapo/") for step in grpo for key in step)
    assert not torch.equal(*(last_weights(run)["lm_head.weight"] for run in (tmp_path / "grpo", rapo_run)))


def test_rapo_run_logs_forward_kl_and_phi_by_reward(rapo_run):
    steps = read_metrics(rapo_run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["rapo/forward_kl"] > 0 for step in steps)
    # Rewards are 0 and 1 here, so phi takes both its ends, and its mean is where the mean reward puts it.
    for step in steps:
        assert step["rapo/phi_min"] == pytest.approx(0.8) and step["rapo/phi_max"] == 1.0
        assert step["critic/rewards/min"] == 0.0 and step["critic/rewards/max"] == 1.0
        assert 0.8 < step["rapo/phi_mean"] < 1.0
    assert (rapo_run / "config.yaml").exists() and (rapo_run / "environment.json").exists()
    assert "actor/kl_loss" not in steps[0]


def test_run_folder_of_another_config_is_refused(toy_dir, rapo_run):
    code, output = train(toy_dir, rapo_run, "toy_rapo_cpu", 4, "trainer.save_freq=2", "rapo.forward_kl.coef=0.7")
    assert code == 2
    assert "rapo.forward_kl.coef: 0.3 there, 0.7 here" in output and "run_dir=" in output


def test_all_problems_are_reported_together_before_ray_starts(toy_dir, tmp_path):
    start = time.monotonic()
    code, output = train(
        toy_dir, tmp_path / "run", "toy_rapo_cpu", 1, "rapo.forward_kl.coef=-1", "rapo.reference.phi_min=0",
        "actor_rollout_ref.actor.entropy_coeff=-0.1", "actor_rollout_ref.model.path=/no/such/model",
        f"data.train_files={HERE / 'conftest.py'}", "actor_rollout_ref.model.use_fused_kernels=true",
    )  # fmt: skip
    assert code == 2
    for said in ("rapo.forward_kl.coef", "phi_min", "entropy_coeff", "/no/such/model", "not a parquet file"):
        assert said in output
    assert "nothing was started" in output and not (tmp_path / "run").exists()
    assert time.monotonic() - start < 60


def test_unknown_key_and_experiment_are_refused(toy_dir, tmp_path):
    for override in ("rapo.forward_kl.coeff=1", "experiment=toy_rapp_cpu", "actor_rollout_ref.actor.nope=1"):
        code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 1, override)
        assert code == 2 and "nothing was started" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("form", ["forward_kl.estimator=topk", "forward_kl.estimator=full",
    "forward_kl.estimator=unbiased", "forward_kl.estimator=paper", "reference.reading=nucleus"])  # fmt: skip
def test_every_form_of_the_forward_kl_trains(toy_dir, tmp_path, form):
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 2, f"rapo.{form}")
    assert code == 0, output[-4000:]
    steps = read_metrics(tmp_path / "run")
    assert len(steps) == 2 and all(step["rapo/forward_kl"] == step["rapo/forward_kl"] for step in steps)
    # The first update starts at the reference, which phi < 1 has already moved away.
    assert steps[0]["rapo/forward_kl"] > 0 or "nucleus" in form


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(toy_dir, tmp_path, rapo_run):
    args = (toy_dir, tmp_path / "run", "toy_rapo_cpu", 4, "trainer.save_freq=2")
    process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    wait_for(lambda: tracker.exists() and tracker.read_text() == "2", process)
    kill_tree(process)
    code, output = train(*args)
    assert code == 0, output[-4000:]
    assert_same_run(rapo_run, tmp_path / "run")


@pytest.mark.slow
def test_raising_reward_stops_the_run_with_its_sample(toy_dir, tmp_path):
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 2, "reward.custom_reward_function.name=raises")
    assert code not in (0, 2)
    assert "no such rubric for" in output and "response: " in output and "ground_truth" in output


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "WorkerDict", "SeededAgentLoopWorker", "RewardLoopWorker"])
def test_interrupted_run_leaves_no_process_and_a_second_start_works(toy_dir, tmp_path, how):
    args = (toy_dir, tmp_path / "run", "toy_rapo_cpu", 400, "trainer.save_freq=1")
    process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: read_metrics(tmp_path / "run"), process)
    children = psutil.Process(process.pid).children(recursive=True)
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        next(child for child in children if how in " ".join(child.cmdline())).kill()
    assert process.wait(120) != 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(running(child) for child in children):
        time.sleep(0.2)
    assert not [child for child in children if running(child)]
    done = len(read_metrics(tmp_path / "run"))
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", done + 1, "trainer.save_freq=1")
    assert code == 0, output[-4000:]


def running(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, process, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.2)


def kill_tree(process):
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
