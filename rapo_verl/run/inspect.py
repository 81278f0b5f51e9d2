"""What can be asked of a run's folder: the checkpoints, a batch that held NaN."""

import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rapo_verl import Refused
from rapo_verl.run.checkpoints import check, damage, read_checkpoints
from rapo_verl.run.export import exported, merge_into
from rapo_verl.run.inputs import tokenizer_of
from rapo_verl.run.names import BAD_BATCHES_DIR, CHECKPOINTS_DIR, CONFIG_FILE

# Per-token fields of a batch that the update reads; those that a run does not have are left out.
FIELDS = ("rm_scores", "advantages", "returns", "old_log_probs", "ref_log_prob", "rollout_log_probs")


def show_checkpoints(run: Path, *, verify: bool) -> bool:
    """Print a run's checkpoints, oldest first; return whether all are whole."""
    found = read_checkpoints(run / CHECKPOINTS_DIR)
    if not found:
        raise Refused(f"{run / CHECKPOINTS_DIR} has no checkpoint; is {run} a run's folder?")
    table = Table("step", "saved", "GiB", "world", "state")
    whole = True
    for checkpoint in found:
        problems = damage(checkpoint) if verify else list(checkpoint.problems)
        whole = whole and not problems
        made = checkpoint.manifest.get("time")
        saved = time.strftime("%F %T", time.localtime(made)) if made else ""
        state = "; ".join(problems[:3]) or ("every byte read" if verify else "complete")
        world = str(checkpoint.manifest.get("world", ""))
        table.add_row(str(checkpoint.step), saved, f"{checkpoint.size / (1 << 30):.2f}", world, state)
    Console(width=140).print(table)
    return whole


def export_checkpoint(run: Path, step: int, to: Path) -> Path:
    """Write a checkpoint's policy as a Hugging Face model into ``to``; Refused unless the checkpoint is whole."""
    chosen = next((found for found in read_checkpoints(run / CHECKPOINTS_DIR) if found.step == step), None)
    if chosen is None:
        raise Refused(f"{run} has no checkpoint of step {step}: rapo checkpoints {run}")
    if to.exists():
        raise Refused(f"{to} exists; give another folder with --to")
    check(chosen, {})
    export = exported(chosen.folder)
    if export:
        shutil.copytree(export, to)
    else:
        merge_into(chosen.folder, to)
    return to


def inspect(file: Path, rows: int) -> list[str]:
    """Return what is wrong in a dumped batch, with its text where the run's tokenizer is to be had."""
    if not file.is_file():
        raise Refused(f"{file} is not there; a run that stops on NaN leaves RUN/{BAD_BATCHES_DIR}/step_N.pt")
    config = file.resolve().parent.parent / CONFIG_FILE
    decode = tokenizer_of(OmegaConf.load(config).actor_rollout_ref.model).decode if config.exists() else None
    return describe(file, decode, rows)


def non_finite_rows(fields: Mapping[str, Tensor], mask: Tensor) -> dict[str, list[int]]:
    """Return, of each field with NaN or infinity at an unmasked token, the rows that have one.

    Args:
        fields: (batch, response) each; what stands at masked positions does not count.
        mask: (batch, response), nonzero at response tokens.
    """
    bad = {name: (~torch.isfinite(values) & mask.bool()).any(dim=1) for name, values in fields.items()}
    return {name: rows.nonzero().flatten().tolist() for name, rows in bad.items() if rows.any()}


def _batch(path: Path) -> dict[str, Any]:
    """Return a dumped batch; Refused is any other file, on which torch raises whatever its first bytes lead to."""
    batch = torch.load(path, weights_only=True) if zipfile.is_zipfile(path) else None
    if not isinstance(batch, dict) or not {"response_mask", "step", "why"} <= batch.keys():
        raise Refused(f"{path} is no batch of a run; allowed: {BAD_BATCHES_DIR}/step_N.pt of one that stopped on NaN")
    return batch


def describe(path: Path, decode: Any = None, rows: int = 5) -> list[str]:
    """Return lines that say what is wrong in a dumped batch: fields, tokens, and the first bad rows as text or ids."""
    batch = _batch(path)
    mask = batch["response_mask"].bool()
    fields = {name: batch[name] for name in FIELDS if name in batch}
    lines = [f"step {batch['step']}: {batch['why']}", f"{mask.shape[0]} responses, {int(mask.sum())} tokens"]
    for name, values in fields.items():
        kept = values[mask]
        good = kept[torch.isfinite(kept)]
        span = f"from {good.min():.6g} to {good.max():.6g}, mean {good.mean():.6g}" if good.numel() else "none finite"
        lines.append(f"  {name}: {kept.numel() - good.numel()} of {kept.numel()} not finite; {span}")
    bad = non_finite_rows(fields, mask)
    for row in sorted({row for found in bad.values() for row in found})[:rows]:
        lines.append(f"row {row}: {', '.join(name for name, found in bad.items() if row in found)}")
        for name in ("prompts", "responses"):
            if name in batch:
                ids = batch[name][row].tolist()
                lines.append(f"  {name}: {decode(ids) if decode else ids}")
        for name in bad:
            where = (~torch.isfinite(fields[name][row]) & mask[row]).nonzero().flatten().tolist()
            if where:
                lines.append(f"  {name} at tokens {where[:20]}")
    return lines
