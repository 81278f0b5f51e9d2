"""The samples that a run keeps of its training steps (trainer.rollout_data_dir), as far as a page shows them."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Of a dump: bytes that are read of it, samples and characters that are shown.
DUMP_BYTES, SAMPLES, CHARACTERS = 8 << 20, 3, 1500


def newest_dump(config: DictConfig) -> list[dict[str, Any]]:
    """Return the records of the newest dump of training samples (trainer.rollout_data_dir), whole lines alone."""
    kept = OmegaConf.select(config, "trainer.rollout_data_dir")
    files = [path for path in Path(kept).glob("*.jsonl") if path.stem.isdigit()] if kept else []
    if not files:
        return []
    with max(files, key=lambda path: int(path.stem)).open("rb") as file:
        lines = file.read(DUMP_BYTES).split(b"\n")
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # half a line, or bytes of half a character
            continue
        if isinstance(record, dict) and isinstance(record.get("score"), int | float):
            records.append(record)
    return records


def samples(dump: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Return samples to show by the title of their list, one a problem; the texts are a model's, and stay text."""

    def told(record: dict[str, Any]) -> dict[str, str]:
        verdict = record.get("verdict") or record.get("score")
        summary = f"step {record.get('step')} · {verdict} · reward {record['score']:g} · right: {record.get('gts')}"
        texts = {key: cut(str(record.get(key)), CHARACTERS) for key in ("input", "output")}
        return {"summary": summary, **texts}

    worst = sorted(dump, key=lambda record: (record["score"], -len(str(record.get("output")))))
    lists = {"Newest": dump[::-1], "Worst: least reward, then longest": worst}
    # One of a problem.
    firsts = {title: {str(r.get("input")): r for r in records[::-1]} for title, records in lists.items()}
    return {title: [told(r) for r in list(found.values())[::-1][:SAMPLES]] for title, found in firsts.items() if found}


def cut(text: str, limit: int) -> str:
    """Return a text with its middle left out where it is longer than the limit."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
