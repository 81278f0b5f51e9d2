"""Makes a toy: its problems as veRL parquet and its pre-trained base model, in one folder."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch

from rapo_verl import Refused
from rapo_verl.data.prepare import prepare
from rapo_verl.run.files import write_atomic
from rapo_verl.toy.base_model import pretrain
from rapo_verl.toy.world import Puzzle, Split, World, write_jsonl

TRAIN_FILE, EVAL_FILE, WORLD_FILE, MODEL_DIR = "train.parquet", "eval.parquet", "world.json", "model"
TRAIN_PROBLEMS, EVAL_PROBLEMS = 3840, 360
TRAIN_SEED, EVAL_SEED = 0, 99
PRETRAIN_STEPS, PRETRAIN_BATCH = 1000, 192


def make_toy(out: Path, *, seed: int, progress: bool = True) -> None:
    """Write problems and base model of world ``seed`` to ``out``; what is already there and the same is kept.

    The folder gets train.parquet, eval.parquet, their data cards and sources, world.json and model/.
    """
    settings = {
        "world_seed": seed,
        "train": [TRAIN_PROBLEMS, TRAIN_SEED],
        "eval": [EVAL_PROBLEMS, EVAL_SEED],
        "pretrain": [PRETRAIN_STEPS, PRETRAIN_BATCH],
    }
    path = out / WORLD_FILE
    if path.exists() and json.loads(path.read_text()) != settings:
        raise Refused(f"{out} holds a toy of other settings ({path.read_text()}); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    world = World(seed)
    write_problems(world, out, train=(TRAIN_PROBLEMS, TRAIN_SEED), evaluation=(EVAL_PROBLEMS, EVAL_SEED))
    write_atomic(path, json.dumps(settings))
    if not (out / MODEL_DIR).exists():
        # One thread: the model is too small to gain from two, loses much where another process is busy, and its weights
        # would depend on the number of cores.
        torch.set_num_threads(1)
        pretrain(world, out / MODEL_DIR, seed=seed, steps=PRETRAIN_STEPS, batch_size=PRETRAIN_BATCH, progress=progress)


def write_problems(world: World, out: Path, *, train: tuple[int, int], evaluation: tuple[int, int]) -> None:
    """Write train.parquet and eval.parquet through the project's data path, with their cards and sources.

    ``train`` and ``evaluation`` are count and seed; a training question drawn twice is kept once.
    """
    (out / "source").mkdir(parents=True, exist_ok=True)
    splits: dict[Split, tuple[int, int]] = {"train": train, "eval": evaluation}
    for split, (count, seed) in splits.items():
        source = out / "source" / f"{split}.jsonl"
        write_jsonl(world.problems(split, count, seed), source)
        against = [out / "source" / "train.jsonl"] if split == "eval" else []
        path = prepare(str(source), out, name=split, prompt="bare", against=against)
        rows = pq.ParquetFile(path).metadata.num_rows
        if split == "eval" and rows != count:
            raise Refused(f"{path}: {count - rows} of {count} evaluation problems were dropped; see its card")


def load_problems(toy_dir: Path) -> tuple[World, list[Puzzle]]:
    """Return the world of a toy folder and its evaluation problems."""
    path = toy_dir / WORLD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no toy at {toy_dir}; make one with `rapo toy make --out {toy_dir}`")
    settings = json.loads(path.read_text())
    world = World(settings["world_seed"])
    return world, world.problems("eval", *settings["eval"])
