"""Checkpoints that are complete or absent, and the choice of the one that a run goes on from.

veRL writes its files in place and its tracker before we can know that all are there. A manifest, written last by one
rename, says what a complete checkpoint consists of; a folder without one was never finished.
"""

import json
import os
import re
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rapo_verl import Refused
from rapo_verl.plan.job import files_of
from rapo_verl.run.files import file_crc32, file_sha256, write_atomic

# In a run's folder.
MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
ASIDE = ".incomplete"


@dataclass(frozen=True)
class Checkpoint:
    """A folder ``global_step_<step>``."""

    step: int
    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every file is there, in its size."""
        return not self.problems

    @property
    def size(self) -> int:
        """Return the size on disk in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def identity(config: DictConfig) -> dict[str, str]:
    """Return what a checkpoint must share with the run that goes on from it: model, data and layout of the world."""
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    description = Path(model.path) / "config.json"
    model_hash = f" {file_sha256(description)[:16]}" if description.is_file() else ""
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    layout = f"{ranks} ranks, {actor.strategy}"
    if actor.strategy == "megatron":
        sizes = ("tensor_model", "pipeline_model", "context")
        layout += "".join(f" {size[0]}p{actor.megatron[f'{size}_parallel_size']}" for size in sizes)
        if actor.megatron.dist_ckpt_optim_fully_reshardable and "extra" not in actor.checkpoint.load_contents:
            layout = "megatron, any layout"  # what is loaded belongs to none
    return {
        "model": f"{model.path}{model_hash}",
        "data": " ".join(map(_named, files_of(config, "train_files"))),
        "world": layout,
    }


def _named(path: Path) -> str:
    # What data.custom_cls reads need be no file.
    return f"{path.name} {file_sha256(path)[:16]}" if path.is_file() else str(path)


def finish(folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Flush every file of a checkpoint to disk, then write its manifest with these facts: from here on it counts."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    # torch's own files hold a checksum of each tensor; Megatron's .distcp, .safetensors and the rest hold none.
    bare = [name for name in sizes if not name.endswith(".pt")]
    with ThreadPoolExecutor(8) as pool:
        sums = dict(zip(bare, pool.map(lambda name: file_crc32(folder / name), bare)))
    manifest = {"step": step, "time": time.time(), **facts, "files": sizes, "crc32": sums}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def read_checkpoints(root: Path) -> list[Checkpoint]:
    """Return the checkpoints below ``root``, by their steps."""
    folders = [(re.fullmatch(r"global_step_(\d+)", folder.name), folder) for folder in root.glob("global_step_*")]
    found = [_read(int(match[1]), folder) for match, folder in folders if match and folder.is_dir()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def whole_ones(root: Path) -> list[Checkpoint]:
    """Return the checkpoints below ``root`` of which every file is there, in the order in which they were saved.

    A run that has gone back, by ``trainer.resume_mode``, saves smaller steps than those that it has left.
    """
    whole = [checkpoint for checkpoint in read_checkpoints(root) if checkpoint.complete]
    return sorted(whole, key=lambda checkpoint: checkpoint.manifest.get("time", 0.0))


def _read(step: int, folder: Path) -> Checkpoint:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return Checkpoint(step, folder, problems=("no manifest: its saving was never finished",))
    except ValueError as error:
        return Checkpoint(step, folder, problems=(f"{MANIFEST}: {error}",))
    problems = []
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes of {size}")
    ranks = re.match(r"\d+", manifest.get("world", ""))
    shards = [name for name in manifest["files"] if re.fullmatch(r"actor/model_world_size_\d+_rank_\d+\.pt", name)]
    if ranks and shards and len(shards) != int(ranks[0]):
        problems.append(
            f"{len(shards)} shards of {ranks[0]} ranks: is the folder on a filesystem that every node sees?"
        )
    return Checkpoint(step, folder, manifest, tuple(problems))


def damage(checkpoint: Checkpoint) -> list[str]:
    """Return what reading every byte finds wrong: the checksums inside torch's and numpy's files, and all sizes."""
    found = list(checkpoint.problems)
    for path in sorted(checkpoint.folder.rglob("*.pt")):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except zipfile.BadZipFile as error:
            bad = str(error)
        if bad:
            found.append(f"{path.relative_to(checkpoint.folder)} is damaged ({bad})")
    for name, crc in checkpoint.manifest.get("crc32", {}).items():
        path = checkpoint.folder / name
        if path.is_file() and file_crc32(path) != crc:
            found.append(f"{name} is damaged (its checksum differs from the one it was saved with)")
    return found


def choose(root: Path, wanted: dict[str, str], *, mend: bool = True) -> tuple[int, list[str]]:
    """Make veRL's tracker name the newest complete checkpoint, and set aside what is newer and incomplete.

    Args:
        root: folder of the checkpoints.
        wanted: `identity` of the run.
        mend: False: only look; nothing is written, renamed or removed.

    Returns:
        The step that the run goes on from, 0 for a start, and what there is to say about it.
    """
    found, whole, tracker = read_checkpoints(root), whole_ones(root), root / TRACKER
    named = tracker.read_text().strip() if tracker.exists() else ""
    steps = {checkpoint.step for checkpoint in found}
    if named.isdigit() and int(named) not in steps and not (root / f"global_step_{named}{ASIDE}").exists():
        complete = ", ".join(str(checkpoint.step) for checkpoint in whole) or "none"
        raise Refused(
            f"{tracker} names step {named}, but {root}/global_step_{named} is gone. Put it back; or write the step to "
            f"go on from into the tracker ({complete} are complete); or delete the tracker to start again"
        )
    if not whole and any(checkpoint.manifest for checkpoint in found):
        raise Refused(
            f"no checkpoint in {root} is whole: "
            + "; ".join(f"{c.folder.name}: {', '.join(c.problems[:3])}" for c in found)
            + ". Restore the files, or move the folders away to start again"
        )
    step = whole[-1].step if whole else 0
    if whole:
        check(whole[-1], wanted)
    if not mend:
        return step, []
    said = []
    if whole and named != str(step):
        write_atomic(tracker, str(step))
        said.append(f"the tracker named step {named or '(none)'}; the newest complete checkpoint is {step}")
    if not whole:
        tracker.unlink(missing_ok=True)
    for checkpoint in found:
        if not checkpoint.complete and checkpoint.step > step:
            aside = checkpoint.folder.with_name(checkpoint.folder.name + ASIDE)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.folder.rename(aside)
            said.append(f"set aside as {aside.name}: {checkpoint.problems[0]}")
    if found and not whole:
        said.append("no checkpoint was ever finished: starting from the first step")
    return step, said


def resume_point(config: DictConfig, *, mend: bool = True) -> tuple[int, list[str]]:
    """Return the step that a run goes on from, as `choose` does; Refused if it may not go on from what is there."""
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return 0, []
    wanted = identity(config)
    if trainer.resume_mode == "auto":
        return choose(Path(trainer.default_local_dir), wanted, mend=mend)
    folder = Path(trainer.resume_from_path)
    for checkpoint in read_checkpoints(folder.parent):
        if checkpoint.folder == folder:
            check(checkpoint, wanted)
            return checkpoint.step, []
    raise Refused(f"trainer.resume_from_path: there is no checkpoint {folder}")


def check(checkpoint: Checkpoint, wanted: dict[str, str]) -> None:
    """Refuse, with everything that is wrong, a checkpoint that is not whole, not this run's, or not safe to load."""
    wrong = list(checkpoint.problems)
    for key, value in wanted.items():
        if not wrong and checkpoint.manifest.get(key) != value:
            wrong.append(f"its {key} is {checkpoint.manifest.get(key)}, this run's is {value}")
    # Its files are pickles: whoever can write them runs code as the user who loads them.
    for path in (checkpoint.folder.parent, checkpoint.folder, *checkpoint.folder.rglob("*")):
        if path.lstat().st_mode & 0o022 and not path.is_symlink():
            wrong.append(
                f"others can write {path}, whose pickles run as code: chmod -R go-w {checkpoint.folder.parent}"
            )
            break
    if wrong:
        raise Refused(f"cannot go on from {checkpoint.folder}: " + "; ".join(wrong))


def make_room(root: Path, step: int) -> None:
    """Remove what a run that has gone back left at the step that it saves now: half overwritten, it would look whole.

    Refused: the disk would be full; a save takes as much as the last one.
    """
    shutil.rmtree(root / f"global_step_{step}", ignore_errors=True)
    whole = whole_ones(root)
    if not whole:
        return
    free = shutil.disk_usage(root).free
    if free < whole[-1].size:
        raise Refused(
            f"No space left for a checkpoint: {root} has {free >> 20} MiB free, the last one took "
            f"{whole[-1].size >> 20} MiB. Step {whole[-1].step} is saved and whole. Make room, or lower "
            "trainer.max_actor_ckpt_to_keep, and start again"
        )


def retain(root: Path, keep: int | None, never: int) -> list[int]:
    """Remove the oldest complete checkpoints on disk beyond ``keep``, but not step ``never``; return their steps.

    Counts what is on disk, whoever saved it: veRL counts this process's saves only, and removes before saving.
    """
    if keep is None or keep < 1:  # as veRL
        return []
    gone = [checkpoint for checkpoint in whole_ones(root)[:-keep] if checkpoint.step != never]
    for checkpoint in gone:
        # By one rename first, so that half a folder is never taken for a checkpoint.
        doomed = checkpoint.folder.with_name(f".{checkpoint.folder.name}.removed")
        checkpoint.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return [checkpoint.step for checkpoint in gone]
