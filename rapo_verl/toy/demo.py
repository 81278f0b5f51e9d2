"""The demo: base, GRPO, RAPO and RAPO with reference answers on the toy world, compared in one report."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import transformers
from omegaconf import OmegaConf
from rich.console import Console

from rapo_verl import Failed, Refused
from rapo_verl.report.load import load_study
from rapo_verl.report.page import print_table, write_report
from rapo_verl.report.statistics import Numbers
from rapo_verl.run.compose import compose_or_refuse
from rapo_verl.run.files import write_atomic
from rapo_verl.run.folder import read_metrics
from rapo_verl.run.launch import run
from rapo_verl.run.names import CONFIG_FILE, ENVIRONMENT_FILE
from rapo_verl.run.preflight import problems_of
from rapo_verl.run.reference_answers import ANSWERS_FILE
from rapo_verl.toy.exact import success_probabilities
from rapo_verl.toy.make import EVAL_FILE, MODEL_DIR, TRAIN_FILE, load_problems, make_toy

console = Console(stderr=True)
# A solution has 23 tokens, its end included.
MAX_TOKENS = 24
# The base's key, the folder of the draw that chooses Hard, the file of enumerated probabilities in a model's folder.
BASE, HARD_FOLDER, EXACT_FILE = "base", "base_hard", "exact.json"
# Processes that sample side by side: one, with vLLM's core in another, waits on half of two cores.
PARTS = min(2, len(os.sched_getaffinity(0)))


@contextmanager
def stage(number: int, of: int, what: str) -> Iterator[None]:
    """Print what the body does, and its seconds when it is done."""
    console.print(f"[bold][{number}/{of}][/bold] {what}", highlight=False)
    start = time.monotonic()
    yield
    console.print(f"      done in {time.monotonic() - start:.0f} s", highlight=False)


def train(experiment: str, run_dir: Path, overrides: list[str]) -> Path:
    """Run (or go on with) one experiment and return the folder of its last Hugging Face checkpoint."""
    config = compose_or_refuse([f"experiment={experiment}", f"run_dir={run_dir}", *overrides])
    model = run_dir / "checkpoints" / f"global_step_{config.trainer.total_training_steps}" / "actor" / "huggingface"
    if (model / "model.safetensors").exists():
        console.print(f"      {experiment}: already trained in {run_dir}", highlight=False)
        return model
    problems = problems_of(config)
    if problems:
        raise Refused(problems)
    code = run(config)
    if code != 0:
        raise Failed(f"{experiment} ended with exit code {code}; see {run_dir}")
    return model


def evaluate(models: dict[str, Path], toy_dir: Path, out: Path, *, n: int, limit: int) -> None:
    """Sample and judge each model, named by its key, as a user does, and enumerate it; what is there is kept."""
    out.mkdir(parents=True, exist_ok=True)
    options = ["--data", toy_dir / EVAL_FILE, "--n", n, "--limit", limit, "--max-tokens", MAX_TOKENS, "--no-logprobs"]
    for folder, model, draw in [(HARD_FOLDER, models[BASE], 2), *((key, model, 1) for key, model in models.items())]:
        _rapo(out, "eval", "generate", "--model", model, "--out", out / folder, "--draw", draw, *options, parts=PARTS)
    folders = [out / folder for folder in (HARD_FOLDER, *models)]
    _rapo(out, "eval", "score", *folders, "--strictness", "integer", "--jobs", 1)
    transformers.utils.logging.disable_progress_bar()  # of loading 27 tensors
    world, problems = load_problems(toy_dir)
    for key, model in models.items():
        path = out / key / EXACT_FILE
        if not path.exists():
            exact = success_probabilities(model, world, problems[:limit], batch_size=16)
            write_atomic(path, json.dumps(exact.tolist()))


def sample_answers(toy_dir: Path, m: int) -> None:
    """Write what the base answers to the training problems, m times each, to the folder that the recipe reads."""
    out = toy_dir / "answers"
    if (out / ANSWERS_FILE).exists():
        console.print(f"      already in {out}", highlight=False)
        return
    options = ["--n", m, "--max-tokens", MAX_TOKENS, "--token-ids"]
    model, data = toy_dir / MODEL_DIR, toy_dir / TRAIN_FILE
    _rapo(toy_dir, "eval", "generate", "--model", model, "--data", data, "--out", out, *options, parts=PARTS)
    _rapo(toy_dir, "reference-answers", out, "--strictness", "integer")


def _rapo(folder: Path, *arguments: object, parts: int = 1) -> None:
    """Run a command as a user does, or so many parts of it side by side, of which the first shows its progress."""
    command = [sys.executable, "-m", "rapo_verl.cli", *map(str, arguments)]
    log, processes = folder / "evaluate.log", []
    try:
        with log.open("ab") as file:
            for number in range(parts):
                part = ["--part", f"{number}/{parts}"] if parts > 1 else []
                bar = file if number else None  # on stderr
                environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
                processes.append(subprocess.Popen([*command, *part], stdout=file, stderr=bar, env=environment))
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.kill()
        raise
    if code := next(filter(None, codes), 0):
        raise Failed(f"`rapo {arguments[0]} {arguments[1]}` ended with exit code {code}; see {log}")


def write_demo_report(out: Path, labels: dict[str, str], settings: dict[str, str]) -> Numbers:
    """Write the report of a finished demo and return its numbers; labels are names of the models, by their keys."""
    folders = [out / "eval" / key for key in labels]
    study = load_study(
        folders,
        out / "eval" / HARD_FOLDER,
        names=list(labels.values()),
        roles=list(labels),
        settings=settings,
        title="RAPO and GRPO on the toy world",
        histories={label: read_metrics(out / key) for key, label in labels.items() if key != BASE},
    )
    exact = [tuple(json.loads((folder / EXACT_FILE).read_text())) for folder in folders]
    results = tuple(replace(result, exact=p) for result, p in zip(study.results, exact))
    return write_report(out, replace(study, results=results))


def settings_of(run_dir: Path) -> dict[str, str]:
    """Return what the report says of one run: its method's settings, commit and versions."""
    config = OmegaConf.load(run_dir / CONFIG_FILE)
    environment = json.loads((run_dir / ENVIRONMENT_FILE).read_text())
    actor = config.actor_rollout_ref.actor
    rapo = json.dumps(OmegaConf.to_container(config.rapo))
    kl = f"{actor.kl_loss_type} x {actor.kl_loss_coef}" if actor.kl_loss_coef else "none"
    return {
        "settings": f"rapo {rapo}; veRL KL {kl}; beta {actor.entropy_coeff}; lr {actor.optim.lr}; "
        f"{config.trainer.total_training_steps} steps of {config.data.train_batch_size} x "
        f"{config.actor_rollout_ref.rollout.n} responses; seed {config.actor_rollout_ref.rollout.seed}",
        "commit": str(environment["commit"]),
        "versions": ", ".join(f"{k} {v}" for k, v in environment["packages"].items()),
    }


def demo(
    out: Path, *, seed: int = 0, n: int = 512, limit: int = 96, answers: int = 32, overrides: list[str] | None = None
) -> None:
    """Make the toy, train on it by each method, evaluate base and all, and write the report.

    Every stage keeps what an earlier, interrupted call finished. The toy is in runs/toy/base<seed>, made if need be.

    Args:
        out: folder.
        seed: of the toy.
        n: responses to each problem of the evaluation.
        limit: problems of the evaluation; a multiple of 12 keeps the families equal.
        answers: of the base to each training problem, for RAPO with reference answers; 0 leaves that method out.
        overrides: of the trainings.
    """
    out = out.absolute()
    toy_dir = Path(f"runs/toy/base{seed}").absolute()
    common = [f"toy_dir={toy_dir}", *(overrides or [])]
    models = {BASE: toy_dir / MODEL_DIR}
    labels = {BASE: "base", "grpo": "GRPO", "rapo": "RAPO", "rapo_answers": "RAPO with reference answers"}
    if not answers:
        labels.pop("rapo_answers")
    methods = [key for key in ("rapo", "grpo", "rapo_answers") if key in labels]
    for key in methods:
        compose_or_refuse([f"experiment=toy_{key}_cpu", *common])  # before minutes of pre-training
    number, of = count(1), len(methods) + 3 + bool(answers)
    with stage(next(number), of, "the toy's problems and its base model, pre-trained on the spot"):
        make_toy(toy_dir, seed=seed)
    for key in methods:
        if key == "rapo_answers":
            with stage(next(number), of, f"{answers} answers of the base to each training problem"):
                sample_answers(toy_dir, answers)
        with stage(
            next(number), of, f"{labels[key]} through veRL: Ray, FSDP2 on gloo, vLLM, TransferQueue, reward loop"
        ):
            models[key] = train(f"toy_{key}_cpu", out / key, common)
    with stage(next(number), of, f"{n} responses to each of {limit} held-out problems, from each model"):
        evaluate({key: models[key] for key in labels}, toy_dir, out / "eval", n=n, limit=limit)
    with stage(next(number), of, "the report"):
        settings = {
            f"{labels[key]}: {what}": text for key in sorted(methods) for what, text in settings_of(out / key).items()
        }
        print_table(write_demo_report(out, labels, {"command": "rapo demo", "toy seed": str(seed), **settings}))
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
