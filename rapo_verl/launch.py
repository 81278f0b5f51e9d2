"""Starts a run and watches over it: run folder, environment, log, progress, and no process left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, ListConfig, OmegaConf

from rapo_verl.files import write_atomic
from rapo_verl.progress import TrainingProgress

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
LOG_FILE = "train.log"
FAILURE_FILE = "reward_failure.txt"
# Environment variable with the run folder, for every process of a run.
RUN_DIR_VARIABLE = "RAPO_RUN_DIR"
# Environment variables of a run that every one of its processes, on every node, must see.
PROCESS_VARIABLES = (
    "VERL_PLATFORM",
    "VERL_USE_EXTERNAL_MODULES",
    RUN_DIR_VARIABLE,
    "VERL_FILE_LOGGER_PATH",
    "TENSORBOARD_DIR",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "OMP_NUM_THREADS",
)
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
    "ray_kwargs",
)
VERSIONED = ("verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "megatron-core", "TransferQueue", "rapo-verl")
# Seconds for Ray and vLLM to end by themselves once the driver has.
GRACE_SECONDS = 20


class RunFolderError(ValueError):
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
    (run_dir / FAILURE_FILE).unlink(missing_ok=True)
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
    root = Path(__file__).resolve().parent.parent
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
    folder = run_dir / "metrics"
    folder.mkdir(exist_ok=True)
    return folder / f"{len(list(folder.glob('*.jsonl'))):04d}.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of every step, key "step" beside veRL's names; of a repeated step, the last start's."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / "metrics").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s: an unfinished line was left by a killed run; it is skipped", path)
                continue
            steps.setdefault(record["step"], {"step": record["step"]}).update(record["data"])
    return [steps[step] for step in sorted(steps)]


def _child_environment(config: DictConfig, run_dir: Path) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HYDRA_FULL_ERROR": "1",
        # veRL raises if this module fails to import, where it would drop an entry point that fails.
        "VERL_USE_EXTERNAL_MODULES": "rapo_verl.plugin",
        RUN_DIR_VARIABLE: str(run_dir),
        "VERL_FILE_LOGGER_PATH": str(metrics_path(run_dir)),
        "TENSORBOARD_DIR": str(run_dir / "tensorboard"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if config.trainer.device == "cpu":
        env["VERL_PLATFORM"] = "cpu"
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # One unbound thread each: as fast for small models, and two runs on a machine do not spin against each other.
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return env


def run(config: DictConfig, *, verbose: bool = False) -> int:
    """Train as ``config`` says and return the exit code; the log of every process goes to ``train.log``.

    Args:
        config: resolved config that passed `rapo_verl.preflight`.
        verbose: show the log as well as writing it.

    Raises:
        RunFolderError: see `prepare_run_dir`.
    """
    run_dir = prepare_run_dir(config)
    log_path = run_dir / LOG_FILE
    env = _child_environment(config, run_dir)
    with log_path.open("ab") as log, TrainingProgress(config, Path(env["VERL_FILE_LOGGER_PATH"])) as progress:
        progress.say(f"log of every process: {log_path}")
        start = log.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "rapo_verl.train", str(run_dir)],
            stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip
        with _no_process_left(child) as running, _terminate_as_interrupt():
            tail = log_path.open("r", errors="replace")
            tail.seek(start)
            while running():
                time.sleep(0.5)
                progress.update()
                if verbose:
                    progress.echo(tail.read())
        progress.update()
    if child.returncode != 0:
        _explain_failure(run_dir, log_path, start, child.returncode)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM take the way of Ctrl-C, so that it ends the run's processes too."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _no_process_left(child: subprocess.Popen) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether the child runs; in the end, end it and every process it started."""
    known: dict[int, psutil.Process] = {}

    def running() -> bool:
        # Remembered while they can be found; psutil compares creation times, so a reused pid is not taken for ours.
        known.update((process.pid, process) for process in _descendants(child.pid))
        return child.poll() is None

    try:
        yield running
    finally:
        if running():
            child.send_signal(signal.SIGINT)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                running()
                child.kill()
                child.wait()
        _, alive = psutil.wait_procs(list(known.values()), timeout=GRACE_SECONDS)
        for process in alive:
            logger.warning("ending a process that the run left: %s", process)
            process.kill()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _explain_failure(run_dir: Path, log_path: Path, start: int, code: int) -> None:
    failure = run_dir / FAILURE_FILE
    if failure.exists():
        print(f"\nThe reward function raised:\n{failure.read_text()}", file=sys.stderr)
    with log_path.open("r", errors="replace") as log:
        log.seek(start)
        lines = log.read().splitlines()
    print(f"\nThe run ended with exit code {code}. Last lines of {log_path}:", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines[-25:]), file=sys.stderr)
