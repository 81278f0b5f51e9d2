"""From what a user calls a model to the folder of a Hugging Face checkpoint; veRL's sharded ones are merged."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rapo_verl import Refused
from rapo_verl.run.checkpoints import read_checkpoints, whole_ones
from rapo_verl.run.files import file_sha256
from rapo_verl.run.inputs import may_be_hub_id
from rapo_verl.run.names import CHECKPOINTS_DIR

# Files of a checkpoint that decide what it says.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")


def checkpoint_of(model: str) -> str:
    """Return the newest complete checkpoint of a run's folder (`rapo train`); any other model as it is."""
    saved = Path(model) / CHECKPOINTS_DIR
    if not saved.is_dir():
        return model
    whole = whole_ones(saved)
    if not whole:
        lines = [f"  {found.folder}: {'; '.join(found.problems[:3])}" for found in read_checkpoints(saved)]
        raise Refused("\n".join([f"{saved} has no complete checkpoint", *lines]))
    return str(whole[-1].folder)


def resolve_model(model: str) -> Path:
    """Return the folder of a Hugging Face checkpoint.

    Args:
        model: such a folder, a run's folder (its newest complete checkpoint), a checkpoint of veRL (``global_step_N``,
            its ``actor``, FSDP or Megatron), or a hub id.
    """
    folder = Path(checkpoint_of(model))
    if folder.is_dir():
        export = exported(folder)
        return export or (merge(folder) if _backend(folder) else folder)
    if not may_be_hub_id(model):
        raise Refused(f"model {model} does not exist; give a checkpoint folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(_MODEL_FILES)))
    except (OSError, ValueError) as error:  # what the hub says, and of a name that cannot be one
        raise Refused(f"model {model} is neither a folder here nor to be had from the hub ({error})") from error


def model_sha256(folder: Path) -> str:
    """Return the sha256 over names and contents of a checkpoint's weights, config and tokenizer."""
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    if not (folder / "config.json").is_file() or not any(f.suffix in (".safetensors", ".bin") for f in files):
        raise Refused(f"{folder} is no Hugging Face checkpoint: it lacks config.json or weights")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _actor(folder: Path) -> Path:
    return folder / "actor" if (folder / "actor").is_dir() else folder


def _backend(folder: Path) -> str | None:
    """Return "fsdp" or "megatron" for a sharded checkpoint of veRL, None for anything else."""
    if any(_actor(folder).glob("model_world_size_*_rank_*.pt")):
        return "fsdp"
    # verl/utils/megatron_utils.py:1060, written with `use_dist_checkpointing`.
    return "megatron" if (_actor(folder) / "model" / "dist_ckpt").is_dir() else None


def exported(folder: Path) -> Path | None:
    """Return the Hugging Face checkpoint inside one of veRL, None without one.

    FSDP writes it beside its shards. Megatron writes it into ``model`` (verl/utils/megatron_utils.py:1081), by default
    instead of shards.
    """
    places = (_actor(folder) / "huggingface", _actor(folder) / "model" / "huggingface")
    return next((place for place in places if any(place.glob("*.safetensors"))), None)


def merge(folder: Path) -> Path:
    """Return a Hugging Face checkpoint of veRL's sharded one, made by veRL's own merger once and then kept.

    It lies in ``$RAPO_CACHE`` (default ``~/.cache/rapo_verl``) under a hash of the shards' names, sizes and times.
    """
    actor = _actor(folder)
    shards = sorted(path for path in actor.rglob("*") if path.is_file() and "optim" not in path.name)
    stats = [f"{path.relative_to(actor)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shards]
    key = hashlib.sha256("\n".join([str(actor.resolve()), *stats]).encode()).hexdigest()[:16]
    target = Path(os.environ.get("RAPO_CACHE", "~/.cache/rapo_verl")).expanduser() / "merged" / key
    if target.is_dir():
        return target
    unfinished = target.with_name(f".{key}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    merge_into(folder, unfinished)
    try:
        unfinished.rename(target)
    except OSError:
        # Another process was faster; its result is the same.
        shutil.rmtree(unfinished)
    return target


def merge_into(folder: Path, target: Path) -> None:
    """Let veRL's merger write a sharded checkpoint as a Hugging Face one; Refused, and no target, if it fails."""
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", str(_backend(folder))]
    command += ["--local_dir", str(_actor(folder)), "--target_dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not any(target.glob("*.safetensors")):
        shutil.rmtree(target, ignore_errors=True)
        raise Refused(f"veRL's merger failed on {_actor(folder)}: {' '.join(command)}\n{done.stderr[-2000:]}")
