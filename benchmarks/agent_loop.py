"""CPU time of an agent loop for each sample: veRL's own worker against ours, with a server that answers at once.

    python benchmarks/agent_loop.py --prompts 32 1024 --n 8

Everything is real but the server: Ray, TransferQueue, the load balancer, the reward worker, the toy's tokenizer and
problems. The reward is an integer comparison. Prints CPU seconds (of all threads) for each sample, of the agent loop
and of the processes around it, after a first batch that is not counted.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import psutil

os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
WORKERS = {"veRL": "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopManagerTQ",
           "ours": "rapo_verl.training.rollout.SeededAgentLoopManager"}  # fmt: skip


def cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds of this process's descendants by what Ray calls them."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = (process.cmdline() or ["?"])[0].removeprefix("ray::").split(".")[0]
            found[name] = found.get(name, 0.0) + sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return found


def start(side: str, toy_dir: Path):
    """Return the manager of one side's agent loops, its config and the toy's prompts."""
    import ray
    import transfer_queue as tq
    from omegaconf import open_dict
    from verl.experimental.reward_loop import RewardLoopManager
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.import_utils import load_class_from_fqn
    from verl.workers.rollout.llm_server import LLMServerClient
    from verl.workers.rollout.replica import TokenOutput
    from verl.workers.rollout.router import get_router_handle

    from rapo_verl.run.compose import compose_config

    config = compose_config(["experiment=toy_rapo_cpu", f"toy_dir={toy_dir}"])
    with open_dict(config):
        config.transfer_queue.enable = True
    ray.init(num_cpus=16, num_gpus=1, include_dashboard=False, log_to_driver=False)
    tq.init(config.transfer_queue)

    @ray.remote(num_cpus=0)
    class Server:
        async def generate(self, request_id, *, prompt_ids, sampling_params, **_):
            answer = [(7 * sum(prompt_ids) + 11 * i) % 20 + 5 for i in range(24)]
            return TokenOutput(token_ids=answer, log_probs=[-1.0] * len(answer), stop_reason="completed",
                               extra_fields={"global_steps": 0})  # fmt: skip

    router = get_router_handle(servers={"stand-in": Server.remote()}, router_config_path=None, full_determinism=False,
                               load_balancer_cls=None)  # fmt: skip
    manager = load_class_from_fqn(WORKERS[side], "manager").create(
        config=config,
        llm_client=LLMServerClient(config=config, load_balancer_handle=router),
        teacher_client=None,
        reward_loop_worker_handles=RewardLoopManager(config).reward_loop_worker_handles,
    )
    data = create_rl_dataset(config.data.train_files, config.data, None, None, is_train=True)
    return manager, config, data


def batch_of(data, prompts: int, step: int):
    """Return veRL's batch of the first prompts, under new uids."""
    import uuid

    import numpy as np
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.rl_dataset import collate_fn

    rows = collate_fn([data[i % len(data)] for i in range(prompts)])
    rows["uid"] = np.array([str(uuid.uuid4()) for _ in range(prompts)], dtype=object)
    batch = tu.get_tensordict(rows)
    tu.assign_non_tensor_data(batch, "global_steps", step)
    return batch


def measure(manager, data, *, prompts: int, n: int, step: int) -> tuple[float, dict[str, float]]:
    """Return wall seconds and CPU seconds by process of one batch."""
    import transfer_queue as tq

    batch = batch_of(data, prompts, step)
    uids = list(batch["uid"])
    before, started = cpu_seconds(), time.monotonic()
    tags = [{"is_prompt": True, "status": "pending", "global_steps": step} for _ in uids]
    tq.kv_batch_put(keys=uids, partition_id="train", tags=tags)
    manager.generate_sequences(batch)
    while True:
        listed = tq.kv_list("train")["train"]
        status = [listed[uid]["status"] for uid in uids]
        if "failure" in status:
            raise RuntimeError("a prompt failed; start with RAY_DEDUP_LOGS=0 and log_to_driver to see why")
        if all(state == "finished" for state in status):
            break
        time.sleep(0.5)
    wall, after = time.monotonic() - started, cpu_seconds()
    keys = [key for key, tag in listed.items() if tag.get("status") == "success"]
    if len(keys) != prompts * n:
        raise RuntimeError(f"{len(keys)} samples in the queue, {prompts * n} expected")
    tq.kv_clear(keys=[*keys, *uids], partition_id="train")
    return wall, {name: value - before.get(name, 0.0) for name, value in after.items()}


def main() -> None:
    """Measure one side, or both in processes of their own."""
    import subprocess
    import sys

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 1024])
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--toy", type=Path, help="made by `rapo toy make`; default: one whose model is not trained")
    parser.add_argument("--side", choices=WORKERS)
    given = parser.parse_args()
    if given.side is None:
        for side in WORKERS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True)
        return
    toy_dir = given.toy
    if toy_dir is None:
        from rapo_verl.toy import base_model, make
        from rapo_verl.toy.world import World

        toy_dir, world = Path(tempfile.mkdtemp()), World(0)
        make.write_problems(world, toy_dir, train=(240, 0), evaluation=(24, 99))
        base_model.pretrain(world, toy_dir / make.MODEL_DIR, seed=0, steps=1, batch_size=8, progress=False)
    manager, config, data = start(given.side, toy_dir)
    config.actor_rollout_ref.rollout.n = given.n
    measure(manager, data, prompts=8, n=given.n, step=0)
    for prompts in given.prompts:
        wall, cpu = measure(manager, data, prompts=prompts, n=given.n, step=1)
        samples = prompts * given.n
        shown = ", ".join(f"{name} {1e3 * s / samples:.2f}" for name, s in sorted(cpu.items(), key=lambda x: -x[1])[:6])
        print(f"{given.side}: {samples} samples in {wall:.1f} s; CPU ms a sample: {shown}", flush=True)


if __name__ == "__main__":
    main()
