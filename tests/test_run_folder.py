"""A run's folder: what may differ when a run goes on in it, one process at a time, and no epoch lost on the way."""

import fnmatch
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, create_rl_sampler

from rapo_verl import Refused
from rapo_verl.reward.verdict import VerifierSettings
from rapo_verl.run import launch, lock
from rapo_verl.run.compose import compose_config
from rapo_verl.run.folder import MAY_DIFFER, changes_of, differences, enter, metrics_path, read_metrics
from rapo_verl.run.inputs import too_few_epochs
from rapo_verl.run.lock import NoLocksHereError, claimed, held
from rapo_verl.run.preflight import problems_of
from rapo_verl.run.values import leaves

ROLLOUT, ACTOR, MEGATRON, FSDP = (
    "actor_rollout_ref.rollout",
    "actor_rollout_ref.actor",
    "qwen2.5_7b_rapo",
    "qwen2.5_7b_rapo_fsdp2",
)

# --- what may differ ---


@functools.cache
def composed(experiment):
    return compose_config([f"experiment={experiment}", "run_dir=/run", "trainer.total_training_steps=50"])


def config_in(folder, override=None, experiment=FSDP):
    """Return an experiment's config; composing takes seconds, so an override is put into a copy."""
    config = composed(experiment).copy()
    config.run_dir, config.trainer.default_local_dir = str(folder), f"{folder}/checkpoints"
    if override:
        key, _, value = override.partition("=")
        OmegaConf.update(config, key.lstrip("+"), yaml.safe_load(value), force_add=True)
    return config


REMEDIES = [
    "trainer.nnodes=4",
    "trainer.n_gpus_per_node=4",
    f"{ROLLOUT}.tensor_model_parallel_size=2",
    f"{ROLLOUT}.gpu_memory_utilization=0.4",
    f"{ROLLOUT}.max_num_seqs=64",
    f"{ROLLOUT}.enforce_eager=true",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu=20480",
    f"{ACTOR}.ppo_max_token_len_per_gpu=12000",
    f"{ACTOR}.fsdp_config.optimizer_offload=true",
    f"{ACTOR}.ulysses_sequence_parallel_size=2",
    f"{ACTOR}.entropy_from_logits_with_chunking=false",
    "actor_rollout_ref.model.enable_activation_offload=true",
    "reward.num_workers=16",
    "+reward.custom_reward_function.reward_kwargs.verifier.deadline_s=20",
    "+trainer.v1.sampler.sampler_kwargs.max_failed_share=0.3",
    "trainer.rollout_data_dir=/scratch/rollouts",
    "trainer.total_training_steps=60",
    "trainer.save_freq=5",
    "trainer.logger=[console,wandb]",
    "data.val_files=/data/other.parquet",
    f"{ROLLOUT}.val_kwargs.n=4",
    "survival.stall_minutes=null",
    "ray_kwargs.ray_init.num_cpus=64",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=2",
    "rapo.head=verl",
]
LAYOUTS = [
    f"{ACTOR}.megatron.tensor_model_parallel_size=2",
    f"{ACTOR}.megatron.pipeline_model_parallel_size=2",
    f"{ACTOR}.megatron.context_parallel_size=2",
    f"{ACTOR}.megatron.sequence_parallel=false",
    f"{ACTOR}.megatron.param_offload=true",
    f"{ACTOR}.megatron.override_transformer_config.recompute_granularity=selective",
]


@pytest.mark.parametrize(
    ("experiment", "override"),
    [(FSDP, remedy) for remedy in REMEDIES] + [(MEGATRON, layout) for layout in LAYOUTS],
)
def test_where_and_how_fast_a_run_goes_on_may_differ(experiment, override):
    may, may_not = differences(composed(experiment), config_in("/run", override, experiment))
    assert list(may) == [override.partition("=")[0].lstrip("+")] and not may_not


@pytest.mark.parametrize(
    "override",
    [
        f"{ACTOR}.optim.lr=1e-6",
        f"{ACTOR}.ppo_mini_batch_size=128",
        f"{ACTOR}.clip_ratio=0.3",
        f"{ACTOR}.loss_agg_mode=seq-mean-token-mean",
        f"{ACTOR}.fsdp_config.model_dtype=bf16",
        f"{ROLLOUT}.n=16",
        f"{ROLLOUT}.temperature=0.9",
        f"{ROLLOUT}.calculate_log_probs=false",
        "data.train_batch_size=512",
        "data.train_files=/data/other.parquet",
        "data.max_response_length=4096",
        "data.seed=2",
        "data.dataloader_num_workers=2",
        "actor_rollout_ref.model.path=Qwen/Qwen2.5-3B",
        "actor_rollout_ref.model.lora_rank=16",
        "algorithm.adv_estimator=rloo",
        "reward.custom_reward_function.name=other",
        "+reward.custom_reward_function.reward_kwargs.verifier.strictness=lenient",
        "trainer.v1.trainer_mode=rapo_colocate_async",
        "rapo.forward_kl.coef=0.1",
        "rapo.reference.phi_min=0.5",
    ],
)
def test_what_is_learnt_may_not_change_within_a_run(override):
    may, may_not = differences(composed(FSDP), config_in("/run", override))
    assert list(may_not) == [override.partition("=")[0].lstrip("+")] and not may


def test_a_run_that_goes_on_notes_what_has_changed(tmp_path):
    enter(config_in(tmp_path), {}, 0)
    config = config_in(tmp_path, "trainer.nnodes=4")
    changed = changes_of(config)
    enter(config, changed, 7)
    assert not changes_of(config)
    (note,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert note["step"] == 7 and note["changed"] == {"trainer.nnodes": [2, 4]} and abs(note["time"] - time.time()) < 60


def test_another_run_s_folder_and_what_differs_are_named(tmp_path):
    enter(config_in(tmp_path), {}, 0)
    with pytest.raises(Refused, match=r"1 key\(s\) that decide on what is learnt:\n  data.seed: 1 there, 2 here"):
        changes_of(config_in(tmp_path, "data.seed=2"))


def test_a_moved_folder_is_the_same_run(tmp_path):
    (tmp_path / "run").mkdir()
    enter(config_in(tmp_path / "run"), {}, 0)
    assert not changes_of(config_in((tmp_path / "run").rename(tmp_path / "elsewhere")))


def test_every_pattern_names_a_key_that_there_is():
    keys = {key for name in (MEGATRON, FSDP) for key, _ in leaves(OmegaConf.to_container(composed(name)))}
    keys |= {"trainer.v1.sampler.sampler_kwargs.max_failed_share"}
    keys |= {f"reward.custom_reward_function.reward_kwargs.verifier.{key.name}" for key in fields(VerifierSettings)}
    patterns = " ".join(MAY_DIFFER.values()).split()
    assert [pattern for pattern in patterns if not fnmatch.filter(keys, pattern)] == []


def test_dry_run_tells_another_run_s_folder_and_a_checkpoint_that_does_not_fit(toy_dir, tmp_path):
    def toy(*overrides):
        return compose_config(["experiment=toy_rapo_cpu", f"toy_dir={toy_dir}", f"run_dir={tmp_path}", *overrides])

    enter(toy(), {}, 0)
    assert problems_of(toy("trainer.save_freq=3")) == []
    assert ["another config" in problem for problem in problems_of(toy("data.seed=5"))] == [True]
    step = tmp_path / "checkpoints" / "global_step_2"
    (step / "actor").mkdir(parents=True)
    launch.checkpoints.finish(step, 2, {**launch.checkpoints.identity(toy()), "world": "2 ranks, fsdp2"})
    (problem,) = problems_of(toy())
    assert "its world is 2 ranks, fsdp2, this run's is 1 ranks, fsdp2" in problem
    assert not (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_metrics_of_a_run_that_went_back_are_those_of_its_last_start(tmp_path):
    def start(*steps, **data):
        path = metrics_path(tmp_path)
        lines = [json.dumps({"step": step, "data": data}) for step in steps]
        path.write_text("\n".join([*lines, '{"step": 9, "da']))  # killed as it wrote
        return path.name

    assert [start(1, 2, 3, 4, x=1.0), start(0, 1, x=0.0)] == ["0000.jsonl", "0001.jsonl"]
    (tmp_path / "metrics" / "0000.jsonl").rename(tmp_path / "kept")
    assert start(1, 2, x=2.0) == "0002.jsonl"  # veRL empties what it opens
    (tmp_path / "kept").rename(tmp_path / "metrics" / "0000.jsonl")
    assert [(record["step"], record["x"]) for record in read_metrics(tmp_path)] == [(0, 0.0), (1, 2.0), (2, 2.0)]


# --- one process at a time ---

HOLD = """
import sys
from pathlib import Path
from rapo_verl.run.lock import claimed
with claimed(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture(name="holder")
def process_that_holds(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.4)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_second_training_in_a_folder_is_refused(tmp_path, holder, toy_dir):
    with pytest.raises(Refused, match="trains in"), claimed(tmp_path):
        pass  # before a training, which would run if the lock were none
    config = compose_config(["experiment=toy_rapo_cpu", f"toy_dir={toy_dir}", f"run_dir={tmp_path}"])
    with pytest.raises(Refused, match=f"process {holder.pid} on {os.uname().nodename} trains in"):
        launch.run(config)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_lock_of_an_ended_process_is_in_nobody_s_way(tmp_path, holder, end):
    holder.send_signal(end) if end else holder.stdin.close()
    holder.wait()
    with claimed(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_lock_of_a_dead_process_elsewhere_is_in_nobody_s_way(tmp_path, impatient, capsys):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": 9}).ljust(200))
    with claimed(tmp_path):
        assert "held by elsewhere" in capsys.readouterr().out


def test_lock_of_a_living_process_elsewhere_is_seen_by_its_beats(tmp_path, impatient):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": 0}))
    done = threading.Event()

    def beat():
        with (tmp_path / ".lock").open("r+") as file:
            for count in range(1000):
                os.pwrite(file.fileno(), json.dumps({"host": "elsewhere", "pid": 1, "beat": count}).encode(), 0)
                if done.wait(0.02):
                    return

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Refused, match="process 1 on elsewhere trains in"), claimed(tmp_path):
        pass
    done.set()
    thread.join()


def test_without_locks_of_the_filesystem_beats_tell(tmp_path, monkeypatch, impatient, no_locks):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    with pytest.raises(NoLocksHereError), held(tmp_path / "x"):
        pass
    with claimed(tmp_path), pytest.raises(Refused, match=f"process {os.getpid()} on"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


# --- epochs ---


class Prompts(PPOTrainer):
    """veRL's own data loading and its resumption, without the models."""

    on_sample_end = on_step_end = None

    def __init__(self, rows, data):
        self.config = OmegaConf.create({"data": data})
        self.global_steps, self.train_dataloader_it = 0, None
        self.train_dataloader = StatefulDataLoader(
            dataset=[{"raw_prompt": row} for row in range(rows)],
            batch_size=data["gen_batch_size"] or data["train_batch_size"],
            num_workers=data["dataloader_num_workers"],
            drop_last=True,
            collate_fn=lambda rows: {"raw_prompt": torch.tensor([row["raw_prompt"] for row in rows])},
            sampler=create_rl_sampler(self.config.data, range(rows)),
        )

    def step(self):
        return self._next_train_batch()["raw_prompt"].tolist()


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "gen_batch_size", "shuffle", "workers"),
    [
        (8, None, True, 0),
        (8, None, False, 0),
        (10, None, True, 0),
        (10, 1, True, 0),
        (4, None, True, 0),
        (8, None, True, 2),
    ],
)
def test_resumed_at_an_epoch_s_end_no_prompt_is_skipped_or_repeated(rows, gen_batch_size, shuffle, workers, every):
    # veRL's issue 7401: its SFT trainer's loader is exhausted there, and the run ends with 0. The v1 trainers begin the
    # next epoch (trainer_base.py:1472), in the order of the run that was never stopped.
    data = {
        "train_batch_size": 4, "gen_batch_size": gen_batch_size, "shuffle": shuffle, "seed": 1,
        "dataloader_num_workers": workers,
    }  # fmt: skip
    whole, steps = Prompts(rows, data), 6
    expected = [whole.step() for _ in range(steps)]
    got, state = [], None
    while len(got) < steps:
        resumed = Prompts(rows, data)
        if state:
            resumed.train_dataloader.load_state_dict(torch.load(io.BytesIO(state), weights_only=False))
        got += [resumed.step() for _ in range(every)]
        buffer = io.BytesIO()
        torch.save(resumed.train_dataloader.state_dict(), buffer)
        state = buffer.getvalue()
    assert got[:steps] == expected


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps", "said"),
    [
        (240, 8, 30, 900, ""),
        (
            240,
            8,
            30,
            901,
            "end the run at step 900, before trainer.total_training_steps=901; set trainer.total_epochs=31",
        ),
        (10, 4, 1, 3, "set trainer.total_epochs=2"),
        (10, 4, 1, None, ""),
        (8, 8, 1, 1, ""),
    ],
)
def test_epochs_that_end_before_the_steps_are_refused(rows, batch, epochs, steps, said):
    config = OmegaConf.create(
        {
            "data": {"train_batch_size": batch, "train_max_samples": -1},
            "trainer": {"total_epochs": epochs, "total_training_steps": steps},
        }
    )
    found = too_few_epochs(config, rows)
    assert bool(found) == bool(said) and all(said in problem for problem in found)
    config.data.train_max_samples = batch
    assert bool(too_few_epochs(config, rows)) == bool(steps and steps > epochs)
