"""What can be asked of a run's folder: the checkpoints, a batch that held NaN."""

import shutil
import time
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rapo_verl.checkpoints import CHECKPOINTS, CheckpointError, check, damage, read_checkpoints
from rapo_verl.evaluation.model import exported, merge_into
from rapo_verl.evaluation.plan import PlanError
from rapo_verl.launch import CONFIG_FILE


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
    try:
        export = exported(chosen.folder)
        if export:
            shutil.copytree(export, to)
        else:
            merge_into(chosen.folder, to)
    except PlanError as error:
        raise CheckpointError(str(error)) from error
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
