"""One step of GRPO and of RAPO through veRL's engine at real shapes with random weights: seconds and peak memory.

    python benchmarks/megatron_step.py --seconds 240                      # 3B on one 141 GiB card, Megatron, TP = 1
    python benchmarks/megatron_step.py --recipe qwen2.5_3b_rapo_fsdp2 --layers 8 --seconds 90
    python benchmarks/megatron_step.py --recipe toy_rapo_cpu --model runs/toy/base0/model --sequences 8 --prompt 8
        --response 16 --rounds 1                                          # its code, on a processor
    python benchmarks/megatron_step.py --recipe toy_rapo_cpu --model runs/toy/base0/model --sequences 256 --prompt 20
        --response 24 --rounds 9 --answers 1 8                            # RAPO and what reference answers add

One worker, one engine, one batch for every row: log-prob pass, reference pass (RAPO's at a temperature per sample) and
one update. There is no rollout; the tokens are random. Rows: GRPO (low_var_kl) by veRL's head, which is the measure,
the same by ours (rapo.head=fast), RAPO with the estimators `bounded` and `topk`. Each step is printed as it ends; the
first of a row, which compiles and allocates, is left out of the table where there is another.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from rapo_verl.method.config import RapoConfig, rapo_config_from
from rapo_verl.run.compose import compose_config
from rapo_verl.toy.base_model import random_checkpoint
from rapo_verl.toy.smoke import attention_overrides

OFF = {"forward_kl": {"coef": 0.0}, "reference": {"phi_min": 1.0}}
MEASURE = "GRPO, veRL's head"
# On a processor its own seconds: other programs' do not count.
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time
STAGES = ("old_log_prob", "ref", "update_actor", "step")


@dataclass(frozen=True)
class Row:
    """A method: RAPO's settings, the loss, and whether our head makes the log-probs of every pass."""

    rapo: RapoConfig
    loss: Callable
    own_head: bool
    # Reference answers in the update, rows of the batch itself once more.
    answers: int = 0


def random_batch(sequences: int, prompt: int, response: int) -> TensorDict:
    """Return a batch as the trainer hands it to the workers after rollout and reward; half the rewards are 1."""
    generator = torch.Generator().manual_seed(0)

    def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    lengths = torch.randint(response // 2, response + 1, (sequences,), generator=generator).tolist()
    ids = [torch.randint(3, 259, (prompt + n,), generator=generator) for n in lengths]
    scores = [torch.cat([torch.zeros(n - 1), torch.tensor([float(i % 2)])]) for i, n in enumerate(lengths)]
    return TensorDict(
        {
            "input_ids": jagged(ids),
            "position_ids": jagged([torch.arange(len(row)) for row in ids]),
            "prompts": jagged([row[:prompt] for row in ids]),
            "responses": jagged([row[prompt:] for row in ids]),
            "response_mask": jagged([torch.ones(n, dtype=torch.int64) for n in lengths]),
            "loss_mask": jagged([torch.ones(n, dtype=torch.int64) for n in lengths]),
            "rm_scores": jagged(scores),
            "advantages": jagged([torch.full((n,), 1.0 - 2 * (i % 2)) for i, n in enumerate(lengths)]),
        },
        batch_size=[sequences],
    )


def with_answers(data: TensorDict, count: int) -> TensorDict:
    """Return the batch and its first rows once more as an update has reference answers: no mask, a weight."""
    from verl.utils import tensordict_utils as tu

    from rapo_verl.training.answers import ROWS, WEIGHT

    def joined(name: str) -> torch.Tensor:
        rows = list(data[name].unbind())
        empty = name in ("response_mask", "loss_mask", "advantages")
        rows += [torch.zeros_like(row) if empty else row for row in rows[:count]]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged) if data[name].is_nested else torch.stack(rows)

    fields = {name: joined(name) for name, value in data.items() if isinstance(value, torch.Tensor)}
    fields[WEIGHT] = torch.tensor([0.0] * len(data) + [1 / count] * count)
    joined_data = TensorDict(fields, batch_size=[len(data) + count])
    tu.assign_non_tensor(joined_data, **{ROWS: count})
    return joined_data


def one_step(actor: Any, reference: Any, batch: TensorDict, answers: int = 0) -> dict[str, float]:
    """Return the seconds of each stage."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.device import get_torch_device
    from verl.workers.utils.padding import response_from_nested

    from rapo_verl.training.engine import FIELDS
    from rapo_verl.training.loss import PHI

    seconds, data = {}, batch.copy()

    def timed(stage: str, call: Any, **settings: Any) -> Any:
        tu.assign_non_tensor(data, temperature=1.0, **settings)
        get_torch_device().synchronize()
        start = CLOCK()
        out = call(data.copy())
        get_torch_device().synchronize()
        seconds[stage] = CLOCK() - start
        return out

    out = timed("old_log_prob", actor.compute_log_prob, calculate_entropy=True, compute_loss=False)
    data["old_log_probs"] = response_from_nested(out["log_probs"], data["response_mask"])
    out = timed("ref", reference.compute_ref_log_prob, calculate_entropy=False, compute_loss=False)
    data["ref_log_prob"] = response_from_nested(out["log_probs"], data["response_mask"])
    for name in (PHI, *FIELDS):
        if name in out:
            data[name] = out[name]
    size = len(data)
    if answers:
        data = with_answers(data, answers)
    timed(
        "update_actor", actor.update_actor, calculate_entropy=True, compute_loss=True, global_batch_size=size,
        mini_batch_size=size, epochs=1, seed=0, dataloader_kwargs={"shuffle": False},
    )  # fmt: skip
    return {**seconds, "step": sum(seconds.values())}


def rows_of(actor_config: Any, on: RapoConfig, answers: dict[str, int]) -> dict[str, Row]:
    """Return the methods that are compared; where there are numbers of answers, RAPO without and with those."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    from rapo_verl.training.answers import with_reference_answers
    from rapo_verl.training.loss import rapo_policy_loss

    grpo = OmegaConf.merge(actor_config, {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 1e-4})
    plain = OmegaConf.merge(actor_config, {"use_kl_loss": False})
    off, grpo_loss = rapo_config_from(OFF), partial(ppo_loss, config=omega_conf_to_dataclass(grpo))

    def rapo(estimator: str) -> Row:
        settings = replace(on, forward_kl=replace(on.forward_kl, estimator=estimator))
        return Row(settings, partial(rapo_policy_loss, config=omega_conf_to_dataclass(plain), rapo=settings), True)

    bounded = rapo("bounded")
    if answers:
        loss = partial(with_reference_answers, policy_loss=bounded.loss, coef=1.0)
        return {"RAPO bounded": bounded} | {k: replace(bounded, loss=loss, answers=n) for k, n in answers.items()}
    return {
        MEASURE: Row(off, grpo_loss, False),
        "GRPO, our head": Row(off, grpo_loss, True),
        "RAPO bounded": bounded,
        "RAPO topk": rapo("topk"),
    }


def measure(
    config: Any, batch: TensorDict, rounds: int, end: float, answers: list[int]
) -> dict[str, list[dict[str, float]]]:
    """Return seconds of the stages and peak GiB of every step of each row, made in turn until the time is up."""
    from verl.utils.device import get_torch_device

    from rapo_verl.training.worker import RapoWorker

    start, device = time.monotonic(), get_torch_device()
    group = config.actor_rollout_ref
    reference, actor = RapoWorker(group, "ref"), RapoWorker(group, "actor")
    reference.init_model()
    actor.init_model()
    print(f"models built in {time.monotonic() - start:.0f} s", flush=True)
    prompts = len(batch) // group.rollout.n
    rows = rows_of(group.actor, actor.rapo, {f"with {k} a prompt": k * prompts for k in answers})
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, row in rows.items():
            longest = max((step["step"] for taken in steps.values() for step in taken[1:]), default=0.0)
            if time.monotonic() + longest > end:
                print("the time is up")
                return steps
            reference.rapo = actor.rapo = row.rapo
            actor.actor.set_loss_fn(row.loss)
            actor.actor.engine.own_head = reference.ref.engine.own_head = row.own_head
            device.reset_peak_memory_stats()
            step = one_step(actor, reference, batch, row.answers)
            step["peak GiB"] = device.max_memory_allocated() / (1 << 30)
            steps[name].append(step)
            print(f"{name:18} {number}: " + ", ".join(f"{key} {x:.3f}" for key, x in step.items()), flush=True)
    return steps


def print_table(steps: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, and each row's step as a share of the first row's."""
    keys = (*STAGES, "peak GiB")
    print(f"\n{'median seconds':18}" + "".join(f"{key:>14}" for key in keys) + "   step ratio")
    first = None
    for name, taken in steps.items():
        if not taken:
            print(f"{name:18} no step")
            continue
        counted = taken[1:] or taken
        found = {key: statistics.median(step[key] for step in counted) for key in keys}
        first = first or found["step"]
        said = "" if taken[1:] else "   a first step"
        print(f"{name:18}" + "".join(f"{found[key]:14.3f}" for key in keys) + f"{found['step'] / first:13.3f}{said}")


def main() -> None:
    """Build the workers once, alternate the methods, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="qwen2.5_3b_rapo")
    parser.add_argument("--shape", default="Qwen/Qwen2.5-3B", help="random weights of this shape")
    parser.add_argument("--layers", type=int, help="only so many of the shape's layers")
    parser.add_argument("--model", help="a checkpoint folder instead")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--response", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no step is begun after so many")
    parser.add_argument("--answers", type=int, nargs="*", default=[], help="to each prompt, for RAPO's update")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    # As in a worker of Ray's (one processor, OMP_NUM_THREADS=1): on a busy machine more threads wait for one another.
    torch.set_num_threads(1)
    end = time.monotonic() + args.seconds
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": "29655"}.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or f"{folder}/model"
        if not args.model:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            random_checkpoint(args.shape, Path(model), layers=args.layers, device=device)
        print_table(measure(configured(args, model), random_batch(args.sequences, args.prompt, args.response),
                            args.rounds, end, args.answers))  # fmt: skip


def configured(args: argparse.Namespace, model: str) -> Any:
    """Return the recipe's config for this one process."""
    given = [f"experiment={args.recipe}", f"actor_rollout_ref.model.path={model}"]
    group = compose_config([*given, *args.overrides]).actor_rollout_ref
    if group.actor.strategy != "megatron" and torch.cuda.is_available():
        given += attention_overrides()
        # veRL 0.9.1 utils/torch_functional.py:248: its entropy in chunks, which the recipe asks for, is compiled anew
        # for each number of rows, ten seconds each; after eight of them torch gives up and runs it as it is.
        given += [f"actor_rollout_ref.{role}.fsdp_config.use_torch_compile=false" for role in ("actor", "ref")]
    config = compose_config([*given, *args.overrides])
    # Set by veRL's trainer; Megatron's learning rate asserts that there are some.
    config.actor_rollout_ref.actor.optim.total_training_steps = 4 * (args.rounds + 1)
    if config.trainer.device == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"
    elif config.actor_rollout_ref.actor.strategy == "megatron":
        config.actor_rollout_ref.actor.megatron.tensor_model_parallel_size = 1
        config.actor_rollout_ref.ref.megatron.tensor_model_parallel_size = 1
    return config


if __name__ == "__main__":
    main()
