"""What `--model` may name: a run's folder, veRL's checkpoints of both engines, and what is said of the choice."""

import json
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from typer.testing import CliRunner
from verl.model_merger import base_model_merger

from rapo_verl import Refused
from rapo_verl.cli.evaluate import PRESETS, app
from rapo_verl.method.passk import default_ks
from rapo_verl.run import export as models
from rapo_verl.run.checkpoints import finish
from rapo_verl.run.export import checkpoint_of, exported, resolve_model
from rapo_verl.run.inspect import export_checkpoint


def save(run, step, model=None):
    """A checkpoint as a FSDP run with an export leaves it."""
    folder = run / "checkpoints" / f"global_step_{step}"
    export = folder / "actor" / "huggingface"
    if model:
        shutil.copytree(model, export)
    else:
        export.mkdir(parents=True)
        (export / "model.safetensors").write_bytes(bytes(step))
    (folder / "actor" / "model_world_size_1_rank_0.pt").write_bytes(b"shard")
    finish(folder, step, {})
    return export


def test_run_folder_stands_for_its_newest_whole_checkpoint(tmp_path):
    second, tenth = save(tmp_path, 2), save(tmp_path, 10)
    unfinished = save(tmp_path, 12).parent.parent
    (unfinished / "manifest.json").unlink()
    assert checkpoint_of(str(tmp_path)) == str(tenth.parent.parent)
    assert resolve_model(str(tmp_path)) == tenth
    (tenth / "model.safetensors").write_bytes(b"cut")
    assert resolve_model(str(tmp_path)) == second
    # Asked for by name, a checkpoint is taken as it is.
    assert resolve_model(str(unfinished)) == unfinished / "actor" / "huggingface"
    assert checkpoint_of("owner/name") == "owner/name"
    assert [path.name for path in export_checkpoint(tmp_path, 2, tmp_path / "to").iterdir()] == ["model.safetensors"]


def test_run_without_a_whole_checkpoint_is_refused_with_the_reasons(tmp_path):
    folder = save(tmp_path, 3).parent.parent
    (folder / "actor" / "model_world_size_1_rank_0.pt").unlink()
    with pytest.raises(Refused, match=r"no complete checkpoint\n.*rank_0.pt is missing"):
        resolve_model(str(tmp_path))


def test_megatron_checkpoint_is_found_where_verl_writes_it_and_merged_as_verl_asks(tmp_path, monkeypatch):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    from verl.utils.megatron_utils import get_hf_model_checkpoint_path, get_model_dist_checkpoint_path

    actor = tmp_path / "global_step_7" / "actor"
    actor.mkdir(parents=True)
    export, shards = Path(get_hf_model_checkpoint_path(str(actor))), Path(get_model_dist_checkpoint_path(str(actor)))
    (shards / "__0_0.distcp").write_bytes(b"shard")
    asked = []

    def merger(command, **_):
        asked.append(command)
        target = Path(command[command.index("--target_dir") + 1])
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"merged")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setenv("RAPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models.subprocess, "run", merger)
    assert exported(actor.parent) is None
    merged = resolve_model(str(actor.parent))
    assert (merged / "model.safetensors").read_bytes() == b"merged" and len(asked) == 1
    assert resolve_model(str(actor)) == merged and len(asked) == 1
    # veRL's own parser reads the command, and looks for the config where veRL's engine wrote it.
    monkeypatch.setattr(sys, "argv", asked[0][2:])
    monkeypatch.setattr(ArgumentParser, "error", lambda self, message: pytest.fail(message))
    read = base_model_merger.generate_config_from_args(base_model_merger.parse_args())
    assert (read.backend, read.hf_model_config_path) == ("megatron", str(export))
    (export / "model.safetensors").write_bytes(b"exported")
    assert resolve_model(str(actor.parent)) == export


def test_generate_takes_a_run_and_several_files_and_says_which_step(toy_dir, tmp_path, monkeypatch):
    save(tmp_path / "run", 1, toy_dir / "model")
    export = save(tmp_path / "run", 3, toy_dir / "model")
    shutil.copy(toy_dir / "eval.parquet", tmp_path / "other.parquet")
    started = []
    monkeypatch.setattr("rapo_verl.evaluation.session.generate_draw", lambda draw, _: started.append(draw))
    # An id is told apart by its set: give the second file's rows another one.
    import pandas as pd

    frame = pd.read_parquet(tmp_path / "other.parquet")
    frame.assign(data_source="other").to_parquet(tmp_path / "other.parquet")
    wish = ["generate", "--model", tmp_path / "run", "--data", toy_dir / "eval.parquet", tmp_path / "other.parquet"]
    wish += ["--out", tmp_path / "out", "--max-tokens", 24]
    done = CliRunner().invoke(app, [str(word) for word in wish])
    assert done.exit_code == 0, done.output
    assert "global_step_3" in done.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["notes"]["model"] == str(export.parent.parent)
    assert manifest["notes"]["weights"] == str(export)
    # The paper's protocol is the default.
    assert (manifest["n"], manifest["problems"], len(started)) == (2048, 48, 1)
    assert manifest["sampling"]["max_tokens"] == 24


def test_paper_preset_gives_the_paper_ks():
    assert default_ks(PRESETS["rapo-paper"]["n"]) == tuple(2**i for i in range(11))
