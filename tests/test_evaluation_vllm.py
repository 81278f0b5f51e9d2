"""The evaluator on real vLLM and Ray: kills, lost engines, log-probs, and veRL's checkpoints."""

import asyncio
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rapo_verl import Refused
from rapo_verl.evaluation.engines import CPU_ENVIRONMENT, EngineSpec, RayEngine, ray_fleet
from rapo_verl.evaluation.generate import Draw, EngineLostError
from rapo_verl.evaluation.session import generate_draw, read_plan
from rapo_verl.evaluation.spec import Sampling
from rapo_verl.evaluation.store import Store
from rapo_verl.run.export import resolve_model

SHARDED = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
model, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
state = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in load_file(model / "model.safetensors").items()}
torch.save(state, out / "model_world_size_1_rank_0.pt")
(out / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 1}')
"""


def command(*arguments):
    return [sys.executable, "-m", "rapo_verl.cli", "eval", *map(str, arguments)]


def assert_exact(folder, n, problems):
    store = Store.open(folder)
    for problem in range(problems):
        numbers = [i for path in store.shards_of(problem) for i in store.read(path)["sample"].to_pylist()]
        assert numbers == list(range(n))


def gone(processes, seconds):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.slow
def test_killed_generation_goes_on_and_leaves_no_engine(toy_dir, tmp_path):
    out = tmp_path / "base"
    wish = command(
        "generate", "--model", toy_dir / "model", "--data", toy_dir / "eval.parquet", "--out", out, "--n", 320,
        "--max-tokens", 24, "--shard", 32, "--limit", 12,
    )  # fmt: skip
    for _ in range(2):
        before = len(list(out.rglob("*.parquet")))
        process = subprocess.Popen(wish, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.rglob("*.parquet"))) < before + 3 and process.poll() is None:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(children) >= 2  # vLLM's core among them
        assert gone(children, 30)
    done = subprocess.run(wish, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_exact(out, 320, 12)
    # Judged and read back by another model: here the same, whose log-probs are known from a plain forward pass.
    subprocess.run(command("score", out, "--strictness", "integer"), check=True)


@pytest.mark.slow
def test_killed_ray_engine_is_replaced_and_two_share_the_queue(toy_dir, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr("rapo_verl.evaluation.generate.POLL_S", 0.5)
    sampling = Sampling(max_tokens=24)
    plan = read_plan(str(toy_dir / "model"), [toy_dir / "eval.parquet"], sampling, n=1024, shard=32, limit=12)
    draw = Draw(plan, Store.create(tmp_path / "base", plan))
    ray.init(num_cpus=3, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        fleet = ray_fleet(EngineSpec(plan.notes["weights"], plan.longest), "auto", engines=2)
        started = []

        def watched(alive):
            fresh = fleet(alive)
            started.extend(fresh)
            # As soon as there is work done, one of the two is killed, as a node that goes down would.
            if len(started) == 2 and len(list((tmp_path / "base").rglob("*.parquet"))) > 2:
                ray.kill(started[0]._handle)
            return fresh

        generate_draw(draw, watched)
    finally:
        ray.shutdown()
    assert len(started) == 3
    assert_exact(tmp_path / "base", 1024, 12)


@pytest.mark.slow
def test_verl_fsdp_checkpoint_is_merged_once_by_verl(toy_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPO_CACHE", str(tmp_path / "cache"))
    actor = tmp_path / "global_step_7" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    for path in (toy_dir / "model").glob("*.j*"):
        (actor / "huggingface" / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-c", SHARDED, str(toy_dir / "model"), str(actor)], check=True)
    merged = resolve_model(str(tmp_path / "global_step_7"))
    stamp = (merged / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(actor)) == merged
    assert (merged / "model.safetensors").stat().st_mtime_ns == stamp
    want, got = load_file(toy_dir / "model" / "model.safetensors"), load_file(merged / "model.safetensors")
    for name, tensor in want.items():
        # veRL's merger writes bfloat16: 8 significant bits.
        torch.testing.assert_close(got[name].float(), tensor, rtol=2**-8, atol=1e-6)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"no checkpoint")
    with pytest.raises(Refused, match="veRL's merger failed"):
        resolve_model(str(actor))


def test_guard_kills_what_is_named_when_its_parent_is_killed():
    code = (
        "import subprocess, sys, time, psutil\n"
        "from rapo_verl.evaluation.guard import guard\n"
        "named, other = (subprocess.Popen(['sleep', '60']) for _ in range(2))\n"
        "guard([psutil.Process(named.pid)])\n"
        "print(named.pid, other.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    named, other = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert gone([named], 30)
        assert other.is_running()
    finally:
        other.kill()


def test_every_loss_that_ray_reports_loses_the_engine_but_a_fault_of_ours_is_raised():
    from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError

    def outcome(error):
        async def fails(_):
            raise error

        engine = RayEngine(types.SimpleNamespace(sample=types.SimpleNamespace(remote=fails)), capacity=1)
        try:
            asyncio.run(engine.sample(None))
        except Exception as raised:
            return type(raised)

    lost = EngineLostError("vLLM's core died")
    # Memory that runs out is no RayActorError: seen on a full machine.
    for error in (ActorDiedError(), NodeDiedError("gone"), OutOfMemoryError("full"), RayTaskError("f", "", lost)):
        assert outcome(error) is EngineLostError
    assert outcome(RayTaskError("f", "", ValueError("a bug"))) is RayTaskError


def test_engine_defaults_keep_the_checkpoint_from_changing_the_sampling():
    arguments = EngineSpec("m", 10, options={"max_num_seqs": 7}).arguments()
    assert arguments["generation_config"] == "vllm"
    assert arguments["enable_prefix_caching"] is True
    assert (arguments["max_num_seqs"], EngineSpec("m", 10, options={"max_num_seqs": 7}).capacity) == (7, 14)
    assert set(CPU_ENVIRONMENT) >= {"OMP_NUM_THREADS"}
