"""Where problem sets come from and how each publisher names its columns."""

import csv
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rapo_verl import Refused
from rapo_verl.reward import last_boxed


class DataError(Refused):
    """Data that must not be used; the message says what, where and how to mend it, one problem a line."""


@dataclass(frozen=True)
class Problem:
    """One row as its source gave it, columns renamed, nothing mended."""

    row: int  # position in the source, from 0
    id: str
    question: str
    answer: str
    level: int | None
    subject: str | None


@dataclass(frozen=True)
class Layout:
    """The columns of one publisher; None where it has none (``id``, ``level``, ``subject`` are taken if there)."""

    name: str
    question: str
    answer: str
    id: str | None = None
    level: str | None = None
    subject: str | None = None
    # The answer is the last box of a worked solution.
    boxed: bool = False

    @property
    def columns(self) -> set[str]:
        """The columns that a file of this layout must have."""
        return {name for name in (self.question, self.answer, self.id, self.level, self.subject) if name}


# The most specific one whose columns are all there is taken.
LAYOUTS = (
    Layout("MATH-500 (HuggingFaceH4)", "problem", "answer", "unique_id", "level", "subject"),
    Layout("MATH (hendrycks: boxed solutions)", "problem", "solution", None, "level", "type", boxed=True),
    Layout("SimpleRL, indexed", "question", "answer", "idx", "level", "subject"),
    Layout("SimpleRL-Zoo (hkust-nlp; its pre-rendered prompt is not used)", "question", "gt_answer", None, "level"),
    Layout("AIME (Maxwell-Jia: ID, Problem, Answer)", "Problem", "Answer", "ID"),
    Layout("id, problem, answer", "problem", "answer", "id"),
    Layout("problem, answer", "problem", "answer"),
    Layout("question, answer", "question", "answer"),
)


@dataclass(frozen=True)
class HubSource:
    """Where a named set is on the Hugging Face hub: one or more (repository, config, split, file)."""

    name: str
    parts: tuple[tuple[str, str | None, str, str | None], ...]
    rows: int


HUB = {
    source.name: source
    for source in (
        HubSource(
            "simplerl-8k",
            (("hkust-nlp/SimpleRL-Zoo-Data", None, "train", "simplelr_qwen_level3to5/train.parquet"),),
            8523,
        ),
        HubSource("aime24", (("HuggingFaceH4/aime_2024", None, "train", None),), 30),
        HubSource("aime25", (("math-ai/aime25", None, "test", None),), 30),
        HubSource("math500", (("HuggingFaceH4/MATH-500", None, "test", None),), 500),
    )
}


def layout_of(columns: Iterable[str]) -> Layout:
    """Return the layout of a file with these columns.

    Raises:
        DataError: no known layout has all its columns there.
    """
    have = set(columns)
    fitting = [layout for layout in LAYOUTS if layout.columns <= have]
    if not fitting:
        known = "\n".join(f"  {layout.name}: {', '.join(sorted(layout.columns))}" for layout in LAYOUTS)
        raise DataError(f"no known layout has the columns {', '.join(sorted(have))}; known:\n{known}")
    return max(fitting, key=lambda layout: len(layout.columns))


def read_records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a JSON, JSONL, CSV or parquet file, and the file's sha256.

    Raises:
        DataError: another kind of file, or one that cannot be read as what its name says.
    """
    try:
        data = path.read_bytes()
        kind = path.suffix.lower()
        if kind == ".parquet":
            records = pq.read_table(pa.BufferReader(data), use_threads=False, pre_buffer=False).to_pylist()
        elif kind in (".json", ".jsonl", ".csv"):
            records = _parse_text(data.decode("utf-8"), kind)
        else:
            raise DataError(f"{path}: allowed are .json, .jsonl, .csv and .parquet")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: holds no rows with named columns")
    return records, hashlib.sha256(data).hexdigest()


def _parse_text(text: str, kind: str) -> list[Any]:
    if kind == ".csv":
        csv.field_size_limit(1 << 24)
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if kind == ".jsonl":
        # split("\n"): splitlines() also splits at control characters inside strings.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    loaded = json.loads(text)
    if isinstance(loaded, dict):
        loaded = next((value for value in loaded.values() if isinstance(value, list)), [])
    return loaded


def read_hub(source: HubSource) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a named set from the hub or its local cache, and the sha256 of their canonical JSON.

    Raises:
        DataError: it is neither cached nor to be had, or has another number of rows than the published set.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    records: list[dict[str, Any]] = []
    for repository, config, split, file in source.parts:
        try:
            loaded = datasets.load_dataset(repository, config, split=split, data_files=file and {split: file})
        except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{source.name}: {repository} is not to be had from the hub or its cache ({error}); set HF_ENDPOINT to "
                "a mirror, HF_HOME to a cache, or give a local file instead of the name"
            ) from error
        records += loaded.to_list()
    if len(records) != source.rows:
        raise DataError(f"{source.name}: the hub has {len(records)} rows, the published set has {source.rows}")
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False, default=str) for record in records)
    return records, hashlib.sha256("\n".join(lines).encode()).hexdigest()


def to_problems(records: list[dict[str, Any]], name: str) -> tuple[list[Problem], Layout]:
    """Return the problems of rows of a known layout, and that layout.

    Raises:
        DataError: the layout is unknown.
    """
    layout = layout_of(records[0])
    return [_problem(i, record, layout, name) for i, record in enumerate(records)], layout


def _problem(row: int, record: dict[str, Any], layout: Layout, name: str) -> Problem:
    def text(column: str | None) -> str:
        value = record.get(column) if column else None
        return "" if value is None else str(value)

    answer = text(layout.answer)
    digits = "".join(character for character in text(layout.level or "level") if character in "0123456789")
    return Problem(
        row=row,
        id=text(layout.id or "id") or f"{name}-{row}",
        question=text(layout.question),
        answer=(last_boxed(answer) or "") if layout.boxed else answer,
        level=int(digits) if digits else None,
        subject=text(layout.subject or "subject") or None,
    )
