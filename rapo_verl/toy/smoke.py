"""`rapo smoke`: does this machine train? Three steps with random weights, a save, a resume, sixteen samples judged."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rapo_verl import Failed, Refused
from rapo_verl.run.compose import compose_or_refuse
from rapo_verl.run.doctor import PADDED_ATTENTION, has_gpu, imports
from rapo_verl.run.folder import read_metrics
from rapo_verl.run.names import CHECKPOINTS_DIR
from rapo_verl.toy.base_model import build_model, build_tokenizer, random_checkpoint, save_checkpoint
from rapo_verl.toy.demo import console, stage, train
from rapo_verl.toy.make import EVAL_FILE, MODEL_DIR, TRAIN_FILE, write_problems
from rapo_verl.toy.world import World

SHAPE = "Qwen/Qwen2.5-0.5B"
STEPS, PROBLEMS, SAMPLES = 3, 4, 4
# The one-GPU recipe, made short: few and short responses, few processes, a small cache that any card has room for, and
# neither torch.compile, CUDA graphs nor tuning in vLLM, which cost more than so short a run has of them.
ON_A_GPU = (
    "data.train_batch_size=32",
    "data.max_prompt_length=64",
    "data.max_response_length=128",
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.rollout.max_model_len=192",
    "actor_rollout_ref.rollout.enforce_eager=true",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.2",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.kernel_config.enable_flashinfer_autotune=false",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "+trainer.v1.sampler.sampler_kwargs.poll_interval=0.2",
)
# FlashInfer's sampler is compiled as vLLM starts, where there is a compiler, and then not used by requests with a seed.
# Nothing is downloaded: without a network each look-up would wait.
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
# Of veRL's timings, in the order of a step.
TIMINGS = ("gen", "old_log_prob", "ref", "update_actor", "update_weights", "save_checkpoint", "step")


def smoke(out: Path, overrides: list[str]) -> None:
    """Train, resume and evaluate in a new folder below ``out``, on a GPU if there is one; only the logs are kept.

    Args:
        out: each call makes a folder of its own in it.
        overrides: Hydra overrides of the training.

    Raises:
        Refused: an unknown key or value.
        Failed: the machine does not train; the message says where to look.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%m%d-%H%M%S-"), dir=out)).absolute()
    folder.chmod(0o755)
    start, device = time.monotonic(), "cuda" if has_gpu() else "cpu"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    chosen = [*smoke_overrides(folder, device), *overrides]
    experiment = "qwen2.5_0.5b_1gpu" if device == "cuda" else "toy_rapo_cpu"
    try:
        config = compose_or_refuse([f"experiment={experiment}", *chosen])
    except Refused:
        folder.rmdir()
        raise
    console.print(f"{experiment} on {_name(device)}, in {folder}", highlight=False, soft_wrap=True)
    with stage(1, 4, "problems, and a model of random weights"):
        write_problems(World(0), folder, train=(384, 0), evaluation=(24, 99))
        _make_model(folder / MODEL_DIR, device)
    run = folder / "run"
    with stage(2, 4, f"{STEPS} steps and a save: Ray, FSDP2, vLLM, TransferQueue, reward loop"):
        train(experiment, run, [*chosen, f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={STEPS}"])
        _check_steps(run, STEPS)
    with stage(3, 4, "a resume and one more step"):
        train(experiment, run, [*chosen, f"trainer.total_training_steps={STEPS + 1}", "trainer.save_freq=-1"])
        _check_steps(run, STEPS + 1)
    with stage(4, 4, f"{PROBLEMS * SAMPLES} samples of the saved model, judged"):
        _evaluate(run, folder, config)
    for rest in (run / CHECKPOINTS_DIR, folder / MODEL_DIR):
        shutil.rmtree(rest)
    print(f"this machine can train: {STEPS + 1} steps on {_name(device)}, a save, a resume and {PROBLEMS * SAMPLES} "
          f"samples in {time.monotonic() - start:.0f} s")  # fmt: skip


def attention_overrides() -> list[str]:
    """Return what a training needs where flash-attn cannot be imported: torch's attention over padded sequences."""
    if imports("flash_attn").found == "works":
        return []
    return list(PADDED_ATTENTION)


def smoke_overrides(folder: Path, device: str) -> list[str]:
    """Return what both starts of the training have in common."""
    common = [
        f"data.train_files={folder / TRAIN_FILE}",
        f"data.val_files={folder / EVAL_FILE}",
        f"actor_rollout_ref.model.path={folder / MODEL_DIR}",
        "reward.custom_reward_function.path=pkg://rapo_verl.toy.coin",
        "reward.custom_reward_function.name=toss",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        "trainer.logger=[file]",
        "survival.stall_minutes=10",
    ]
    return [*common, *(() if device == "cpu" else (*ON_A_GPU, *attention_overrides()))]


def _make_model(folder: Path, device: str) -> None:
    if device == "cpu":
        tokenizer = build_tokenizer()
        save_checkpoint(build_model(tokenizer, seed=0), tokenizer, folder)
        return
    import torch

    try:
        random_checkpoint(SHAPE, folder, device=device)
    except RuntimeError as error:  # what torch raises of CUDA, memory included
        raise Failed(f"{error}; see `rapo doctor` and nvidia-smi") from error
    torch.cuda.empty_cache()


def _check_steps(run: Path, count: int) -> None:
    """Print the seconds of each step.

    Raises:
        Failed: fewer steps than that, or one whose gradient is none.
    """
    steps = [step for step in read_metrics(run) if step["step"] > 0]  # 0: a validation before the first
    for step in steps:
        times = ", ".join(f"{name} {step[f'timing_s/{name}']:.1f}" for name in TIMINGS if f"timing_s/{name}" in step)
        norm = step.get("actor/grad_norm", 0.0)
        console.print(f"      step {step['step']}: gradient {norm:.3g}; seconds: {times}", highlight=False)
        if not (math.isfinite(norm) and norm > 0):
            raise Failed(f"step {step['step']} has a gradient of norm {norm}; see {run}")
    if len(steps) != count:
        raise Failed(f"{len(steps)} steps were made, not {count}; see {run}")


def _evaluate(run: Path, folder: Path, config: DictConfig) -> None:
    """Sample the run's checkpoint and judge the samples by the commands that a user has.

    Raises:
        Failed: a command failed; the second does if a sample is missing.
    """
    out, log = folder / "eval", folder / "eval.log"
    rollout: Any = config.actor_rollout_ref.rollout
    engine = {"gpu_memory_utilization": rollout.gpu_memory_utilization, "enforce_eager": rollout.enforce_eager}
    engine["attention_backend"] = rollout.engine_kwargs.vllm.get("attention_backend")
    options = [f"--engine-arg={key}={json.dumps(value)}" for key, value in engine.items() if value is not None]
    generate = ["generate", "--model", str(run), "--data", str(folder / EVAL_FILE), "--out", str(out)]
    generate += [f"--n={SAMPLES}", f"--limit={PROBLEMS}", f"--max-tokens={config.data.max_response_length}"]
    generate += options if has_gpu() else []  # else vLLM is given what a processor needs
    for arguments in (generate, ["score", str(out)]):
        with log.open("ab") as file:
            command = [sys.executable, "-m", "rapo_verl.cli", "eval", *arguments]
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code != 0:
            tail = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-15:])
            raise Failed(f"`rapo eval {arguments[0]}` ended with exit code {code}; see {log}, which ends:\n{tail}")


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "this machine's processors (torch sees no GPU)"
