"""Problem sets: every layout, every reason to drop or refuse, and the real files where they are at hand."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rapo_verl.cli import app
from rapo_verl.data.layouts import HUB, LAYOUTS, DataError, layout_of, read_records, to_problems
from rapo_verl.data.prepare import INSTRUCTION, SCHEMA, messages, prepare, questions_of, render, show
from rapo_verl.data.validate import normalized
from rapo_verl.reward import Verifier, VerifierSettings

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published files are not at {REAL}")


@pytest.fixture(scope="module")
def verifier():
    made = Verifier(VerifierSettings(deadline_s=60))
    yield made
    made.close()


def rows(n, start=0):
    return [{"question": f"What is {i} plus one?", "answer": str(i + 1), "level": 3} for i in range(start, start + n)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def card_of(parquet):
    return json.loads(parquet.with_suffix(".card.json").read_text())


RECORDS = {
    "MATH-500 (HuggingFaceH4)": {
        "problem": "q", "solution": "s", "answer": "1", "unique_id": "t/1.json", "level": 5, "subject": "Algebra",
    },
    "MATH (hendrycks: boxed solutions)": {
        "problem": "q", "solution": "so $\\boxed{1}$", "level": "Level 5", "type": "Algebra",
    },
    "SimpleRL, indexed": {"idx": 0, "question": "q", "answer": "1", "level": 5, "subject": "Algebra"},
    "SimpleRL-Zoo (hkust-nlp; its pre-rendered prompt is not used)": {
        "question": "q", "gt_answer": "1", "level": 5, "prompt": "<|im_start|>",
    },
    "AIME (Maxwell-Jia: ID, Problem, Answer)": {"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 1},
    "id, problem, answer": {"id": "60", "problem": "q", "answer": "1", "url": "u"},
    "problem, answer": {"problem": "q", "answer": "1"},
    "question, answer": {"question": "q", "answer": "1"},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_every_layout_is_recognised_and_read(name):
    problems, layout = to_problems([RECORDS[name]], "set")
    assert layout.name == name
    assert (problems[0].question, problems[0].answer) == ("q", "1")
    assert problems[0].level in (None, 5) and problems[0].subject in (None, "Algebra") and problems[0].id
    assert (problems[0].level == 5) == ("level" in RECORDS[name])


def test_every_layout_has_an_example_and_an_unknown_one_is_named():
    assert set(RECORDS) == {layout.name for layout in LAYOUTS}
    with pytest.raises(DataError, match="no known layout has the columns bar, foo"):
        layout_of(["foo", "bar"])


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, verifier, kind):
    records, path = rows(3), tmp_path / f"set.{kind}"
    frame = pd.DataFrame(records)
    if kind == "jsonl":
        write(path, records)
    elif kind == "json":
        path.write_text(json.dumps({"data": records}))
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    out = pq.read_table(prepare(str(path), tmp_path / "out", verifier=verifier)).to_pylist()
    assert [r["reward_model"]["ground_truth"] for r in out] == ["1", "2", "3"]
    assert [r["extra_info"]["level"] for r in out] == [3] * 3
    assert {r["extra_info"]["source_sha256"] for r in out} == {hashlib.sha256(path.read_bytes()).hexdigest()}


def test_parquet_is_verls_and_the_card_tells_its_hash(tmp_path, verifier):
    path = prepare(str(write(tmp_path / "train.jsonl", rows(4))), tmp_path / "out", verifier=verifier)
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    row = table.to_pylist()[1]
    assert row["prompt"] == messages("What is 1 plus one?", "qwen-boxed")
    assert row["data_source"] == "train" and row["reward_model"] == {"style": "rule", "ground_truth": "2"}
    card = card_of(path)
    assert card["output_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["rows"] == 4 and card["by_level"] == {"3": 4} and card["by_subject"] == {"none": 4}
    assert card["output_sha256"] in path.with_suffix(".card.md").read_text()


def test_preparing_twice_gives_the_same_bytes(tmp_path, verifier):
    source = write(tmp_path / "train.jsonl", rows(50))
    paths = [prepare(str(source), tmp_path / name, verifier=verifier) for name in ("a", "b")]
    for suffix in (".parquet", ".card.json", ".card.md"):
        assert paths[0].with_suffix(suffix).read_bytes() == paths[1].with_suffix(suffix).read_bytes()


def test_prompt_is_qwen_boxed_and_wrapped_once():
    text = render(messages("Q?", "qwen-boxed"), None)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ?\nPlease reason step by step, "
        "and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_dropped_rows_are_named_with_their_reason(tmp_path, verifier):
    records = rows(6)
    records[1]["answer"] = "  "
    records[2]["answer"] = None
    records[3] = dict(records[0])
    records += [
        {"question": "Which?", "answer": "1", "level": 3},
        {"question": "Which?", "answer": "2", "level": 3},
        {"question": "Unbalanced?", "answer": "\\frac{1}{2", "level": 3},
        {"question": "", "answer": "2", "level": 3},
    ]
    path = prepare(str(write(tmp_path / "train.jsonl", records)), tmp_path / "out", verifier=verifier)
    reasons = {d["row"]: d["reason"] for d in card_of(path)["dropped"]}
    assert reasons.keys() == {1, 2, 3, 6, 7, 8, 9}
    assert reasons[1] == reasons[2] == "empty answer" and reasons[3] == "same question as row 0"
    assert "different answers ('1', '2')" in reasons[6] and "does not equal itself" in reasons[8]
    assert reasons[9] == "empty question"
    assert [r["extra_info"]["row"] for r in pq.read_table(path).to_pylist()] == [0, 4, 5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "the \x0crac{1}{2}"}, "U+000C"),
        ({"question": "a\x00b"}, "U+0000"),
        ({"answer": "\x0crac12"}, "answer has control"),
        ({"question": "lost \ufffd"}, "U+FFFD"),
        ({"question": "<|im_start|>user\nWhat?"}, "a prompt already"),
        ({"question": "What?" + INSTRUCTION}, "a prompt already"),
    ],
)
def test_corrupt_row_refuses_the_file_and_writes_nothing(tmp_path, verifier, change, said):
    records = rows(3)
    records[1] |= change
    with pytest.raises(DataError) as error:
        prepare(str(write(tmp_path / "train.jsonl", records)), tmp_path / "out", verifier=verifier)
    assert said in str(error.value) and "row 1 (" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_suspect_rows_refuse_an_evaluation_set_and_are_named_in_a_training_set(tmp_path, verifier):
    records = rows(300)
    records[1]["question"] = "The \triangle ABC?"
    records[2]["question"] = "\\begin{cases} x \\ y \\end{cases}?"
    training = card_of(prepare(str(write(tmp_path / "t.jsonl", records)), tmp_path / "out", verifier=verifier))
    assert [d["row"] for d in training["suspect_but_kept"]] == [1, 2] and training["rows"] == 300
    with pytest.raises(DataError, match=r"(?s)row 1 .*U\+0009 before 'riangle'.*row 2 .*row breaks lost"):
        prepare(str(write(tmp_path / "math500.jsonl", records)), tmp_path / "out", verifier=verifier)
    few = [records[1], *rows(10)]
    with pytest.raises(DataError, match="row 0"):
        prepare(str(write(tmp_path / "few.jsonl", few)), tmp_path / "out", verifier=verifier)


def test_aime_answers_become_canonical_integers(tmp_path, verifier):
    answers = ["025", "336^\\circ", " 7 ", "$12$", "0"]
    records = [{"id": f"2025-I-{i}", "problem": f"P{i}?", "answer": a} for i, a in enumerate(answers, 1)]
    path = prepare(str(write(tmp_path / "aime25.jsonl", records)), tmp_path / "out", verifier=verifier)
    got = [r["reward_model"]["ground_truth"] for r in pq.read_table(path).to_pylist()]
    assert got == ["25", "336", "7", "12", "0"]


@pytest.mark.parametrize(
    ("identity", "answer", "said"),
    [
        ("2024-I-8", "480", "the right one is 197"),
        ("aime2024-I-8", "480", "the right one is 197"),
        ("2025-I-1", "1000", "no integer in 0..999"),
        ("2025-I-1", "\\frac12", "no integer in 0..999"),
        ("2025-I-1", "", "empty answer"),
    ],
)
def test_wrong_aime_key_is_refused(tmp_path, verifier, identity, answer, said):
    source = write(tmp_path / "aime.jsonl", [{"ID": identity, "Problem": "P?", "Answer": answer}])
    with pytest.raises(DataError) as error:
        prepare(str(source), tmp_path / "out", verifier=verifier)
    assert said in str(error.value) and identity in str(error.value)


def test_right_aime_key_of_the_same_problem_passes(tmp_path, verifier):
    source = write(tmp_path / "aime.jsonl", [{"ID": "2024-I-8", "Problem": "P?", "Answer": 197}])
    assert prepare(str(source), tmp_path / "out", verifier=verifier).exists()


def test_overlap_is_refused_or_dropped_and_found_in_prepared_files_too(tmp_path, verifier):
    held_out = write(tmp_path / "test.jsonl", [{"question": "WHAT is $1$  plus one", "answer": "2", "level": 1}])
    prepared = prepare(str(held_out), tmp_path / "held", verifier=verifier)
    source = str(write(tmp_path / "train.jsonl", rows(3)))
    for against in (held_out, prepared):
        with pytest.raises(DataError, match=rf"row 1 .* is also {against.name}, row 0"):
            prepare(source, tmp_path / "out", against=[against], verifier=verifier)
        path = prepare(source, tmp_path / "out", against=[against], drop_overlap=True, verifier=verifier)
        assert [d["row"] for d in card_of(path)["dropped"]] == [1]


def test_normalised_questions_keep_what_makes_them_different():
    assert normalized("What is $1.5$?") == normalized("what is 1.5") != normalized("What is 15?")
    assert normalized("a \\left( x \\right)") == normalized("a (x)") and normalized("x+1") != normalized("x-1")


def test_prompts_over_the_limit_in_tokens_are_dropped(tmp_path, verifier, toy_dir):
    records = rows(3)
    records[1]["question"] = "Add one. " * 100
    source = str(write(tmp_path / "train.jsonl", records))
    model = str(toy_dir / "model")
    path = prepare(source, tmp_path / "out", model=model, max_prompt_tokens=400, verifier=verifier)
    card = card_of(path)
    assert [d["row"] for d in card["dropped"]] == [1] and "more than 400" in card["dropped"][0]["reason"]
    assert card["token_limit"] == "400 tokens of model"
    shown = show(path, model=model, rows=1, start=0)[0]
    assert "What is 0 plus one?" in shown and "tokens" in shown and shown.count("put your final answer") == 1


def test_show_prints_what_the_model_sees(tmp_path, verifier):
    path = prepare(str(write(tmp_path / "train.jsonl", rows(3))), tmp_path / "out", verifier=verifier)
    # In this process: pyarrow's threads were once seen to abort a command at its exit, its output complete.
    done = CliRunner().invoke(app, ["data", "show", str(path), "--rows", "1", "--start", "2"])
    assert done.exit_code == 0, done.output
    assert render(messages("What is 2 plus one?", "qwen-boxed"), None) in done.stdout and "answer '3'" in done.stdout
    with pytest.raises(DataError, match="not in veRL's layout"):
        show(tmp_path / "train.jsonl", model=None, rows=1, start=0)


def test_command_refuses_with_exit_code_two(tmp_path):
    source = write(tmp_path / "train.jsonl", [{"question": "a\x00", "answer": "1"}])
    done = CliRunner().invoke(app, ["data", "prepare", str(source), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "U+0000" in done.stderr and not (tmp_path / "out").exists()


def test_unreadable_files_are_named(tmp_path):
    for name, content in (("a.jsonl", "{"), ("b.parquet", "PAR"), ("c.txt", "x"), ("d.json", "[]"), ("e.csv", "a\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_records(tmp_path / name)
    with pytest.raises(DataError, match="absent"):
        read_records(tmp_path / "absent.jsonl")


def test_named_sets_are_the_published_ones():
    rows_of = {name: source.rows for name, source in HUB.items()}
    assert rows_of == {"simplerl-8k": 8523, "aime24": 30, "aime25": 30, "math500": 500}


@needs_real
@pytest.mark.parametrize("year", ["2024", "2025"])
def test_real_aime_is_whole(tmp_path, verifier, year):
    card = card_of(prepare(str(REAL / f"aime{year}.jsonl"), tmp_path, verifier=verifier))
    assert card["rows"] == 30 and card["dropped"] == []


@needs_real
def test_corrupt_aime_is_refused_naming_its_problems(tmp_path, verifier):
    with pytest.raises(DataError) as error:
        prepare(str(REAL / "aime2025_corrupt_fixture.jsonl"), tmp_path, verifier=verifier)
    for identity in ("I-11", "II-4", "II-5", "II-13"):
        assert f"(aime2025-{identity})" in str(error.value)
    # Not known before: its align* lost the row break, as I-11's cases did.
    assert "(aime2025-I-8)" in str(error.value) and len(str(error.value).splitlines()) == 5
    assert not list(tmp_path.iterdir())


@needs_real
@pytest.mark.slow
def test_real_training_set_has_8520_problems(tmp_path, verifier):
    against = [REAL / "aime2024.jsonl", REAL / "aime2025.jsonl"]
    card = card_of(prepare(str(REAL / "simplerl8k_train_8523.jsonl"), tmp_path, against=against, verifier=verifier))
    assert card["rows"] == 8520
    assert {d["row"]: d["reason"] for d in card["dropped"]} == {
        4007: "same question as row 1769", 5054: "empty answer", 5158: "empty answer",
    }  # fmt: skip
    assert sum(card["by_level"].values()) == 8520 and card["layout"] == "SimpleRL, indexed"
    assert len(questions_of(against[0])) == 30
