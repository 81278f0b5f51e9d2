"""What an evaluation takes as a problem, what it refuses, and how often it counts one."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rapo_verl import Refused
from rapo_verl.evaluation.prompts import load_prompts
from rapo_verl.evaluation.spec import Problem, read_problems

QUESTION = [{"role": "user", "content": "How many?"}]


def row(number=0, **changes):
    made = {
        "data_source": "s",
        "prompt": QUESTION,
        "reward_model": {"ground_truth": "7"},
        "extra_info": {"id": f"{number}"},
    }
    return made | changes


def write(folder, rows, name="set.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "How many?"}, "prompt is a text; allowed: chat messages"),
        ({"prompt": []}, "allowed: chat messages that end with a question"),
        ({"prompt": None}, "allowed: chat messages that end with a question"),
        ({"prompt": ask("  ")}, "allowed: chat messages that end with a question"),
        ({"prompt": ["How many?"]}, "prompt has the message 'How many?'"),
        ({"prompt": [{"role": "user", "content": None}]}, "a role and a content of text alone"),
        ({"prompt": [{"content": "How many?"}]}, "a role and a content of text alone"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "content of text alone"),
        ({"reward_model": None}, "reward_model.ground_truth is None"),
        ({"reward_model": {}}, "reward_model.ground_truth is None"),
        ({"reward_model": {"ground_truth": None}}, "reward_model.ground_truth is None"),
        ({"reward_model": {"ground_truth": " "}}, "reward_model.ground_truth is ' '"),
        ({"reward_model": {"ground_truth": float("nan")}}, "reward_model.ground_truth is nan"),
        ({"reward_model": {"ground_truth": ["7"]}}, "reward_model.ground_truth is ['7']"),
        ({"reward_model": {"ground_truth": True}}, "reward_model.ground_truth is True"),
    ],
)
def test_rows_that_are_no_problem_are_refused_by_number(tmp_path, changes, words):
    path = write(tmp_path, [row(0, prompt=ask("a")), row(1, **changes)])
    with pytest.raises(Refused) as refused:
        read_problems([path])
    assert f"row 1: {words}" in str(refused.value) or words in str(refused.value).partition("row 1: ")[2]


def test_missing_columns_are_refused_in_any_row(tmp_path):
    whole = row()
    without = {key: value for key, value in whole.items() if key != "reward_model"}
    with pytest.raises(Refused, match="lacks reward_model"):
        read_problems([write(tmp_path, [whole, without])])


def test_text_parts_are_joined_and_an_integer_is_an_answer(tmp_path):
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    changes = {"prompt": [{"role": "user", "content": parts}], "reward_model": {"ground_truth": 7}}
    (problem,), _ = read_problems([write(tmp_path, [row(0, **changes)])])
    assert problem.messages == ({"role": "user", "content": "How many?"},)
    assert problem.gold == "7"


def test_an_id_of_zero_is_an_id(tmp_path):
    rows = [row(prompt=ask("a"), extra_info={"id": 5}), row(prompt=ask("b"), extra_info={"id": 0})]
    problems, _ = read_problems([write(tmp_path, rows)])
    assert [problem.id for problem in problems] == ["5", "0"]


def test_copies_of_a_question_are_one_problem(tmp_path, caplog):
    rows = [row(f"{i}-{copy}", prompt=ask(f"question {i}")) for copy in range(32) for i in range(3)]
    path = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    problems, _ = read_problems([path])
    assert [problem.id for problem in problems] == ["0-0", "1-0", "2-0"]
    assert "93 rows repeat a question; 3 problems are left" in caplog.text
    assert len(read_problems([path], limit=2)[0]) == 2


def test_one_question_with_two_answers_is_refused(tmp_path):
    rows = [row(0), row(1, reward_model={"ground_truth": "8"})]
    with pytest.raises(Refused, match="the question of '0' with another right answer: '8', there '7'"):
        read_problems([write(tmp_path, rows)])


def templated(toy_dir, folder, template):
    shutil.copytree(toy_dir / "model", folder)
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    return folder


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        (
            "{{ raise_exception('System role not supported') }}",
            r"does not take this prompt \(System role not supported\)",
        ),
        ("{{ messages[5].content }}", "does not take this prompt"),
        ("{% if %}", "does not take this prompt"),
    ],
)
def test_model_whose_template_does_not_take_the_messages_is_refused(toy_dir, tmp_path, template, words):
    turns = ({"role": "system", "content": "Think."}, *QUESTION)
    problem = Problem("p", "s", "g", "7", turns)
    with pytest.raises(Refused, match=words):
        load_prompts(templated(toy_dir, tmp_path / "model", template), [problem], 8)


def test_prompt_longer_than_the_model_names_the_problem_and_no_negative_limit(toy_dir):
    long = Problem("long one", "s", "g", "7", tuple(ask("how many " * 3000)))
    with pytest.raises(Refused) as refused:
        load_prompts(toy_dir / "model", [Problem("p", "s", "g", "7", tuple(QUESTION)), long], 8)
    assert "'long one'" in str(refused.value) and "leave it out" in str(refused.value)
    assert "lower max_tokens" not in str(refused.value)
