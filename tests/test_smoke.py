"""`rapo smoke`, and the step benchmark: what of them can be seen without a GPU."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from rapo_verl import Failed
from rapo_verl.cli import app
from rapo_verl.cli.base import commands
from rapo_verl.plan.card import GPUS
from rapo_verl.plan.model import PUBLISHED
from rapo_verl.plan.report import plan
from rapo_verl.run.compose import compose_config
from rapo_verl.run.preflight import problems_of
from rapo_verl.toy import smoke
from rapo_verl.toy.base_model import random_checkpoint
from rapo_verl.toy.make import MODEL_DIR, write_problems
from rapo_verl.toy.world import World

CLONE = Path(__file__).parent.parent


@pytest.fixture
def tiny(monkeypatch) -> str:
    """A published shape that a test can write."""
    monkeypatch.setitem(PUBLISHED, "Qwen/Tiny", (64, 4, 2, 2, 96, 512, True))
    return "Qwen/Tiny"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("megatron_step", CLONE / "benchmarks" / "megatron_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("layers", "left"), [(None, 4), (2, 2)])
def test_random_checkpoint_has_the_shape_and_the_layers_asked_for(tiny, tmp_path, layers, left):
    random_checkpoint(tiny, tmp_path / "model", layers=layers)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (config.vocab_size, config.num_hidden_layers, len(model.model.layers)) == (512, left, left)
    assert str(config.dtype) == "torch.bfloat16" and config.eos_token_id == 2


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_smoke_passes_every_check_of_a_run(tiny, tmp_path, device):
    write_problems(World(0), tmp_path, train=(384, 0), evaluation=(24, 99))
    random_checkpoint(tiny, tmp_path / MODEL_DIR)
    experiment = {"cuda": "qwen2.5_0.5b_1gpu", "cpu": "toy_rapo_cpu"}[device]
    config = compose_config(
        [f"experiment={experiment}", f"run_dir={tmp_path}", *smoke.smoke_overrides(tmp_path, device)]
    )
    assert problems_of(config) == [] and not config.trainer.val_before_train
    assert config.trainer.device == device and config.actor_rollout_ref.model.override_config.attn_implementation
    assert not config.actor_rollout_ref.model.use_remove_padding  # this machine has no flash-attn
    assert not config.ray_kwargs.ray_init.include_dashboard and config.actor_rollout_ref.rollout.enforce_eager
    config.actor_rollout_ref.model.path = smoke.SHAPE
    assert plan(config, GPUS["a10"]).fits or device == "cpu"


@pytest.mark.parametrize("command", ["smoke", "demo"])
def test_an_unknown_key_is_refused_in_a_sentence_and_nothing_is_made(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [command, "--out", str(tmp_path / "out"), "--", "data.nonsense=1"])
    assert done.exit_code == 2 and "nonsense" in done.output and "Traceback" not in done.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_fails_on_the_way_ends_with_code_one_and_a_sentence():
    broken = commands("Nothing.")

    @broken.command("break")
    def _break():
        raise Failed("the third step failed; see the log")

    broken.command("other")(lambda: None)
    done = CliRunner().invoke(broken, ["break"])
    assert done.exit_code == 1 and done.output == "rapo: the third step failed; see the log\n"


@pytest.mark.parametrize(
    ("norms", "says"), [([1.0, float("nan"), 1.0], "step 2"), ([1.0, 0.0], "step 2"), ([1.0], "1 ")]
)
def test_smoke_fails_on_a_step_without_gradient_and_on_a_missing_one(tmp_path, norms, says):
    (tmp_path / "metrics").mkdir()
    lines = [json.dumps({"step": i, "data": {"actor/grad_norm": norm}}) for i, norm in enumerate(norms, start=1)]
    (tmp_path / "metrics" / "0000.jsonl").write_text("\n".join(lines))
    with pytest.raises(Failed, match=says):
        smoke._check_steps(tmp_path, 3)


def test_smoke_counts_no_validation_before_the_first_step(tmp_path):
    (tmp_path / "metrics").mkdir()
    lines = [{"step": 0, "data": {"val-core/eval/acc": 0.5}}, {"step": 1, "data": {"actor/grad_norm": 1.0}}]
    (tmp_path / "metrics" / "0000.jsonl").write_text("\n".join(map(json.dumps, lines)))
    smoke._check_steps(tmp_path, 1)


@pytest.mark.slow
def test_smoke_trains_resumes_and_evaluates_on_a_processor(tmp_path):
    command = [sys.executable, "-m", "rapo_verl.cli", "smoke", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("this machine can train: 4 steps")
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "run" / "train.log").exists() and (folder / "eval.log").exists()
    assert not (folder / "model").exists() and not (folder / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_smoke_names_the_log_of_a_stage_that_fails(tmp_path):
    command = [sys.executable, "-m", "rapo_verl.cli", "smoke", "--out", "out", "--", "data.max_prompt_length=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and "train.log" in done.stderr and "can train" not in done.stdout


@pytest.mark.parametrize("recipe", ["qwen2.5_3b_rapo", "qwen2.5_3b_rapo_fsdp2"])
def test_step_benchmark_on_a_gpu_has_steps_for_the_learning_rate_and_compiles_nothing(bench, recipe, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    args = argparse.Namespace(recipe=recipe, rounds=2, overrides=["actor_rollout_ref.actor.optim.lr=1e-5"])
    actor = bench.configured(args, "model").actor_rollout_ref.actor
    assert actor.optim.total_training_steps == 12 and actor.optim.lr == 1e-5
    if actor.strategy == "megatron":
        assert actor.megatron.tensor_model_parallel_size == 1
    else:
        assert not actor.fsdp_config.use_torch_compile


def test_step_benchmark_prints_what_there_is_when_the_time_is_up(bench, capsys):
    step = dict.fromkeys((*bench.STAGES, "peak GiB"), 2.0)
    bench.print_table({bench.MEASURE: [step, {**step, "step": 4.0}], "a": [{**step, "step": 1.0}], "b": []})
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].split()[-1] == "1.000" and "0.250   a first step" in lines[1] and "no step" in lines[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ([], ["GRPO, veRL's head", "GRPO, our head", "RAPO bounded", "RAPO topk"]),
        (["--answers", "1", "8"], ["RAPO bounded", "with 1 a prompt", "with 8 a prompt"]),
    ],
)
def test_step_benchmark_takes_every_row_on_a_processor(tiny, tmp_path, more, rows):
    random_checkpoint(tiny, tmp_path / "model")
    command = [sys.executable, "benchmarks/megatron_step.py", "--recipe", "toy_rapo_cpu", "--model", tmp_path / "model"]
    command += ["--sequences", "8", "--prompt", "4", "--response", "8", "--rounds", "1", *more]
    done = subprocess.run(list(map(str, command)), cwd=CLONE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()[-len(rows) :]
    assert [line[:18].strip() for line in table] == rows
