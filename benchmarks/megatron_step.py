"""One step of RAPO and of GRPO through verl's engine at real shapes with random weights: seconds and peak memory.

    python benchmarks/megatron_step.py                                    # 3B on one 141 GiB card, Megatron, TP = 1
    python benchmarks/megatron_step.py --recipe qwen2.5_3b_rapo_fsdp2

NEVER RUN ON A GPU by us: no number of it is known. What has been run is its code, on a processor and the toy:

    python benchmarks/megatron_step.py --recipe toy_rapo_cpu --model runs/toy/base0/model --sequences 8 --prompt 8
        --response 16 --rounds 1

Same worker, engine and batch for both: log-prob pass, reference pass (RAPO's at a temperature per sample) and one
update (RAPO's loss, or verl's with low_var_kl). There is no rollout; the tokens are random.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from rapo_verl.method.config import rapo_config_from
from rapo_verl.run.compose import compose_config

OFF = {"forward_kl": {"coef": 0.0}, "reference": {"phi_min": 1.0}}


def random_checkpoint(shape: str, folder: Path) -> Path:
    """Write a checkpoint of a published shape with random bf16 weights and a byte-level tokenizer."""
    from transformers import AutoModelForCausalLM

    from rapo_verl.plan.model import config_of
    from rapo_verl.toy.base_model import build_tokenizer

    config = config_of(shape)
    config.architectures = ["Qwen2ForCausalLM"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


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


def one_step(actor: Any, reference: Any, batch: TensorDict) -> dict[str, float]:
    """Return the seconds of each stage."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.device import get_torch_device
    from verl.workers.utils.padding import response_from_nested

    seconds, data = {}, batch.copy()

    def timed(stage: str, call: Any, **settings: Any) -> Any:
        tu.assign_non_tensor(data, temperature=1.0, **settings)
        get_torch_device().synchronize()
        start = time.perf_counter()
        out = call(data.copy())
        get_torch_device().synchronize()
        seconds[stage] = time.perf_counter() - start
        return out

    out = timed("old_log_prob", actor.compute_log_prob, calculate_entropy=True, compute_loss=False)
    data["old_log_probs"] = response_from_nested(out["log_probs"], data["response_mask"])
    out = timed("ref", reference.compute_ref_log_prob, calculate_entropy=False, compute_loss=False)
    data["ref_log_prob"] = response_from_nested(out["log_probs"], data["response_mask"])
    size = len(data)
    timed(
        "update_actor", actor.update_actor, calculate_entropy=True, compute_loss=True, global_batch_size=size,
        mini_batch_size=size, epochs=1, seed=0, dataloader_kwargs={"shuffle": False},
    )  # fmt: skip
    return {**seconds, "step": sum(seconds.values())}


def main() -> None:
    """Build the workers once, alternate the methods, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="qwen2.5_3b_rapo")
    parser.add_argument("--shape", default="Qwen/Qwen2.5-3B", help="random weights of this shape")
    parser.add_argument("--model", help="a checkpoint folder instead")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--response", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": "29655"}.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_checkpoint(args.shape, Path(folder))
        config = compose_config([f"experiment={args.recipe}", f"actor_rollout_ref.model.path={model}", *args.overrides])
        if config.trainer.device == "cpu":
            os.environ["VERL_PLATFORM"] = "cpu"
        elif config.actor_rollout_ref.actor.strategy == "megatron":
            config.actor_rollout_ref.actor.megatron.tensor_model_parallel_size = 1
            config.actor_rollout_ref.ref.megatron.tensor_model_parallel_size = 1
        measure(config, random_batch(args.sequences, args.prompt, args.response), args.rounds)


def measure(config: Any, batch: TensorDict, rounds: int) -> None:
    """Run the rounds and print medians, the first step of each method left out."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.device import get_torch_device
    from verl.workers.utils.losses import ppo_loss

    from rapo_verl.training.worker import RapoWorker

    group = config.actor_rollout_ref
    reference, actor = RapoWorker(group, "ref"), RapoWorker(group, "actor")
    reference.init_model()
    actor.init_model()
    on, rapo_loss = actor.rapo, actor.loss_fn
    grpo = OmegaConf.merge(group.actor, {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "kl_loss_coef": 1e-4})
    methods = {
        "GRPO": (rapo_config_from(OFF), partial(ppo_loss, config=omega_conf_to_dataclass(grpo))),
        "RAPO": (on, rapo_loss),
    }
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, (rapo, loss) in methods.items():
            reference.rapo = rapo
            actor.actor.set_loss_fn(loss)
            step = one_step(actor, reference, batch)
            if number > 0:
                steps[name].append(step)
    print(f"{'median seconds':16}" + "".join(f"{name:>9}" for name in methods) + "  RAPO/GRPO")
    for stage in steps["RAPO"][0]:
        times = {name: statistics.median(step[stage] for step in steps[name]) for name in methods}
        print(f"{stage:16}" + "".join(f"{t:9.3f}" for t in times.values()) + f"{times['RAPO'] / times['GRPO']:11.3f}")
    print(f"peak GiB allocated, both methods: {get_torch_device().max_memory_allocated() / (1 << 30):.1f}")


if __name__ == "__main__":
    main()
