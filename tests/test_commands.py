"""Every command as a newcomer misuses it: one sentence that says what, exit code 2, no traceback."""

import json

import pytest
import torch
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.evaluation.spec import FORMAT, sha_of

PROBLEM = '{"question": "What is 1+1?", "answer": "2"}'


@pytest.fixture(name="rapo")
def rapo_in_a_folder(tmp_path, monkeypatch):
    """Runs `rapo ...` in a folder with some files; returns exit code and output, and lets a traceback through."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(PROBLEM)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no batch")
    torch.save({"a": torch.zeros(1)}, "other.pt")
    stated = {"format": FORMAT, "problems": 2}
    for name, manifest in (("list", []), ("short", stated | {"sha256": sha_of(stated)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / name / "problems.json").write_text("[]")
    (tmp_path / "run" / "metrics").mkdir(parents=True)

    def run(*words):
        done = CliRunner().invoke(app, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, " ".join(done.output.split())

    return run


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("data prepare absent.jsonl", "absent.jsonl: no such file; allowed: a file, or one of simplerl-8k, aime24"),
        ("data prepare empty", "empty: no such file"),
        ("data prepare problems.jsonl --out problems.jsonl", "is a file"),
        ("data prepare problems.jsonl --out problems.jsonl/sub", "problems.jsonl is no folder"),
        ("data prepare problems.jsonl --name ..", "does not begin with a dot"),
        ("data prepare problems.jsonl --max-prompt-tokens -1", "max-prompt-tokens"),
        (
            "data prepare problems.jsonl --against problems.jsonl --drop-overlap",
            "no row is left of 1: 1 overlap with --against",
        ),
        ("data show absent.parquet", "absent.parquet: no such file"),
        ("data show problems.jsonl --rows -1", "'--rows'"),
        ("data show problems.jsonl --start -1", "'--start'"),
        ("verify --file absent.jsonl", "absent.jsonl: no such file"),
        ("verify --file problems.jsonl", "got {'question'"),
        ("verify 1 2 --strictnes", "extra argument"),
        ("verify --fil problems.jsonl", "no such option: --fil"),
        ("eval score list", "format must be"),
        ("eval score short", "does not hold the 2 problems"),
        ("eval report short --out problems.jsonl", "is a file"),
        ("eval report short --out out --draws 1", "greater than or equal to 100"),
        ("reference-answers short --jobs -1", "'--jobs'"),
        ("checkpoints run --to there", "--export STEP"),
        ("watch run --once empty", "is a directory"),
        ("watch run --once problems.jsonl/page.html", "problems.jsonl is no folder"),
        ("toy make --out problems.jsonl", "is a file"),
        ("demo --out problems.jsonl/runs/demo", "problems.jsonl is no folder"),
        ("figures --out problems.jsonl/images", "problems.jsonl is no folder"),
        ("inspect-batch absent.pt", "absent.pt is not there"),
        ("inspect-batch empty", "empty is not there"),
        ("inspect-batch text.pt", "text.pt is no batch"),
        ("inspect-batch other.pt", "other.pt is no batch"),
        ("plan toy", "experiment 'toy' is not known; allowed: experiment=NAME, one of"),
        ("plan qwen2.5_7b_rapo actor_rollout_ref.actor.megatron.tensor_model_parallel_size=0", "size is 0; allowed"),
        ("plan qwen2.5_7b_rapo trainer.nnodes=many", "trainer.nnodes is 'many'; allowed"),
        ("plan qwen2.5_7b_rapo --gpus 1000000", "'--gpus'"),
        ("train experiment=toy_rapo_cpu --dryrun", "No such option: --dryrun"),
        ("train experiment=toy_rapo_cpu rapo.forward_kl.estmator=paper", "did you mean rapo.forward_kl.estimator"),
        ("train experiment=toy_rapo_cpu no.such.thing=1", "no.such.thing is no setting"),
        ("explain-kl absent.yaml", "absent.yaml is no config"),
    ],
)
def test_misuse_is_refused_in_one_sentence(rapo, command, said):
    code, output = rapo(*command.split())
    # typer breaks its lines inside a box.
    assert code == 2 and said in output.replace(" │ │ ", " ")


def test_answers_may_begin_with_a_minus(rapo):
    assert rapo("verify", "-5", "\\boxed{-5}")[0] == 0
    assert rapo("verify", "-5", "\\boxed{5}", "--strictness", "integer")[0] == 1


def test_a_page_goes_into_a_folder_that_is_made(rapo, tmp_path):
    assert rapo("watch", "run", "--once", "new/page.html")[0] == 0
    assert (tmp_path / "new" / "page.html").is_file()
