"""Seconds to add reference answers to a step's batch, beside what veRL's queue takes for the batch itself.

    python benchmarks/answers.py --prompts 1024 --n 8 --tokens 1000

Everything is real (Ray, TransferQueue, `AnswerRows`) but the rows: random tokens with the fields of an update. Each of
the prompts has eight answers, all of which join. "batch": a put and a get of all rows' fields, once; a step makes
several of each. Prints medians over the rounds, by the clock and of all its processes' processor time, which other
programs of the machine do not change; docs/benchmarks.md sets them beside a step.
"""

import argparse
import os
import time

import numpy as np
import psutil
import pyarrow as pa
import torch
from omegaconf import open_dict

from rapo_verl.run.compose import compose_config
from rapo_verl.run.reference_answers import SCHEMA, ReferenceAnswers

os.environ.setdefault("TQ_LOGGING_LEVEL", "ERROR")
PER_TOKEN = ("old_log_probs", "ref_log_prob", "advantages", "returns", "rollout_log_probs")
PROMPT = 100


def rows_of(prompts: list[torch.Tensor], n: int, tokens: int) -> list[dict]:
    """Return a batch's rows in the fields that an update reads, responses of ``tokens`` tokens give or take a half."""
    rows, generator = [], np.random.default_rng(0)
    for number, prompt in enumerate(prompts):
        for length in generator.integers(tokens // 2, tokens * 3 // 2, n):
            response = torch.from_numpy(generator.integers(0, 150_000, length))
            row = {"prompts": prompt, "responses": response, "input_ids": torch.cat([prompt, response])}
            row |= {name: torch.rand(length) for name in PER_TOKEN}
            row["position_ids"] = torch.arange(len(row["input_ids"]))
            row["loss_mask"] = row["response_mask"] = torch.ones(length, dtype=torch.int64)
            rows.append(row | {"phi": torch.tensor(1.0), "index": torch.tensor(number)})
    return rows


def answers_of(prompts: list[torch.Tensor], tokens: int) -> ReferenceAnswers:
    """Return eight distinct right answers to every prompt."""
    generator = np.random.default_rng(1)
    right = [[generator.integers(0, 150_000, tokens, np.int32) for _ in range(8)] for _ in prompts]
    none: list = [[] for _ in prompts]
    columns = [[p.numpy() for p in prompts], right, [[1] * 8 for _ in prompts], none, none]
    return ReferenceAnswers({}, pa.table(columns, schema=SCHEMA), limit=tokens, weight_of_wrong=0.0)


def now() -> np.ndarray:
    """Return the clock and the processor seconds of this process and all that it started."""
    tree = (psutil.Process(), *psutil.Process().children(recursive=True))
    return np.array([time.perf_counter(), sum(sum(process.cpu_times()[:2]) for process in tree)])


def main() -> None:
    """Measure and print."""
    import ray
    import transfer_queue as tq
    from transfer_queue import KVBatchMeta
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    from rapo_verl.training.answers import AnswerRows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = compose_config(["experiment=toy_rapo_answers_cpu"])
    with open_dict(config):
        config.transfer_queue.enable = True
        config.actor_rollout_ref.actor.ppo_mini_batch_size = args.prompts // 4
        config.actor_rollout_ref.rollout.n = args.n
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    tq.init(config.transfer_queue)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 150_000, (PROMPT,), generator=generator) for _ in range(args.prompts)]
    rows = rows_of(prompts, args.n, args.tokens)
    adding = AnswerRows(answers_of(prompts, args.tokens), config)
    fields = list_of_dict_to_tensordict(rows)
    times: dict[str, list[np.ndarray]] = {"batch: put": [], "batch: get": [], "answers: add": []}
    for number in range(args.rounds):
        keys = [f"{number}p{i // args.n}_{i % args.n}_0" for i in range(len(rows))]
        lengths = [(len(row["responses"]), len(row["input_ids"])) for row in rows]
        tags = [{"prompt_len": PROMPT, "response_len": response, "seq_len": whole} for response, whole in lengths]
        start = now()
        tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
        put = now()
        tq.kv_batch_get(keys=keys, partition_id="train", select_fields=list(fields.keys()))
        got = now()
        batch = KVBatchMeta(keys=keys, tags=tags, partition_id="train", fields=list(fields.keys()))
        mixed, metrics = adding.added(batch, number, dp_size=8)
        added = now()
        for name, seconds in zip(times, (put - start, got - put, added - got)):
            times[name].append(seconds)
        tq.kv_clear(keys=mixed.keys, partition_id="train")
        print(f"round {number}: {len(mixed) - len(batch)} rows of answers to {metrics}", flush=True)
    for name, seconds in times.items():
        clock, processor = np.median(seconds, axis=0)
        print(f"{name:14}{clock:8.2f} s, of processors {processor:8.2f} s")
    ray.shutdown()


if __name__ == "__main__":
    main()
