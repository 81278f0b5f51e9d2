"""The toy's models through the evaluator, with what only a toy has beside it: enumerated success probabilities."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import transformers

from rapo_verl.evaluation.engines import EngineSpec, local_fleet
from rapo_verl.evaluation.generate import Draw
from rapo_verl.evaluation.score import score
from rapo_verl.evaluation.session import generate_draws, read_plan
from rapo_verl.evaluation.spec import Sampling
from rapo_verl.evaluation.store import Store
from rapo_verl.reward import VerifierSettings
from rapo_verl.run.files import write_atomic
from rapo_verl.run.processes import end_with_parent
from rapo_verl.toy.exact import success_probabilities
from rapo_verl.toy.make import EVAL_FILE, load_problems

# A solution has 23 tokens, its end included.
MAX_RESPONSE_TOKENS = 24
# Draws: Hard is chosen on one draw of the base and every model is scored on a fresh one.
SCORED_DRAW, HARD_DRAW = 1, 2
# The base's key, the folder of its choosing draw, and the file of enumerated probabilities in a model's folder.
BASE, HARD_FOLDER, EXACT_FILE = "base", "base_hard", "exact.json"


def evaluate(models: Mapping[str, Path], toy_dir: Path, out: Path, *, n: int, limit: int) -> None:
    """Sample n times, judge and enumerate each model on the first evaluation problems; what is there is kept.

    A model's key names its folder under ``out``. `BASE` is drawn twice, from one engine.
    """
    world, problems = load_problems(toy_dir)
    for key, model in models.items():
        sampling = Sampling(max_tokens=MAX_RESPONSE_TOKENS, logprobs=False)
        plan = read_plan(str(model), [toy_dir / EVAL_FILE], sampling, n=n, draw=SCORED_DRAW, limit=limit)
        plans = {key: plan} | ({HARD_FOLDER: replace(plan, draw=HARD_DRAW)} if key == BASE else {})
        draws = [Draw(plan, Store.create(out / folder, plan)) for folder, plan in plans.items()]
        generate_draws(draws, local_fleet(EngineSpec(str(model), plan.longest)), label=key)
        for draw in draws:
            score(draw.store, VerifierSettings(strictness="integer"), jobs=1)
        if not (out / key / EXACT_FILE).exists():
            exact = success_probabilities(model, world, problems[:limit], batch_size=16)
            write_atomic(out / key / EXACT_FILE, json.dumps([float(p) for p in exact]))


def main() -> None:
    """Run as ``python -m rapo_verl.toy.evaluate``: vLLM's processes end with this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("toy_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", help="key=checkpoint")
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True)
    args = parser.parse_args()
    end_with_parent()
    transformers.utils.logging.disable_progress_bar()  # of loading 27 tensors
    models = {key: Path(path) for key, path in (text.split("=", 1) for text in args.models)}
    evaluate(models, args.toy_dir, args.out, n=args.n, limit=args.limit)


if __name__ == "__main__":
    main()
