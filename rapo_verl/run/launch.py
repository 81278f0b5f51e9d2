"""Starts a run and watches over it: run folder, environment, log, progress, and no process left behind."""

import logging
import math
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from rapo_verl.run import checkpoints, folder, names
from rapo_verl.run.files import write_atomic
from rapo_verl.run.lock import claimed
from rapo_verl.run.processes import descendants, dump_stacks, no_process_left, terminate_as_interrupt
from rapo_verl.run.progress import TrainingProgress

logger = logging.getLogger(__name__)

DUMP_SECONDS = 30


def _child_environment(config: DictConfig, run_dir: Path, step: int) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HYDRA_FULL_ERROR": "1",
        # veRL raises if this module fails to import, where it would drop an entry point that fails.
        "VERL_USE_EXTERNAL_MODULES": "rapo_verl.training.plugin",
        names.RUN_DIR_VARIABLE: str(run_dir),
        names.RESUME_VARIABLE: str(step),
        "VERL_FILE_LOGGER_PATH": str(folder.metrics_path(run_dir)),
        "TENSORBOARD_DIR": str(run_dir / "tensorboard"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    env.setdefault(names.STOP_FILE_VARIABLE, str(run_dir / names.STOP_FILE))
    if config.survival.max_minutes is not None:
        ends = time.time() + 60 * config.survival.max_minutes
        env[names.DEADLINE_VARIABLE] = str(min(ends, float(env.get(names.DEADLINE_VARIABLE) or ends)))
    if "wandb" in config.trainer.logger:
        env |= {"WANDB_RUN_ID": _wandb_run_id(run_dir), "WANDB_RESUME": "allow"}
    if config.trainer.device == "cpu":
        env["VERL_PLATFORM"] = "cpu"
        env = {**names.CPU_ENVIRONMENT, **env}
    return env


def _wandb_run_id(run_dir: Path) -> str:
    """Return the run's id, made once: a requeued job continues its curves."""
    path = run_dir / names.WANDB_FILE
    if not path.exists():
        write_atomic(path, secrets.token_hex(4))
    return path.read_text()


def run(config: DictConfig, *, verbose: bool = False) -> int:
    """Train as a config that passed `preflight` says and return the exit code.

    The log of every process goes to ``train.log``; it is shown as well if ``verbose``. Refused: the run may not go on
    in this folder.
    """
    # Checkpoints hold pickles: nobody else may write into what this run makes.
    os.umask(os.umask(0o022) | 0o022)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with claimed(run_dir):
        changed = folder.changes_of(config)
        step, said = checkpoints.resume_point(config)
        folder.enter(config, changed, step)
        noted = f"(noted in {names.CHANGES_FILE})"
        said += [f"{key} is {new} now, was {old} {noted}" for key, (old, new) in changed.items()]
        return _train(config, run_dir, step, said, verbose)


def _train(config: DictConfig, run_dir: Path, step: int, said: list[str], verbose: bool) -> int:
    log_path = run_dir / names.LOG_FILE
    env = _child_environment(config, run_dir, step)
    stalled = False
    with log_path.open("ab") as log, TrainingProgress(config, Path(env["VERL_FILE_LOGGER_PATH"])) as progress:
        progress.say(f"log of every process: {log_path}")
        if step:
            progress.say(f"going on from step {step}")
        for line in said:
            progress.say(line)
        start = log.tell()
        command = [sys.executable, "-m", "rapo_verl.training.main", str(run_dir)]
        options = {"stdout": log, "stderr": subprocess.STDOUT, "env": env, "start_new_session": True}
        with (
            terminate_as_interrupt(),
            no_process_left(command, **options) as child,
            log_path.open("r", errors="replace") as tail,
        ):
            tail.seek(start)
            while child.poll() is None and not stalled:
                time.sleep(0.5)
                progress.look()
                if verbose:
                    progress.echo(tail.read())
                stalled = progress.idle_seconds() > 60 * (config.survival.stall_minutes or math.inf)
            if stalled:
                dump_stacks(run_dir / names.STACKS_DIR, descendants(child.pid))
                _dump_on_other_nodes()
        progress.look()
    code = names.STALLED if stalled else child.returncode
    if code == names.STALLED:
        stacks = run_dir / names.STACKS_DIR
        print(f"\nNo step for {config.survival.stall_minutes} minutes: what each process did is in {stacks}")
    elif code == names.SAVED:
        print(f"\nSaved at {(run_dir / names.STOPPED_FILE).read_text().strip()}. The same command goes on from there.")
    elif code == names.COLLAPSED:
        reason = (run_dir / names.COLLAPSED_FILE).read_text().strip()
        print(f"\nSaved, and ended because of an alarm: {reason}\nLook at it: rapo watch {run_dir}")
    elif code != names.DONE:
        _explain_failure(run_dir, log_path, start, code)
    return code if code >= 0 else 128 - code


def _dump_on_other_nodes() -> None:
    """Have the agents of a Slurm job look at their nodes before Ray ends the processes there."""
    state = os.environ.get(names.STATE_VARIABLE)
    if state:
        (Path(state) / names.DUMP_FILE).touch()
        time.sleep(DUMP_SECONDS)


def _explain_failure(run_dir: Path, log_path: Path, start: int, code: int) -> None:
    failure = run_dir / names.FAILURE_FILE
    if failure.exists():
        print(f"\nThe reward function raised:\n{failure.read_text()}", file=sys.stderr)
    with log_path.open("rb") as log:
        # Its end is enough: the log of a long run is large.
        log.seek(max(start, log.seek(0, os.SEEK_END) - (1 << 16)))
        lines = log.read().decode(errors="replace").splitlines()
    print(f"\nThe run ended with exit code {code}. Last lines of {log_path}:", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines[-25:]), file=sys.stderr)
