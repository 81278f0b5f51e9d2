"""From a judged folder of samples to one file of answers to train on (`rapo reference-answers`)."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from rapo_verl import Refused
from rapo_verl.evaluation.prompts import load_prompts
from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.spec import Problem, prompts_sha256
from rapo_verl.evaluation.store import Store, read_stated, read_table, write_table
from rapo_verl.reward import Verdict
from rapo_verl.run.reference_answers import ANSWERS_FILE, FORMAT, SCHEMA


def need_tokens(store: Store) -> None:
    """Refuse a folder whose samples have no tokens, before anything is judged."""
    if not store.manifest["sampling"].get("token_ids"):
        raise Refused(f"{store.folder}: its samples have no tokens; draw them with `rapo eval generate --token-ids`")


def collect_answers(store: Store) -> Path:
    """Write the distinct answers to each problem of a judged folder, with their counts, and return the file."""
    need_tokens(store)
    manifest = store.manifest
    problems = [Problem(**{**row, "messages": tuple(row["messages"])}) for row in store.problems]
    weights = Path(manifest["notes"]["weights"])
    prompts, _ = load_prompts(weights, problems, manifest["sampling"]["max_tokens"])
    if prompts_sha256(prompts) != manifest["prompts_sha256"]:
        raise Refused(f"{weights} makes other prompts than {store.folder} was drawn with: its tokenizer has changed")
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for problem, prompt in enumerate(prompts):
        verdicts = read_table(score_path(store, problem), ["verdict"])["verdict"].to_pylist()
        tokens = [ids for path in store.shards_of(problem) for ids in store.read(path)["token_ids"].to_pylist()]
        columns["prompt"].append(list(prompt))
        for name, is_right in (("right", True), ("wrong", False)):
            counts = Counter(
                tuple(ids) for ids, verdict in zip(tokens, verdicts) if (verdict == Verdict.correct) is is_right
            )
            columns[name].append([list(ids) for ids in counts])
            columns[f"{name}_counts"].append(list(counts.values()))
    stated = {
        "format": FORMAT,
        "model": manifest["notes"].get("model"),
        "strictness": read_stated(score_path(store, 0))["basis"]["strictness"],
        **{key: manifest[key] for key in ("model_sha256", "data_sha256", "n", "draw", "sampling", "sha256")},
    }
    path = store.folder / ANSWERS_FILE
    write_table(path, pa.table(columns, schema=SCHEMA), stated)
    return path
