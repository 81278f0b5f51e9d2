"""A folder of samples: a manifest, and one file a shard that appears whole, is checked when read, and never changes."""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rapo_verl import Refused
from rapo_verl.evaluation.spec import FORMAT, SamplingPlan, Shard, sha_of
from rapo_verl.run.files import write_atomic
from rapo_verl.run.lock import NoLocksHereError, held

logger = logging.getLogger(__name__)

MANIFEST_FILE, PROBLEMS_FILE, SHARDS, SCORES = "manifest.json", "problems.json", "shards", "scores"
SCHEMA = pa.schema(
    [
        ("sample", pa.int32()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
        # Nats, of the model's own distribution; null where it was not asked for.
        ("cumulative_logprob", pa.float64()),
        ("text", pa.string()),
        # Of the response, its end included; null where they were not asked for.
        ("token_ids", pa.list_(pa.int32())),
    ]
)
_KEY = b"rapo"


class Samples(NamedTuple):
    """Responses of one shard, one list a column of SCHEMA."""

    tokens: list[int]
    finish_reason: list[str]
    cumulative_logprob: list[float | None]
    text: list[str]
    token_ids: list[list[int]] | None = None


class ShardError(Refused):
    """A shard file that is cut short, damaged, or not what its place says."""


def write_table(path: Path, table: pa.Table, stated: dict[str, Any]) -> None:
    """Write a parquet file (zstd, a checksum on every page) with ``stated`` in its footer; whole or not at all."""
    buffer = io.BytesIO()
    table = table.replace_schema_metadata({_KEY: json.dumps(stated).encode()})
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, use_dictionary=["finish_reason"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def read_stated(path: Path) -> dict[str, Any]:
    """Return what `write_table` stated, from the footer alone; raise ShardError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return json.loads((pq.read_metadata(stream).metadata or {})[_KEY])
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: {error}") from error


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return columns of a parquet file, every page's checksum verified; raise ShardError if one is wrong."""
    try:
        with path.open("rb") as stream:
            return pq.read_table(
                stream, columns=columns, use_threads=False, pre_buffer=False, page_checksum_verification=True
            )
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Store:
    """The folder of one plan."""

    folder: Path
    manifest: dict[str, Any]
    problems: list[dict[str, Any]]

    @classmethod
    def create(cls, folder: Path, plan: SamplingPlan) -> "Store":
        """Return the folder of a plan, made if need be; Refused if it holds samples of another."""
        path = folder / MANIFEST_FILE
        if path.exists():
            there = cls.open(folder).manifest
            differing = [key for key in plan.manifest if there.get(key) != plan.manifest[key]]
            if differing:
                lines = [f"  {key}: {there.get(key)} there, {plan.manifest[key]} here" for key in differing]
                raise Refused("\n".join([f"{folder} holds samples of another evaluation:", *lines]))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [asdict(problem) for problem in plan.problems]
            write_atomic(folder / PROBLEMS_FILE, json.dumps(rows, indent=1, ensure_ascii=False))
            # Last, so that a folder with a manifest has everything.
            write_atomic(path, json.dumps({**plan.manifest, "sha256": plan.sha, "notes": plan.notes}, indent=1))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Return an existing folder."""
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            problems = json.loads((folder / PROBLEMS_FILE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise Refused(f"{folder} holds no evaluation ({error}); make one with `rapo eval generate`") from error
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise Refused(f"{folder}: the manifest's format must be {FORMAT!r}; got {found!r}")
        stated = {key: value for key, value in manifest.items() if key not in ("sha256", "notes")}
        if sha_of(stated) != manifest.get("sha256"):
            raise Refused(f"{folder}: {MANIFEST_FILE} was changed; its samples were drawn as it said before")
        if not isinstance(problems, list) or len(problems) != manifest["problems"]:
            raise Refused(f"{folder / PROBLEMS_FILE} does not hold the {manifest['problems']} problems of the manifest")
        return cls(folder, manifest, problems)

    @contextmanager
    def locked(self, part: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Hold the folder, or the i-th of ``count`` parts of it, for one generating process."""
        alone = part[1] == 1
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.folder / ".lock", shared=not alone))
                stack.enter_context(held(self.folder / ".lock.{}-{}".format(*part)))
            except BlockingIOError as error:
                raise Refused(f"another process generates into {self.folder}; wait for it or end it") from error
            except NoLocksHereError as error:
                logger.warning("%s: nothing keeps another process from generating into this folder", error)
            # What a killed process was writing, where nobody else can be writing.
            for left in (self.folder / SHARDS).glob("*/.*.tmp") if alone else ():
                left.unlink()
            yield

    def shard_path(self, problem: int, shard: int) -> Path:
        """Return where a shard lies."""
        return self.folder / SHARDS / f"{problem:05d}" / f"{shard:05d}.parquet"

    def shards_of(self, problem: int) -> list[Path]:
        """Return the paths that hold all samples of a problem, in order."""
        return [self.shard_path(problem, i) for i in range(-(-self.manifest["n"] // self.manifest["shard"]))]

    def texts(self, problem: int, samples: Sequence[int]) -> list[str]:
        """Return the texts of these samples of a problem; only the shards that hold them are read."""
        size, paths = self.manifest["shard"], self.shards_of(problem)
        shards = {i: self.read(paths[i], ["text"])["text"] for i in sorted({sample // size for sample in samples})}
        return [shards[sample // size][sample % size].as_py() for sample in samples]

    def write(self, shard: Shard, samples: Samples) -> None:
        """Write a shard; raise ShardError if the engine returned another number of samples than asked for."""
        given: list[Any] = [[None] * shard.samples if column is None else column for column in samples]
        if any(len(column) != shard.samples for column in given):
            raise ShardError(f"asked for {shard.samples} samples, got {[len(column) for column in given]}")
        columns: list[Any] = [list(range(shard.first, shard.first + shard.samples)), *given]
        digest = hashlib.blake2b(json.dumps(samples.text).encode(), digest_size=16).hexdigest()
        stated = {
            "manifest": self.manifest["sha256"],
            "problem": shard.problem,
            "first": shard.first,
            "count": shard.samples,
            "seed": shard.seed,
            "tokens": sum(samples.tokens),
            "texts": digest,
        }
        write_table(self.shard_path(shard.problem, shard.number), pa.table(columns, schema=SCHEMA), stated)

    def read(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a shard; raise ShardError unless it is whole and in its place."""
        stated, table = read_stated(path), read_table(path, columns)
        first = int(path.stem) * self.manifest["shard"]
        expected = {
            "manifest": self.manifest["sha256"],
            "problem": int(path.parent.name),
            "first": first,
            "count": min(self.manifest["shard"], self.manifest["n"] - first),
        }
        if {key: stated.get(key) for key in expected} != expected or table.num_rows != expected["count"]:
            raise ShardError(f"{path}: states {stated} with {table.num_rows} rows; its place says {expected}")
        return table

    def missing(self, shards: Sequence[Shard]) -> tuple[list[Shard], list[str]]:
        """Return those of these shards that are still to be made, and what was wrong with files found damaged.

        A damaged file is kept beside its place as ``*.damaged``. Every page of every file is read, one at a time.
        """
        todo, damaged = [], []
        for shard in shards:
            path = self.shard_path(shard.problem, shard.number)
            if not path.exists():
                todo.append(shard)
                continue
            try:
                self.read(path)
            except ShardError as error:
                logger.warning("%s; it is made again", error)
                path.rename(path.with_suffix(".damaged"))
                damaged.append(str(error))
                todo.append(shard)
        return todo, damaged
