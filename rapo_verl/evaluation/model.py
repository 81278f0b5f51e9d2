"""The model of an evaluation: where its checkpoint lies, its prompts and its end tokens."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapo_verl.checkpoints import hugging_face_folder
from rapo_verl.data.prepare import render
from rapo_verl.evaluation.plan import PlanError, Problem

# End tokens of chat formats. Base models of the Qwen family end with one that their config does not name.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def resolve_model(model: str) -> Path:
    """Return the folder of a Hugging Face checkpoint.

    Args:
        model: such a folder, a checkpoint of veRL (``global_step_N``, its ``actor``, FSDP or Megatron), or a hub id.

    Raises:
        PlanError: there is none, or veRL's merger failed.
    """
    folder = Path(model)
    if folder.is_dir():
        actor = folder / "actor" if (folder / "actor").is_dir() else folder
        backend = _verl_backend(actor)
        complete = hugging_face_folder(actor)
        if complete:
            return complete
        return merge(actor, backend) if backend else folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise PlanError(f"model {model} does not exist; give a checkpoint folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PlanError(f"model {model} is neither a folder here nor to be had from the hub ({error})") from error


def _verl_backend(actor: Path) -> str | None:
    """Return "fsdp" or "megatron" for a checkpoint of veRL, None for anything else."""
    if any(actor.glob("model_world_size_*_rank_*.pt")):
        return "fsdp"
    return "megatron" if (actor / "model" / "dist_ckpt").is_dir() else None


def merge(actor: Path, backend: str) -> Path:
    """Return a Hugging Face checkpoint of veRL's sharded one, made by veRL's own merger once and then kept.

    It lies in ``$RAPO_CACHE`` (default ``~/.cache/rapo_verl``) under a hash of the shards' names, sizes and times.

    Raises:
        PlanError: the merger failed.
    """
    shards = sorted(path for path in actor.rglob("*") if path.is_file() and "optim" not in path.name)
    stats = [f"{path.relative_to(actor)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shards]
    key = hashlib.sha256("\n".join([str(actor.resolve()), *stats]).encode()).hexdigest()[:16]
    target = Path(os.environ.get("RAPO_CACHE", "~/.cache/rapo_verl")).expanduser() / "merged" / key
    if target.is_dir():
        return target
    unfinished = target.with_name(f".{key}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", backend]
    command += ["--local_dir", str(actor), "--target_dir", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not any(unfinished.glob("*.safetensors")):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise PlanError(f"veRL's merger failed on {actor}: {' '.join(command)}\n{done.stderr[-2000:]}")
    try:
        unfinished.rename(target)
    except OSError:
        # Another process was faster; its result is the same.
        shutil.rmtree(unfinished)
    return target


def load_prompts(
    folder: Path, problems: Sequence[Problem], max_tokens: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], int]:
    """Return each problem's prompt as token ids, the ids that end a response, and the longest sequence to expect.

    Args:
        folder: checkpoint with tokenizer and chat template.
        problems: the problems.
        max_tokens: of a response.

    Raises:
        PlanError: no tokenizer, no chat template, or the model is made for shorter sequences.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        texts = [render([dict(turn) for turn in problem.messages], tokenizer) for problem in problems]
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder}: {error}") from error
    prompts = tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    longest = max(map(len, prompts)) + max_tokens
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise PlanError(
            f"the longest prompt and max_tokens ({max_tokens}) need {longest} positions, the model has {limit}; "
            f"lower max_tokens to {limit - longest + max_tokens}"
        )
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id, *(vocabulary[token] for token in _END_TOKENS if token in vocabulary)}
    if (folder / "generation_config.json").is_file():
        stated = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= set(stated) if isinstance(stated, list) else {stated}
    return prompts, tuple(sorted(ends - {None})), longest
