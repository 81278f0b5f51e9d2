"""What can be asked of a run's folder: the checkpoints, a batch that held NaN."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rapo_verl.checkpoints import CheckpointError, check, damage, hugging_face_folder, read_checkpoints
from rapo_verl.launch import CONFIG_FILE

CHECKPOINTS = "checkpoints"


def show_checkpoints(run: Path, *, verify: bool) -> bool:
    """Print a run's checkpoints, oldest first; return whether all are whole.

    Raises:
        CheckpointError: there is none.
    """
    found = read_checkpoints(run / CHECKPOINTS)
    if not found:
        raise CheckpointError(f"{run / CHECKPOINTS} has no checkpoint; is {run} a run's folder?")
    table = Table("step", "saved", "GiB", "world", "state")
    whole = True
    for checkpoint in found:
        problems = damage(checkpoint) if verify else list(checkpoint.problems)
        whole = whole and not problems
        saved = (
            time.strftime("%F %T", time.localtime(checkpoint.manifest.get("time", 0))) if checkpoint.manifest else ""
        )
        state = "; ".join(problems[:3]) or ("every byte read" if verify else "complete")
        world = str(checkpoint.manifest.get("world", ""))
        table.add_row(str(checkpoint.step), saved, f"{checkpoint.size / (1 << 30):.2f}", world, state)
    Console(width=140).print(table)
    return whole


def export_checkpoint(run: Path, step: int, to: Path) -> Path:
    """Write a checkpoint's policy as a Hugging Face model into ``to``.

    Raises:
        CheckpointError: there is no such checkpoint, it is not whole, or veRL's merger failed.
    """
    chosen = next((found for found in read_checkpoints(run / CHECKPOINTS) if found.step == step), None)
    if chosen is None:
        raise CheckpointError(f"{run} has no checkpoint of step {step}: rapo checkpoints {run}")
    if to.exists():
        raise CheckpointError(f"{to} exists; give another folder with --to")
    check(chosen, {})
    actor = chosen.folder / "actor"
    complete = hugging_face_folder(actor)
    if complete:
        shutil.copytree(complete, to)
        return to
    config = OmegaConf.load(run / CONFIG_FILE)
    backend = "megatron" if config.actor_rollout_ref.actor.strategy == "megatron" else "fsdp"
    command = [
        sys.executable, "-m", "verl.model_merger", "merge", "--backend", backend,
        "--local_dir", str(actor), "--target_dir", str(to),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CheckpointError(f"veRL's merger failed on {actor}:\n{done.stderr[-2000:]}")
    return to


def inspect(file: Path, rows: int) -> list[str]:
    """Return what is wrong in a dumped batch, with its text where the run's tokenizer is to be had."""
    from rapo_verl.guards import describe

    config = file.resolve().parent.parent / CONFIG_FILE
    decode = None
    if config.exists():
        from transformers import AutoTokenizer

        decode = AutoTokenizer.from_pretrained(OmegaConf.load(config).actor_rollout_ref.model.path).decode
    return describe(file, decode, rows)
