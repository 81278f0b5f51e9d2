"""End to end: real veRL, Ray, FSDP2 on gloo, vLLM, TransferQueue and weight sync, on the processor."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.run.alarms import NAMES
from rapo_verl.run.checkpoints import read_checkpoints
from rapo_verl.run.folder import read_metrics

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
    code, output = train(toy_dir, run_dir, "toy_rapo_cpu", 6, "trainer.save_freq=3")
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
    watched = ("rapo/groups/", "rapo/alarm/")  # of every run
    assert not any(key.startswith("rapo/") and not key.startswith(watched) for step in grpo for key in step)
    assert not torch.equal(*(last_weights(run)["lm_head.weight"] for run in (tmp_path / "grpo", rapo_run)))


def test_rapo_run_logs_forward_kl_and_phi_by_reward(rapo_run):
    steps = read_metrics(rapo_run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["rapo/forward_kl"] > 0 for step in steps)
    # Rewards are 0 and 1 here, so phi takes both its ends, and its mean is where the mean reward puts it.
    for step in steps:
        assert step["rapo/phi_min"] == pytest.approx(0.8) and step["rapo/phi_max"] == 1.0
        assert step["critic/rewards/min"] == 0.0 and step["critic/rewards/max"] == 1.0
        assert 0.8 < step["rapo/phi_mean"] < 1.0
        # Rewards are an answer's right and wrong, and each of a group counts once.
        assert step["rapo/groups/pass@1"] == pytest.approx(step["critic/rewards/mean"])
        assert 0 < step["rapo/groups/pass@1"] < step["rapo/groups/pass@2"] < step["rapo/groups/pass@4"] <= 1
        assert {step[f"rapo/alarm/{name}"] for name in NAMES} == {0.0}
    lines = [json.loads(line) for line in (rapo_run / "groups.jsonl").read_text().splitlines()]
    assert [(line["step"], len(set(line["problems"])), line["n"]) for line in lines] == [
        (step, 8, [4] * 8) for step in range(1, 7)
    ]
    assert [sum(line["right"]) / 32 for line in lines] == pytest.approx([s["rapo/groups/pass@1"] for s in steps])
    assert (rapo_run / "config.yaml").exists() and (rapo_run / "environment.json").exists()
    assert "actor/kl_loss" not in steps[0]


def test_run_folder_of_another_config_is_refused(toy_dir, rapo_run):
    code, output = train(toy_dir, rapo_run, "toy_rapo_cpu", 6, "trainer.save_freq=3", "rapo.forward_kl.coef=0.7")
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


def test_dry_run_says_the_plan_and_starts_nothing(toy_dir, tmp_path):
    arguments = command(toy_dir, tmp_path / "run", "toy_rapo_cpu", 7, "trainer.save_freq=2", "--dry-run")[3:]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "steps: 0 to 7, saved every 2" in done.output, done.output
    assert "8 prompts x 4 responses" in done.output and not (tmp_path / "run").exists()


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


@pytest.fixture
def tied_model(toy_dir, tmp_path):
    """The toy's base with its embedding for a head: it writes nonsense, but veRL's fused kernels run on it."""
    model = AutoModelForCausalLM.from_pretrained(toy_dir / "model", tie_word_embeddings=True)
    shutil.copytree(toy_dir / "model", tmp_path / "tied")
    (tmp_path / "tied" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.slow
def test_fused_kernels_train_and_make_no_logits_for_the_reference(toy_dir, tmp_path, tied_model):
    forward_kl = []
    for fused in ("false", "true"):
        run, model = tmp_path / fused, "actor_rollout_ref.model"
        fused_or_not = (f"{model}.path={tied_model}", f"{model}.use_fused_kernels={fused}")
        code, output = train(toy_dir, run, "toy_rapo_cpu", 2, *fused_or_not)
        assert code == 0, output[-4000:]
        forward_kl.append(read_metrics(run)[0]["rapo/forward_kl"])
    # Same base, prompts and seeds: the first step's samples are the same, and so is what the reference says of them.
    assert forward_kl[0] > 0 and forward_kl[0] == pytest.approx(forward_kl[1], rel=1e-3)


@pytest.mark.slow
def test_lora_reference_is_the_actor_without_adapters_reweighted(toy_dir, tmp_path):
    lora = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true"]
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 2, *lora)
    assert code == 0, output[-4000:]
    first, second = read_metrics(tmp_path / "run")
    # Adapters start at zero: the KL of the first update comes from phi alone, and would be 0 without it.
    assert first["rapo/forward_kl"] > 1e-3 and first["rapo/phi_min"] == pytest.approx(0.8)
    assert first["actor/grad_norm"] > 0 and second["rapo/forward_kl"] != first["rapo/forward_kl"]


@pytest.mark.slow
def test_colocated_asynchronous_trainer_trains_and_goes_on_from_its_checkpoint(toy_dir, tmp_path):
    mode = ["trainer.v1.trainer_mode=rapo_colocate_async", "trainer.save_freq=2",
            "trainer.v1.sampler.custom_sampler.name=StrictReplayBufferAsync"]  # fmt: skip
    for steps in (2, 3):
        code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", steps, *mode)
        assert code == 0, output[-4000:]
    steps = read_metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["rapo/forward_kl"] > 0 and step["actor/grad_norm"] > 0 for step in steps)
    assert (tmp_path / "run/checkpoints/global_step_2/transfer_queue").is_dir()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(toy_dir, tmp_path, rapo_run):
    args = (toy_dir, tmp_path / "run", "toy_rapo_cpu", 6, "trainer.save_freq=3")
    process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    manifest = tmp_path / "run" / "checkpoints" / "global_step_3" / "manifest.json"
    wait_for(manifest.exists, process)
    kill_tree(process)
    code, output = train(*args)
    assert code == 0, output[-4000:]
    # A step is saved before it is logged: the kill may have come between the two, and cost the third line.
    steps = comparable(tmp_path / "run")
    assert [step["step"] for step in steps if step["step"] != 3] == [1, 2, 4, 5, 6]
    assert all(step in comparable(rapo_run) for step in steps)
    whole, resumed = last_weights(rapo_run), last_weights(tmp_path / "run")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoints_of_a_run_are_complete_listed_verified_and_exported(rapo_run, tmp_path):
    found = read_checkpoints(rapo_run / "checkpoints")
    assert [(checkpoint.step, checkpoint.complete) for checkpoint in found] == [(3, True), (6, True)]
    manifest = found[-1].manifest
    assert manifest["world"] == "1 ranks, fsdp2" and manifest["rapo"]["forward_kl"]["coef"] == 0.3
    # What a resumed run needs: weights, optimizer, random numbers, and the place in the data.
    assert {"data.pt", *(f"actor/{name}_world_size_1_rank_0.pt" for name in ("model", "optim", "extra_state"))} <= set(
        manifest["files"]
    )
    listed = CliRunner().invoke(app, ["checkpoints", str(rapo_run), "--verify"])
    assert listed.exit_code == 0 and listed.output.count("every byte read") == 2
    exported = CliRunner().invoke(app, ["checkpoints", str(rapo_run), "--export", "6", "--to", str(tmp_path / "hf")])
    assert exported.exit_code == 0, exported.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").num_parameters() > 0


@pytest.mark.slow
def test_stop_file_saves_and_ends_with_75_and_the_run_goes_on(toy_dir, tmp_path):
    run_dir = tmp_path / "run"
    args = (toy_dir, run_dir, "toy_rapo_cpu", 400, "trainer.save_freq=-1")
    process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: read_metrics(run_dir), process)
    (run_dir / "stop").touch()
    assert process.wait(120) == 75
    assert "The same command goes on from there" in process.stdout.read()
    (saved,) = read_checkpoints(run_dir / "checkpoints")
    assert saved.complete and saved.step == len(read_metrics(run_dir)) < 400
    code, output = train(toy_dir, run_dir, "toy_rapo_cpu", saved.step + 1, "trainer.save_freq=-1")
    assert code == 0 and f"going on from step {saved.step}" in output, output[-4000:]
    assert [step["step"] for step in read_metrics(run_dir)] == list(range(1, saved.step + 2))


@pytest.mark.slow
def test_wall_clock_budget_saves_and_ends_with_75(toy_dir, tmp_path):
    # Less than the margin of 90 s: the first step is the last.
    code, output = train(toy_dir, tmp_path / "run", "toy_grpo_cpu", 400, "survival.max_minutes=1")
    assert code == 75, output[-4000:]
    assert [found.step for found in read_checkpoints(tmp_path / "run" / "checkpoints")] == [1]


@pytest.mark.slow
def test_alarm_saves_and_ends_with_100_and_the_run_does_not_go_on_by_itself(toy_dir, tmp_path):
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    args = (
        toy_dir, run_dir, "toy_grpo_cpu", 400, "trainer.save_freq=-1", "survival.stop_on_collapse=true",
        "reward.custom_reward_function.name=early_letter_before_marker",
        f"+reward.custom_reward_function.reward_kwargs.marker={marker}",
    )  # fmt: skip
    process = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: len(read_metrics(run_dir)) >= 3, process)
    marker.touch()
    assert process.wait(200) == 100
    assert "ended because of an alarm" in process.stdout.read()
    steps = read_metrics(run_dir)
    (saved,) = read_checkpoints(run_dir / "checkpoints")
    assert saved.complete and saved.step == len(steps)
    # It holds after the step before the last, which is one more, so that veRL can save before it wakes vLLM.
    assert [step["rapo/alarm/unlearned"] for step in steps[-3:]] == [0, 1, 1]
    assert (run_dir / "train.log").read_text().count("alarm unlearned, since step") == 1
    assert (run_dir / "collapsed.txt").read_text().startswith(f"step {saved.step}: unlearned:")
    code, output = train(*args)
    assert code == 2 and "survival.stop_on_collapse=false goes on" in output, output[-3000:]


@pytest.mark.slow
def test_full_disk_ends_the_run_clearly_and_keeps_the_last_checkpoint(toy_dir, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("not root: the small disk is a mount")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True, mode=0o700)
    # A disk for one checkpoint and a half, in a mount namespace of its own; what is on it is copied out in the end.
    small = 'mount -t tmpfs -o size=3600k,mode=700 tmpfs "$0" && { "$@"; code=$?; cp -a "$0" "$0.kept"; exit $code; }'
    run = command(toy_dir, tmp_path / "run", "toy_rapo_cpu", 4, "trainer.save_freq=1")
    done = subprocess.run(["unshare", "--mount", "bash", "-c", small, folder, *run], capture_output=True, text=True)
    assert done.returncode == 1 and "No space left for a checkpoint" in done.stderr, done.stderr[-3000:]
    assert [(found.step, found.complete) for found in read_checkpoints(tmp_path / "run" / "checkpoints.kept")] == [
        (1, True)
    ]


@pytest.mark.slow
def test_run_without_a_step_ends_with_99_and_stacks(toy_dir, tmp_path):
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 4, "survival.stall_minutes=0.4")
    assert code == 99 and "No step for 0.4 minutes" in output
    assert any("MainThread" in path.read_text() for path in (tmp_path / "run" / "stacks").iterdir())


@pytest.mark.slow
def test_nan_reward_stops_before_the_update_and_keeps_the_batch(toy_dir, tmp_path):
    name = "reward.custom_reward_function.name=not_a_number"
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 2, name, "trainer.save_freq=1")
    assert code == 1 and "before the update, NaN or infinity in rm_scores" in output
    assert not read_checkpoints(tmp_path / "run" / "checkpoints") and not read_metrics(tmp_path / "run")
    shown = CliRunner().invoke(app, ["inspect-batch", str(tmp_path / "run" / "bad_batches" / "step_1.pt")])
    assert shown.exit_code == 0 and "rm_scores: 32 of" in shown.output and "responses: " in shown.output


@pytest.mark.slow
def test_raising_reward_stops_the_run_with_its_sample(toy_dir, tmp_path):
    code, output = train(toy_dir, tmp_path / "run", "toy_rapo_cpu", 2, "reward.custom_reward_function.name=raises")
    assert code not in (0, 2)
    assert "no such rubric for" in output and "response: " in output and "ground_truth" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["interrupt", "WorkerDict", "SeededAgentLoopWorker", "RewardLoopWorker", "vLLMHttpServer"]
)
def test_interrupted_run_leaves_no_process_and_a_second_start_works(toy_dir, tmp_path, how):
    args = (toy_dir, tmp_path / "run", "toy_rapo_cpu", 400, "trainer.save_freq=1")
    # A shell's background job, as these tests may be, ignores SIGINT, and so would its children.
    heeds_interrupt = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heeds_interrupt
    )
    wait_for(lambda: read_metrics(tmp_path / "run"), process)
    children = psutil.Process(process.pid).children(recursive=True)
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        next(child for child in children if how in " ".join(child.cmdline())).kill()
    try:
        assert process.wait(120) != 0
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
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
        if time.monotonic() > deadline:
            kill_tree(process)
            pytest.fail("nothing happened in time")
        time.sleep(0.2)


def kill_tree(process):
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_demo_ends_in_a_report_and_goes_on_where_it_stopped(toy_dir, tmp_path):
    base = tmp_path / "runs" / "toy" / "base0"
    base.parent.mkdir(parents=True)
    shutil.copytree(toy_dir, base)
    # The entropy moves every model: the toy's random base is never right, so that nothing else would.
    short = ["--n", "16", "--problems", "12", "--answers", "4", "trainer.total_training_steps=2",
        "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.entropy_coeff=0.01"]  # fmt: skip
    arguments = [sys.executable, "-m", "rapo_verl.cli", "demo", "--out", "out", *short]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    for _ in range(2):
        start = time.monotonic()
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
    assert "already trained" in done.stderr and time.monotonic() - start < 120
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [model["name"] for model in summary["models"]] == [
        "base", "GRPO", "RAPO", "RAPO with reference answers"
    ]  # fmt: skip
    assert "rapo/reference_answers/rows" in read_metrics(tmp_path / "out" / "rapo_answers")[-1]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(base) in " ".join(p.info["cmdline"] or [])]
