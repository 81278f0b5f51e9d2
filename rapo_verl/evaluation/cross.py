"""How probable one model's right responses are under another: perplexity from vLLM's prompt log-probs."""

import asyncio
import json
import math
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


def cross_logprob(store: Store, model: Path, out: Path, *, per_problem: int = 32, seed: int = 0) -> dict[str, Any]:
    """Write as JSON, and return, log-prob and perplexity of right responses under another Hugging Face checkpoint.

    The response is the stored text, tokenised by that model's tokenizer, without an end token; of each problem at most
    ``per_problem`` of a judged folder's right samples, chosen at random.
    """
    tokenizer: Any = load_tokenizer(str(model))
    records: list[dict[str, Any]] = []
    pairs: list[tuple[list[int], list[int]]] = []
    for i, problem in enumerate(store.problems):
        right = np.flatnonzero([v == Verdict.correct for v in read_table(score_path(store, i))["verdict"].to_pylist()])
        rng = np.random.default_rng((seed, i))
        chosen = sorted(rng.choice(right, size=min(per_problem, len(right)), replace=False).tolist())
        prompt = tokenizer(render(problem["messages"], tokenizer), add_special_tokens=False)["input_ids"]
        for number, text in zip(chosen, store.texts(i, chosen)):
            records.append({"problem": problem["id"], "sample": number})
            pairs.append((prompt, tokenizer(text, add_special_tokens=False)["input_ids"]))
    if not records:
        raise Refused(f"{store.folder}: no sample is right")
    found = _log_probs(model, pairs)
    for record, (_, response), log_prob in zip(records, pairs, found):
        record |= {"tokens": len(response), "log_prob": log_prob, "perplexity": math.exp(-log_prob / len(response))}
    perplexities = [record["perplexity"] for record in records]
    summary = {
        "samples_of": str(store.folder),
        "under_sha256": model_sha256(model),
        "responses": len(records),
        "perplexity_median": float(np.median(perplexities)),
        "perplexity_95": float(np.quantile(perplexities, 0.95)),
        "nats_per_token": -math.fsum(found) / sum(record["tokens"] for record in records),
        "records": records,
    }
    write_atomic(out, json.dumps(summary, indent=1))
    return summary


def _log_probs(model: Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Return the sum of log pi(token) over each response after its prompt, nats."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs) + 1
    # Prompts' log-probs are not cached by prefix.
    engine = VllmEngine(EngineSpec(str(model), longest, options={"enable_prefix_caching": False}))

    async def one(prompt: list[int], response: list[int]) -> float:
        return math.fsum((await engine.prompt_logprobs([*prompt, *response]))[len(prompt) - 1 :])

    async def every() -> list[float]:
        return list(await asyncio.gather(*(one(*pair) for pair in pairs)))

    try:
        return asyncio.run(every())
    finally:
        engine.close()
