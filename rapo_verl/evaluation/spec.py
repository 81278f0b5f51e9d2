"""What one evaluation samples: model, problems, sampling, seeds; all of it in the manifest of its folder."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from rapo_verl import Refused
from rapo_verl.data.sources import iter_records
from rapo_verl.run.files import file_sha256
from rapo_verl.run.seeds import sampling_seed

logger = logging.getLogger(__name__)

FORMAT = "rapo_verl.evaluation/1"
# Samples of one shard: enough that a file is worth its overhead, few enough that a kill costs little.
SHARD = 128


@dataclass(frozen=True)
class Problem:
    """One problem: its id in the set, where it comes from, its group, right answer and chat messages."""

    id: str
    source: str
    group: str
    gold: str
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    # Tokens of a response, its end included.
    max_tokens: int = 8192
    # Besides the end tokens that the model's own files name.
    stop_token_ids: tuple[int, ...] = ()
    # Keep each response's cumulative log-prob: nats, of the model's own distribution (temperature 1, no top-p).
    logprobs: bool = True
    # Keep each response's tokens: what `rapo reference-answers` needs.
    token_ids: bool = False


class Shard(NamedTuple):
    """A file of samples, the `number`-th of a problem: `samples` of them from the `first` on, under one seed."""

    problem: int
    number: int
    first: int
    samples: int
    seed: int


@dataclass(frozen=True)
class SamplingPlan:
    """One draw of n samples of each problem from one model.

    Attributes:
        model: sha256 of the checkpoint's files.
        data: file name to sha256.
        prompts: token ids of each problem's prompt.
        draw: number of the draw; another draw of a model has other seeds everywhere.
        shard: samples of one shard; the last of a problem may have fewer.
        versions: of what turns a seed into a text.
        notes: what else to keep, not compared: "model" as asked for (of a run, its newest checkpoint), "weights", the
            folder with its Hugging Face checkpoint, commit and date.
    """

    model: str
    data: dict[str, str]
    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    n: int
    draw: int
    sampling: Sampling
    shard: int
    versions: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise Refused with every fault at once."""
        drawn, ids = self.sampling, {problem.id for problem in self.problems}
        checks = [
            (0 <= drawn.temperature < inf, f"temperature is {drawn.temperature}; allowed: a finite number >= 0"),
            (0 < drawn.top_p <= 1, f"top_p is {drawn.top_p}; allowed: (0, 1]"),
            (drawn.max_tokens >= 1, f"max_tokens is {drawn.max_tokens}; allowed: >= 1"),
            (min(self.n, self.shard) >= 1, f"n is {self.n} and shard {self.shard}; allowed: at least 1"),
            (bool(ids), "there is no problem"),
            (len(ids) == len(self.problems), "two problems have one id; is a file given twice?"),
        ]
        faults = [fault for ok, fault in checks if not ok]
        if not faults:
            seeds = sorted(shard.seed for shard in self.shards)
            # vLLM gives child i of a request the seed s + i.
            if any(b - a < self.shard for a, b in pairwise(seeds)):
                faults.append(f"two shards would share seeds in draw {self.draw}; take another draw")
        if faults:
            raise Refused(faults)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards; first shards of all problems first, so that a part of the work already covers every problem."""
        return tuple(
            Shard(problem, first // self.shard, first, min(self.shard, self.n - first), self._seed(problem, first))
            for first in range(0, self.n, self.shard)
            for problem in range(len(self.problems))
        )

    def _seed(self, problem: int, first: int) -> int:
        return sampling_seed("evaluation", self.model, self.draw, self.problems[problem].id, first)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response."""
        return max(map(len, self.prompts)) + self.sampling.max_tokens

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What a folder of samples says of itself, as JSON holds it; two plans are one if this is equal."""
        stated = {
            "format": FORMAT,
            "model_sha256": self.model,
            "data_sha256": self.data,
            "problems": len(self.problems),
            "prompts_sha256": prompts_sha256(self.prompts),
            "n": self.n,
            "draw": self.draw,
            "shard": self.shard,
            "sampling": asdict(self.sampling),
            "seeds": 'rapo_verl.seeds.sampling_seed("evaluation", model_sha256, draw, problem id, first sample) + i',
            "versions": self.versions,
        }
        return json.loads(json.dumps(stated))

    @cached_property
    def sha(self) -> str:
        """Sha256 of the manifest; every shard carries it."""
        return sha_of(self.manifest)


def read_problems(files: Sequence[Path], limit: int | None = None) -> tuple[tuple[Problem, ...], dict[str, str]]:
    """Return the problems of veRL parquet files (`rapo data prepare`), of each the first, and the files' sha256.

    A question that a file repeats is one problem. An id is the row's own; with several files the set's name stands
    before it. The group is the subject, or with several files the set.
    """
    problems: list[Problem] = []
    faults: list[str] = []
    data = {}
    for path in files:
        try:
            records, data[path.name] = list(iter_records(path)), file_sha256(path)
            problems += _distinct(path, records, len(files) > 1)[:limit]
        except Refused as error:
            faults += error.problems
    if len(data) < len(files) and not faults:
        faults.append(f"file names must differ; got {', '.join(str(path) for path in files)}")
    if faults:
        raise Refused(faults)
    return tuple(problems), data


def _distinct(path: Path, records: list[dict[str, Any]], several: bool) -> list[Problem]:
    """Return each problem of a file once, in order; Refused with the first three faults of its rows.

    Some sets hold every problem 32 times, for engines that sample once: as problems of their own they would make every
    interval too narrow.
    """
    missing = [column for column in ("prompt", "reward_model") if not all(column in row for row in records)]
    if missing:
        raise Refused(f"{path}: lacks {', '.join(missing)}; make it with `rapo data prepare`")
    problems: dict[str, Problem] = {}
    faults: list[str] = []
    for row, record in enumerate(records):
        try:
            problem = _problem(record, row, path, several)
            known = problems.setdefault(json.dumps(problem.messages), problem)
            if known.gold != problem.gold:
                another = f"the question of {known.id!r} with another right answer"
                raise Refused(f"{another}: {problem.gold!r}, there {known.gold!r}")
        except Refused as error:
            faults.append(f"{path}, row {row}: {error}")
    if faults:
        more = [f"{path}: {len(faults) - 3} more rows like these"] if len(faults) > 3 else []
        raise Refused(faults[:3] + more)
    copies = len(records) - len(problems)
    if copies:
        logger.warning("%s: %d rows repeat a question; %d problems are left", path, copies, len(problems))
    return list(problems.values())


def _problem(record: dict[str, Any], row: int, path: Path, several: bool) -> Problem:
    extra = record.get("extra_info") or {}
    source = str(record.get("data_source") or path.stem)
    number = extra.get("id")
    name = str(row if number is None else number)
    turns = record["prompt"]
    if isinstance(turns, str):
        raise Refused("prompt is a text; allowed: chat messages, which `rapo data prepare` makes of it")
    messages = []
    for turn in turns or ():
        content = _text(turn.get("content")) if isinstance(turn, dict) else None
        if content is None or not isinstance(turn.get("role"), str):
            raise Refused(f"prompt has the message {turn!r}; allowed: a role and a content of text alone")
        messages.append({"role": turn["role"], "content": content})
    if not messages or not messages[-1]["content"].strip():
        raise Refused(f"prompt is {turns!r}; allowed: chat messages that end with a question")
    gold = (record["reward_model"] or {}).get("ground_truth")
    # A number that a table made of a text may have lost what the text said: 027, 1e5, nan.
    if isinstance(gold, bool) or not isinstance(gold, str | int) or not str(gold).strip():
        raise Refused(f"reward_model.ground_truth is {gold!r}; allowed: the right answer as text, or an integer")
    return Problem(
        id=f"{source}/{name}" if several else name,
        source=source,
        group=source if several else str(extra.get("subject") or source),
        gold=str(gold),
        messages=tuple(messages),
    )


def _text(content: Any) -> str | None:
    """Return the text of a message's content: itself, or that of its parts if each is text; else None."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part["text"] if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]


def prompts_sha256(prompts: Sequence[Sequence[int]]) -> str:
    """Return the sha256 of prompts as token ids."""
    return sha_of([list(prompt) for prompt in prompts])


def sha_of(value: Any) -> str:
    """Return the sha256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
