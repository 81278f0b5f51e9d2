"""Where rows come from: JSON, JSONL, CSV and parquet files, and named sets of the Hugging Face hub."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rapo_verl import Refused

Record = dict[str, Any]


class RowError(ValueError):
    """A row that cannot be used: why, which is the same for many rows, and what of it is this row's own."""

    def __init__(self, kind: str, detail: str = ""):
        self.fault = kind, detail
        super().__init__(kind + detail)


class HubSource(NamedTuple):
    """Where a named set is on the Hugging Face hub."""

    repository: str
    split: str
    rows: int
    file: str | None = None


HUB = {
    "simplerl-8k": HubSource(
        "hkust-nlp/SimpleRL-Zoo-Data", "train", 8523, file="simplelr_qwen_level3to5/train.parquet"
    ),
    "aime24": HubSource("HuggingFaceH4/aime_2024", "train", 30),
    "aime25": HubSource("math-ai/aime25", "test", 30),
    "math500": HubSource("HuggingFaceH4/MATH-500", "test", 500),
}


def iter_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a .json, .jsonl, .csv or .parquet file, at least one; few are in memory at once."""
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise Refused(f"{path}: allowed are .json, .jsonl, .csv and .parquet")
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    row = -1
    try:
        for row, record in enumerate(reader(path)):
            if not isinstance(record, dict):
                raise Refused(f"{path}: row {row} is {record!r:.80}, no object with named columns")
            yield record
    except Refused:
        raise
    # ValueError: what is no UTF-8 and no JSON; RecursionError: lists nested a thousand deep.
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        where = f", after row {row}" if row >= 0 else ""
        raise Refused(f"{path}{where}: {error}") from error
    if row < 0:
        raise Refused(f"{path}: holds no rows with named columns")


def _parquet_rows(path: Path) -> Iterator[Record]:
    # Without threads: pyarrow's pool aborted some commands at their exit.
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, use_threads=False):
            yield from batch.to_pylist()


def _csv_rows(path: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 24)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for record in reader:
            if None in record:
                raise Refused(
                    f"{path}, line {reader.line_num}: more cells than the header has columns; put a text with commas "
                    "into quotation marks"
                )
            yield record


def _jsonl_rows(path: Path) -> Iterator[Any]:
    # newline="\n": other line breaks may stand inside a string.
    with open(path, encoding="utf-8-sig", newline="\n") as stream:
        yield from (json.loads(line) for line in stream if not line.isspace())


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        # An object a line, under the other suffix.
        yield from _jsonl_rows(path)
        return
    if isinstance(loaded, dict):
        lists = {key: value for key, value in loaded.items() if isinstance(value, list) and value}
        if len(lists) != 1:
            what = ", ".join(f"{key!r} ({len(value)})" for key, value in lists.items()) or "none"
            raise Refused(f"{path}: of an object, one list of rows is read; got {what}. Save it as a file of its own")
        (loaded,) = lists.values()
    if not isinstance(loaded, list):
        raise Refused(f"{path}: holds {loaded!r:.80}, no list of rows")
    yield from loaded


def read_hub(name: str) -> tuple[list[Record], str]:
    """Return the rows of a set of `HUB` from the hub or its local cache, and the sha256 of their canonical JSON."""
    import datasets

    source = HUB[name]
    files = source.file and {source.split: source.file}
    try:
        records = datasets.load_dataset(source.repository, split=source.split, data_files=files).to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise Refused(
            f"{name}: {source.repository} is not to be had from the hub or its cache ({error}); set HF_ENDPOINT to "
            "a mirror, HF_HOME to a cache, or give a local file instead of the name"
        ) from error
    if len(records) != source.rows:
        raise Refused(f"{name}: the hub has {len(records)} rows, the published set has {source.rows}")
    lines = (json.dumps(record, sort_keys=True, ensure_ascii=False, default=str) for record in records)
    return records, hashlib.sha256("\n".join(lines).encode()).hexdigest()
