"""Checkpoints are complete or absent, and none is ever lost silently."""

import json
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from rapo_verl import Refused
from rapo_verl.run import checkpoints
from rapo_verl.run.checkpoints import (
    choose,
    damage,
    finish,
    identity,
    read_checkpoints,
    retain,
)
from rapo_verl.run.compose import compose_config
from rapo_verl.run.export import exported

WANTED = {"model": "m", "data": "d", "world": "2 ranks, fsdp2"}


@pytest.fixture(autouse=True)
def umask():
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def make(root, step, *, whole=True, ranks=2, **facts):
    folder = root / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    for rank in range(ranks):
        torch.save(torch.arange(100.0), folder / "actor" / f"model_world_size_{ranks}_rank_{rank}.pt")
    (root / checkpoints.TRACKER).write_text(str(step))
    if whole:
        finish(folder, step, {**WANTED, **facts})
    return folder


def test_newest_complete_is_chosen_and_newer_incomplete_set_aside(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 4)
    make(tmp_path, 6, whole=False)  # veRL's tracker already names it
    step, said = choose(tmp_path, WANTED)
    assert step == 4 and (tmp_path / checkpoints.TRACKER).read_text() == "4"
    assert (tmp_path / "global_step_6.incomplete").is_dir() and not (tmp_path / "global_step_6").exists()
    assert any("set aside as global_step_6.incomplete" in line for line in said)
    assert choose(tmp_path, WANTED) == (4, [])


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_damaged_newest_gives_way_to_the_one_before(tmp_path, how):
    make(tmp_path, 2)
    shard = make(tmp_path, 4) / "actor" / "model_world_size_2_rank_1.pt"
    shard.unlink() if how == "deleted" else os.truncate(shard, 100)
    step, said = choose(tmp_path, WANTED)
    assert step == 2 and "rank_1.pt" in said[-1]


def test_no_checkpoint_is_a_start_and_an_unfinished_first_one_is_said(tmp_path):
    assert choose(tmp_path, WANTED) == (0, [])
    make(tmp_path, 2, whole=False)
    step, said = choose(tmp_path, WANTED)
    assert step == 0 and "starting from the first step" in said[-1]
    assert not (tmp_path / checkpoints.TRACKER).exists()


def test_empty_tracker_is_mended(tmp_path):
    # veRL truncates it before it writes.
    make(tmp_path, 2)
    (tmp_path / checkpoints.TRACKER).write_text("")
    assert choose(tmp_path, WANTED)[0] == 2 and (tmp_path / checkpoints.TRACKER).read_text() == "2"


def test_tracker_of_a_missing_folder_is_refused(tmp_path):
    make(tmp_path, 2)
    (tmp_path / checkpoints.TRACKER).write_text("8")
    with pytest.raises(Refused, match=r"names step 8, but .*global_step_8 is gone.*2 are complete"):
        choose(tmp_path, WANTED)


def test_nothing_but_damaged_checkpoints_is_refused(tmp_path):
    os.truncate(make(tmp_path, 2) / "actor" / "model_world_size_2_rank_0.pt", 1)
    with pytest.raises(Refused, match=r"no checkpoint .* is whole"):
        choose(tmp_path, WANTED)
    assert (tmp_path / "global_step_2").is_dir()


@pytest.mark.parametrize("key", ["model", "data", "world"])
def test_checkpoint_of_another_run_is_refused(tmp_path, key):
    make(tmp_path, 2)
    with pytest.raises(Refused, match=f"its {key} is .*, this run's is other"):
        choose(tmp_path, {**WANTED, key: "other"})


def test_shards_that_another_node_wrote_elsewhere_are_missed(tmp_path):
    make(tmp_path, 2, ranks=1)
    with pytest.raises(Refused, match="1 shards of 2 ranks"):
        choose(tmp_path, WANTED)


@pytest.mark.parametrize("which", ["root", "file"])
def test_folder_that_others_can_write_is_refused(tmp_path, which):
    folder = make(tmp_path, 2)
    (tmp_path if which == "root" else folder / "actor" / "model_world_size_2_rank_0.pt").chmod(0o777)
    with pytest.raises(Refused, match="chmod -R go-w"):
        choose(tmp_path, WANTED)


def test_retention_counts_the_disk_and_spares_the_one_resumed_from(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    make(tmp_path, 10, whole=False)
    assert retain(tmp_path, 2, never=2) == [4]
    assert [found.step for found in read_checkpoints(tmp_path)] == [2, 6, 8, 10]
    assert retain(tmp_path, None, never=0) == []


def test_a_run_that_went_back_keeps_and_goes_on_from_what_it_saved_since(tmp_path):
    for step in (6, 8, 2, 4):
        make(tmp_path, step)
    assert choose(tmp_path, WANTED) == (4, [])
    assert retain(tmp_path, 2, never=0) == [6, 8]
    assert [found.step for found in read_checkpoints(tmp_path)] == [2, 4]


def test_save_over_a_checkpoint_that_was_left_counts_when_it_is_finished_only(tmp_path):
    (make(tmp_path, 4) / "data.pt").write_bytes(b"of another world")
    checkpoints.make_room(tmp_path, 4)
    make(tmp_path, 4, whole=False)  # killed; its shards are as large as those that were there
    (found,) = read_checkpoints(tmp_path)
    assert not found.complete and not (found.folder / "data.pt").exists()


def test_save_that_would_fill_the_disk_is_not_begun(tmp_path, monkeypatch):
    checkpoints.make_room(tmp_path, 2)  # the first has nothing to go by
    make(tmp_path, 2)
    checkpoints.make_room(tmp_path, 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(Refused, match=r"No space left .* 0 MiB free.*Step 2 is saved"):
        checkpoints.make_room(tmp_path, 4)


def test_flipped_byte_is_found_by_verify_and_not_by_size(tmp_path):
    shard = make(tmp_path, 2) / "actor" / "model_world_size_2_rank_0.pt"
    raw = bytearray(shard.read_bytes())
    at = raw.index(torch.arange(100.0).numpy().tobytes()) + 40
    raw[at] ^= 1
    shard.write_bytes(raw)
    (found,) = read_checkpoints(tmp_path)
    assert found.complete and "rank_0.pt is damaged" in damage(found)[0]


@pytest.mark.parametrize("name", ["__0_0.distcp", "model.safetensors", "common.bin"])
def test_flipped_byte_of_a_file_without_checksums_of_its_own_is_found(tmp_path, name):
    folder = make(tmp_path, 2, whole=False)
    (folder / "actor" / name).write_bytes(bytes(1000))
    finish(folder, 2, WANTED)
    (found,) = read_checkpoints(tmp_path)
    assert damage(found) == []
    (folder / "actor" / name).write_bytes(bytes(999) + b"1")
    assert f"{name} is damaged" in damage(found)[0]


def test_retention_of_none_or_less_keeps_all_as_verl_does(tmp_path):
    for step in (2, 4):
        make(tmp_path, step)
    assert retain(tmp_path, -1, never=0) == retain(tmp_path, 0, never=0) == []


def test_identity_changes_with_model_data_and_world(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.parquet").write_bytes(b"1")
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"path": str(tmp_path)}, "actor": {"strategy": "fsdp2"}},
            "data": {"train_files": str(tmp_path / "train.parquet")},
            "trainer": {"nnodes": 2, "n_gpus_per_node": 8},
        }
    )
    before = identity(config)
    assert before["world"] == "16 ranks, fsdp2"
    # The same ranks on other nodes are the same shards.
    config.trainer.nnodes, config.trainer.n_gpus_per_node = 4, 4
    assert identity(config) == before
    (tmp_path / "train.parquet").write_bytes(b"2")
    (tmp_path / "config.json").write_text("[]")
    config.trainer.nnodes = 1
    after = identity(config)
    assert all(after[key] != before[key] for key in before)


def test_checkpoint_that_any_megatron_layout_loads_is_not_tied_to_one():
    config = compose_config(["experiment=qwen2.5_7b_rapo", "data.train_files=[]"])
    layouts = set()
    for tensor, gpus in ((4, 8), (2, 4)):
        config.actor_rollout_ref.actor.megatron.tensor_model_parallel_size = tensor
        config.trainer.n_gpus_per_node = gpus
        layouts.add(identity(config)["world"])
    assert len(layouts) == 1
    # What veRL loads by default, and its default format of the optimizer's states, belong to one layout.
    for key, value in (("checkpoint.load_contents", ["model", "optimizer", "extra"]),
                       ("megatron.dist_ckpt_optim_fully_reshardable", False)):  # fmt: skip
        tied = config.copy()
        OmegaConf.update(tied.actor_rollout_ref.actor, key, value)
        assert identity(tied)["world"] == "8 ranks, megatron tp2 pp1 cp1"


def test_policy_is_found_under_its_hugging_face_names_where_each_engine_leaves_it(tmp_path):
    assert exported(tmp_path) is None
    for folder in ("model/huggingface", "huggingface"):  # Megatron's, FSDP's
        (tmp_path / folder).mkdir(parents=True)
        assert exported(tmp_path) != tmp_path / folder
        (tmp_path / folder / "model.safetensors").touch()
        assert exported(tmp_path) == tmp_path / folder


def test_manifest_is_the_last_file_of_a_checkpoint(tmp_path):
    folder = make(tmp_path, 2)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert max(written, key=written.get).name == checkpoints.MANIFEST
    assert json.loads((folder / checkpoints.MANIFEST).read_text())["step"] == 2
