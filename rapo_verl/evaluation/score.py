"""Verdicts on stored samples: one file a problem, made again when the samples or the verifier change."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from rapo_verl import Refused
from rapo_verl.evaluation.store import SCORES, ShardError, Store, read_stated, read_table, write_table
from rapo_verl.reward import VerifierSettings, shared_verifier

SCHEMA = pa.schema(
    [
        ("sample", pa.int32()),
        ("verdict", pa.string()),
        # What the last box held; null without one.
        ("answer", pa.string()),
        ("tokens", pa.int32()),
        ("finish_reason", pa.string()),
    ]
)


@cache
def verifier_sha256() -> str:
    """Return the sha256 of what decides a verdict: our verifier's source and the versions of what it calls."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "reward").glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("math-verify", "latex2sympy2_extended", "sympy"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


def score_path(store: Store, problem: int) -> Path:
    """Return where a problem's verdicts lie."""
    return store.folder / SCORES / f"{problem:05d}.parquet"


def samples_sha256(store: Store, problem: int) -> str:
    """Return the sha256 of what verdicts are on: a problem's right answer, and its texts as the shards' footers say."""
    digest = hashlib.sha256(store.problems[problem]["gold"].encode())
    for shard in store.shards_of(problem):
        digest.update(read_stated(shard)["texts"].encode())
    return digest.hexdigest()


def score(
    store: Store,
    settings: VerifierSettings,
    *,
    jobs: int | None = None,
    started: Callable[[int], None] = lambda _: None,
    done: Callable[[], None] = lambda: None,
) -> int:
    """Judge every problem whose verdicts are missing or rest on something else, and return how many were.

    ``jobs`` processes, by default one a core; 1 stays in this process. ``started`` is called with the number of
    problems to judge, ``done`` after each.
    """
    todo = _outdated(store, settings)
    started(len(todo))
    processes = min(jobs or os.cpu_count() or 1, len(todo))
    if processes <= 1:
        for task in todo:
            _score_problem(store, settings, *task)
            done()
        return len(todo)
    # spawn: the caller may hold threads.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for future in [pool.submit(_score_in_pool, store.folder, settings, *task) for task in todo]:
            future.result()
            done()
    return len(todo)


def _outdated(store: Store, settings: VerifierSettings) -> list[tuple[int, dict[str, Any]]]:
    """Return the problems to judge, each with what its verdicts will rest on; the others' are read, every page."""
    todo, faults = [], []
    for problem in range(len(store.problems)):
        path = score_path(store, problem)
        try:
            samples = samples_sha256(store, problem)
        except ShardError as error:
            faults.append(str(error))
            continue
        basis = {
            "verifier": verifier_sha256(),
            "strictness": settings.strictness,
            "deadline_s": settings.deadline_s,
            "memory_mb": settings.memory_mb,
            "samples": samples,
        }
        try:
            judged = read_stated(path).get("basis") == basis and read_table(path).num_rows == store.manifest["n"]
        except ShardError:
            judged = False
        if not judged:
            todo.append((problem, basis))
    if faults:
        raise Refused(
            f"{store.folder}: {len(faults)} problem(s) are not complete; run `rapo eval generate` again. "
            f"First: {faults[0]}"
        )
    return todo


_opened = cache(Store.open)


def _score_in_pool(folder: Path, *task: Any) -> None:
    _score_problem(_opened(folder), *task)


def _score_problem(store: Store, settings: VerifierSettings, problem: int, basis: dict[str, Any]) -> None:
    gold, verifier = store.problems[problem]["gold"], shared_verifier(settings)
    parts = []
    for path in store.shards_of(problem):
        try:
            table = store.read(path, ["sample", "text", "tokens", "finish_reason"])
        except ShardError as error:
            raise Refused(f"{error}; run `rapo eval generate` again, which makes it anew") from error
        responses = table["text"].to_pylist()
        verdicts, answers = zip(*verifier.verify_many(responses, [gold] * len(responses)))
        columns = [table["sample"], [v.value for v in verdicts], answers, table["tokens"], table["finish_reason"]]
        parts.append(pa.table(columns, schema=SCHEMA))
    write_table(score_path(store, problem), pa.concat_tables(parts), {"basis": basis})
