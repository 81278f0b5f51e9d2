"""pass@k during training: unbiased where veRL's own best@N is not, through veRL's own validation."""

import inspect
import subprocess
import sys
import types

import numpy as np
import pytest
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from rapo_verl.method.passk import pass_at_k
from rapo_verl.run.folder import read_metrics
from rapo_verl.training.alarms import Groups, group_metrics
from rapo_verl.training.trainer import TRAINERS, validation_pass_at_k

N = 16


def batch(counts):
    uids = [f"u{i}" for i, _ in enumerate(counts) for _ in range(N)]
    correct = [float(j < c) for c in counts for j in range(N)]
    return ["aime24"] * len(uids), uids, correct


def test_validation_pass_at_k_is_the_unbiased_estimate():
    counts = [0, 1, 5, 16]
    found = validation_pass_at_k(*batch(counts), N)
    assert found.pop("val/problems/aime24") == 4
    assert list(found) == [f"val/pass@k/aime24/{k}" for k in (1, 2, 4, 8, 16)]
    for k in (1, 2, 4, 8, 16):
        assert found[f"val/pass@k/aime24/{k}"] == pytest.approx(pass_at_k(counts, N, k).mean(), abs=1e-15)


def test_missing_and_failed_responses_count_as_wrong():
    found = validation_pass_at_k(["s"] * 3, ["u"] * 3, [1.0, None, 0.0], 4)
    assert found == {"val/problems/s": 1.0, "val/pass@k/s/1": 0.25, "val/pass@k/s/2": 0.5, "val/pass@k/s/4": 1.0}


def test_verl_best_at_k_differs_from_the_unbiased_estimate():
    sources, uids, correct = batch([1])
    theirs = process_validation_metrics(sources, uids, {"acc": correct})["aime24"]["acc"]["best@8/mean"]
    ours = validation_pass_at_k(sources, uids, correct, N)["val/pass@k/aime24/8"]
    assert ours == pytest.approx(0.5, abs=1e-15)
    # veRL draws 8 of the 16 with replacement, 1000 times: expectation 1 - (15/16)^8 = 0.403, five standard errors 0.08.
    assert theirs == pytest.approx(1 - (1 - 1 / N) ** 8, abs=0.08)
    assert theirs < ours


def test_trainer_adds_pass_at_k_to_verl_metrics():
    trainer = object.__new__(TRAINERS["sync"])
    rollout = types.SimpleNamespace(val_kwargs=types.SimpleNamespace(n=N))
    trainer.config = types.SimpleNamespace(actor_rollout_ref=types.SimpleNamespace(rollout=rollout))
    sources, uids, correct = batch([1, 4])
    turns = np.array([2] * len(uids))
    infos = {"reward": [2 * c - 1 for c in correct], "acc": correct}  # a reward that is no success
    found = PPOTrainer._val_metrics_update(trainer, sources, uids, infos, turns)
    ours = trainer._val_metrics_update(sources, uids, infos, turns)
    assert ours == found | validation_pass_at_k(sources, uids, correct, N)
    assert any(key.startswith("val-core/") for key in ours)


def test_verl_validation_still_ends_in_the_method_we_override():
    assert "return self._val_metrics_update(" in inspect.getsource(PPOTrainer._validate)
    parameters = list(inspect.signature(PPOTrainer._val_metrics_update).parameters)
    assert parameters[:4] == ["self", "data_sources", "sample_uids", "reward_extra_infos_dict"]


@pytest.mark.slow
def test_validation_of_a_real_run_logs_pass_at_k(toy_dir, tmp_path):
    command = [
        sys.executable, "-m", "rapo_verl.cli", "train", "experiment=toy_rapo_cpu", f"toy_dir={toy_dir}",
        f"run_dir={tmp_path}", "trainer.total_training_steps=1", "trainer.test_freq=1", "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.val_kwargs.n=8", "actor_rollout_ref.rollout.val_kwargs.do_sample=true",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = {key: value for step in read_metrics(tmp_path) for key, value in step.items()}
    ours = {int(key.split("/")[-1]): value for key, value in metrics.items() if key.startswith("val/pass@k/eval/")}
    assert list(ours) == [1, 2, 4, 8]
    assert sorted(ours.values()) == list(ours.values())
    # The one statistic on which resampling and the unbiased estimate agree.
    assert ours[1] == pytest.approx(metrics["val-core/eval/acc/mean@8"])


def test_training_groups_are_counted_at_every_power_of_two_and_at_n():
    groups = Groups([4, 2, 9], [0, 2, 6], [6, 6, 6])
    found = group_metrics(groups)
    assert list(found) == [*(f"rapo/groups/pass@{k}" for k in (1, 2, 4, 6)), "rapo/groups/all_right"]
    for k in (1, 2, 4, 6):
        assert found[f"rapo/groups/pass@{k}"] == pytest.approx(pass_at_k([0, 2, 6], 6, k).mean(), abs=1e-15)
    assert found["rapo/groups/all_right"] == pytest.approx(1 / 3)
    # An answer that is missing shortens its group, and the largest k with it.
    assert list(group_metrics(Groups([4, 2], [0, 2], [6, 5])))[3] == "rapo/groups/pass@5"
