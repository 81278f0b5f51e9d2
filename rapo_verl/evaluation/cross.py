"""How probable one model's right responses are under another: perplexity from vLLM's prompt log-probs."""

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rapo_verl import Refused
from rapo_verl.data.chat import load_tokenizer, render
from rapo_verl.evaluation.engines import EngineSpec, VllmEngine
from rapo_verl.evaluation.score import score_path
from rapo_verl.evaluation.store import Store, read_table
from rapo_verl.reward import Verdict
from rapo_verl.run.export import model_sha256
from rapo_verl.run.files import write_atomic

# Responses in flight.
WINDOW = 64


def right_responses(store: Store, problem: int, count: int, seed: int) -> tuple[list[int], list[str]]:
    """Return numbers and texts of up to ``count`` right samples of a problem, chosen at random."""
    verdicts = read_table(score_path(store, problem), ["verdict"])["verdict"].to_numpy(zero_copy_only=False)
    right = np.flatnonzero(verdicts == Verdict.correct.value)
    rng = np.random.default_rng((seed, problem))
    chosen = sorted(rng.choice(right, size=min(count, len(right)), replace=False).tolist())
    size, paths = store.manifest["shard"], store.shards_of(problem)
    texts = {shard: store.read(paths[shard], ["text"])["text"] for shard in sorted({i // size for i in chosen})}
    return chosen, [texts[i // size][i % size].as_py() for i in chosen]


async def _log_probs(engine: VllmEngine, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
    """Return the sum of log pi(token) over each response, nats."""
    room = asyncio.Semaphore(WINDOW)

    async def one(prompt: list[int], response: list[int]) -> float:
        async with room:
            return math.fsum((await engine.prompt_logprobs([*prompt, *response]))[len(prompt) - 1 :])

    return list(await asyncio.gather(*(one(*pair) for pair in zip(prompts, responses))))


def cross_logprob(store: Store, model: Path, out: Path, *, per_problem: int = 32, seed: int = 0) -> dict[str, Any]:
    """Write and return log-prob and perplexity of right responses under another model.

    The response is the stored text, tokenised by that model's tokenizer, without an end token.

    Args:
        store: judged; its right samples are taken.
        model: Hugging Face checkpoint that reads them.
        out: JSON file.
        per_problem: at most so many of each problem.
        seed: of the choice.
    """
    tokenizer = load_tokenizer(str(model))
    assert tokenizer is not None
    records: list[dict[str, Any]] = []
    prompts, responses = [], []
    for i, problem in enumerate(store.problems):
        chosen, texts = right_responses(store, i, per_problem, seed)
        prompt = tokenizer(render(problem["messages"], tokenizer), add_special_tokens=False)["input_ids"]
        for number, text in zip(chosen, texts):
            records.append({"problem": problem["id"], "sample": number})
            prompts.append(prompt)
            responses.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not records:
        raise Refused(f"{store.folder}: no sample is right")
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses)) + 1
    # Prompts' log-probs are not cached by prefix.
    engine = VllmEngine(EngineSpec(str(model), longest, options={"enable_prefix_caching": False}))
    try:
        found = asyncio.run(_log_probs(engine, prompts, responses))
    finally:
        engine.close()
    for record, response, log_prob in zip(records, responses, found):
        record |= {"tokens": len(response), "log_prob": log_prob, "perplexity": math.exp(-log_prob / len(response))}
    perplexities = [record["perplexity"] for record in records]
    summary = {
        "samples_of": str(store.folder),
        "under_sha256": model_sha256(model),
        "responses": len(records),
        "perplexity_median": float(np.median(perplexities)),
        "perplexity_95": float(np.quantile(perplexities, 0.95)),
        "nats_per_token": -math.fsum(found) / sum(map(len, responses)),
        "records": records,
    }
    write_atomic(out, json.dumps(summary, indent=1))
    return summary
