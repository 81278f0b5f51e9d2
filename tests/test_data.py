"""Problem sets: every layout, every reason to drop or refuse, and the real files where they are at hand."""

import hashlib
import json
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rapo_verl import Refused
from rapo_verl.cli import app
from rapo_verl.data.chat import INSTRUCTION, messages, render
from rapo_verl.data.layouts import to_problems
from rapo_verl.data.overlap import HeldOut, aime_keys, normalized
from rapo_verl.data.prepare import SCHEMA, held_out, prepare, show
from rapo_verl.data.sources import HUB, iter_records
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


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
VERL = "{} Let's think step by step and output the final answer within \\boxed{{}}."


def verl_row(prompt, gold, **extra):
    return {"data_source": "x", "prompt": prompt, "reward_model": {"style": "rule", "ground_truth": gold}, **extra}


# Rows in the manner of published sets, and what must be read of them: question, answer, level, subject.
ROWS = {
    "MATH-500": (
        {"problem": "q", "solution": "s", "answer": "1", "unique_id": "t/1.json", "level": 5, "subject": "Algebra"},
        ("q", "1", 5, "Algebra"),
    ),
    "MATH": (
        {"problem": "q", "solution": "so $\\boxed{1}$", "level": "Level 5", "type": "Algebra"},
        ("q", "1", 5, "Algebra"),
    ),
    "MATH, level unknown": ({"problem": "q", "solution": "\\boxed{1}", "level": "Level ?"}, ("q", "1", None, None)),
    "SimpleRL": (
        {"idx": 0, "question": "q", "answer": "1", "level": 5, "subject": "Algebra"},
        ("q", "1", 5, "Algebra"),
    ),
    "SimpleRL-Zoo": ({"question": "q", "gt_answer": "1", "level": 5, "prompt": "<|im_start|>"}, ("q", "1", 5, None)),
    "AIME": ({"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 1}, ("q", "1", None, None)),
    "id, problem, answer": ({"id": "60", "problem": "q", "answer": "1", "url": "u"}, ("q", "1", None, None)),
    "question, answer": ({"question": "q", "answer": "1"}, ("q", "1", None, None)),
    "prompt, answer": ({"prompt": "q", "answer": "1"}, ("q", "1", None, None)),
    "None, which MATH has": ({"question": "q", "answer": "None"}, ("q", "None", None, None)),
    "GSM8K": ({"question": "q", "answer": "2+3=<<2+3=5>>5 apples.\n#### 1,005"}, ("q", "1,005", None, None)),
    "Minerva": ({"question": "q", "answer": ["9.6\n"]}, ("q", "9.6", None, None)),
    "a list as text": ({"question": "q", "answer": "['9.6\\n']"}, ("q", "9.6", None, None)),
    "a boxed answer": ({"question": "q", "answer": "$\\boxed{\\frac12}$"}, ("q", "\\frac12", None, None)),
    "float that is whole, level 3.0": ({"question": "q", "answer": 145.0, "level": 3.0}, ("q", "145", 3, None)),
    "float": ({"question": "q", "answer": 0.5, "level": "3.0"}, ("q", "0.5", 3, None)),
    "23 digits of level": ({"question": "q", "answer": 1, "level": 10**23}, ("q", "1", None, None)),
    "e-notation": ({"question": "q", "answer": "6.63e-34"}, ("q", "6.63\\times10^{-34}", None, None)),
    "e-notation of a number": ({"question": "q", "answer": 1e33}, ("q", "1\\times10^{33}", None, None)),
    "OlympiadBench": (
        {"id": 1, "question": "q", "final_answer": ["$1$"], "is_multiple_answer": False, "subfield": "A"},
        ("q", "$1$", None, "A"),
    ),
    "OlympiadBench, several answers": (
        {"question": "q", "final_answer": ["1", "2"], "is_multiple_answer": True, "context": "c."},
        ("c. q", "1, 2", None, None),
    ),
    "SVAMP": (
        {"ID": "c-1", "Body": "Has 5.", "Question": "q?", "Answer": 145.0, "Type": "Sum"},
        ("Has 5. q?", "145", None, "Sum"),
    ),
    "ASDiv": ({"body": "Seven.", "question": "q?", "answer": "9 (apples)"}, ("Seven. q?", "9", None, None)),
    "AQuA": (
        {"question": "q", "options": ["A)21", "B)21.5"], "rationale": "r", "correct": "B"},
        ("q\n(A) 21\n(B) 21.5", "B", None, None),
    ),
    "AGIEval": (
        {"passage": None, "question": "q", "options": ["(A)1/2", "(B)2"], "label": "B", "answer": None},
        ("q\n(A) 1/2\n(B) 2", "B", None, None),
    ),
    "SAT": ({"question": "q", "options": "A) 2 B) 4", "Answer": "B"}, ("q\nA) 2 B) 4", "B", None, None)),
    "MMLU": (
        {"question": "q", "choices": ["x", "y"], "answer": 1, "subject": "algebra"},
        ("q\n(A) x\n(B) y", "B", None, "algebra"),
    ),
    "ARC": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "y"},
        ("q\n(A) x\n(B) y", "B", None, None),
    ),
    "MathQA": (
        {"Problem": "q", "Rationale": "r", "options": "a ) 38 , b ) 27.5", "correct": "a"},
        ("q\na ) 38 , b ) 27.5", "A", None, None),
    ),
    "ARC, its own column": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        ("q\n(1) x\n(2) y", "2", None, None),
    ),
    "a decimal of parquet": ({"question": "q", "answer": Decimal("1.50")}, ("q", "1.50", None, None)),
    "MMLU as csv": (
        {"question": "q", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "C"},
        ("q\n(A) x\n(B) y\n(C) z\n(D) w", "C", None, None),
    ),
    "NuminaMath": ({"source": "s", "problem": "q", "solution": "so \\boxed{1}"}, ("q", "1", None, None)),
    "NuminaMath 1.5": ({"problem": "q", "solution": "s", "answer": "1", "problem_type": "A"}, ("q", "1", None, "A")),
    "OpenMathReasoning": ({"problem": "q", "expected_answer": "1"}, ("q", "1", None, None)),
    "DAPO": (verl_row([{"role": "user", "content": DAPO.format("q")}], "1"), ("q", "1", None, None)),
    "veRL's example": (
        verl_row([{"role": "system", "content": "s"}, {"role": "user", "content": VERL.format("q")}], 1),
        ("q", "1", None, None),
    ),
    "veRL's layout, a list of one as text": (
        verl_row([{"role": "user", "content": "q"}], '["34"]', extra_info={"index": 3, "level": 2}),
        ("q", "34", 2, None),
    ),
    "veRL's layout, prompt as text": (verl_row("q" + INSTRUCTION, "1"), ("q", "1", None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_is_read(name):
    row, (question, answer, level, subject) = ROWS[name]
    (problem,), layouts = to_problems([row], "set")
    assert problem.fault is None and problem.id and layouts.total() == 1
    assert (problem.question, problem.answer, problem.level, problem.subject) == (question, answer, level, subject)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": True}, "answer is neither text nor a number: True"),
        ({"answer": {"value": 1}}, "answer is neither text nor a number"),
        ({"answer": ["1", "2"]}, "answer is a list; which of them counts is not said"),
        ({"answer": [True]}, "answer is neither text nor a number"),
        ({"answer": "['1', "}, "a list that cannot be read"),
        ({"answer": "2 and 3 make <<2+3=5>>5 apples"}, "a whole solution"),
        ({"answer": "word " * 30}, "a whole solution"),
        ({"answer": "1", "image": {"bytes": "x"}}, "needs an image"),
        ({"question": "What is <image_1>?", "answer": "1"}, "needs an image"),
        ({"answer": "7", "choices": ["1", "2"]}, "answer is none of its choices: '7'"),
        ({"answer": 2, "choices": ["1", "2", "3"]}, "answer is several of its choices: 2"),
        ({"question": 5, "answer": "1"}, "question is no text: 5"),
        ({"problem": "q", "question": None, "solution": "no box"}, "no box in its solution"),
        (verl_row([{"role": "user", "content": [{"type": "image"}]}], "1"), "neither a text nor messages"),
        (verl_row([{"role": r, "content": "q"} for r in ("user", "assistant", "user")], "1"), "several turns"),
    ],
)
def test_row_that_cannot_be_used_says_why(row, said):
    problem = to_problems([{"question": "q"} | row], "set")[0][0]
    assert said in "".join(problem.fault) and (problem.question, problem.answer) == ("", "")


@pytest.mark.parametrize("answer", [float("nan"), None, "", " ", "nan", "null", [], "proof", ["NaN"]])
def test_no_answer_is_none_of_these_words(answer):
    assert to_problems([{"question": "q", "answer": answer}], "set")[0][0].answer == ""


def test_rows_of_several_layouts_are_each_read_and_an_unknown_file_is_named():
    mixed = [{"question": "a"}, {"problem": "b", "answer": "2"}, {"question": "c", "answer": "3", "problem": None}]
    problems, layouts = to_problems(mixed, "set")
    assert [(p.question, p.answer) for p in problems] == [("", ""), ("b", "2"), ("c", "3")]
    assert "no known columns: question" in "".join(problems[0].fault) and len(layouts) == 2
    with pytest.raises(Refused, match=r"(?s)no known columns: bar, foo.*question, answer"):
        to_problems([{"foo": 1, "bar": 2}], "set")


def test_ids_without_ids_are_of_the_question_and_not_of_the_place():
    one, other = (to_problems(records, "set")[0] for records in (rows(3), rows(3)[::-1]))
    assert {p.id: p.question for p in one} == {p.id: p.question for p in other} and len({p.id for p in one}) == 3


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
    with pytest.raises(Refused) as error:
        prepare(str(write(tmp_path / "train.jsonl", records)), tmp_path / "out", verifier=verifier)
    assert said in str(error.value) and "row 1 (" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_suspect_rows_refuse_an_evaluation_set_and_are_named_in_a_training_set(tmp_path, verifier):
    records = rows(300)
    records[1]["question"] = "The \triangle ABC?"
    records[2]["question"] = "\\begin{cases} x \\ y \\end{cases}?"
    training = card_of(prepare(str(write(tmp_path / "t.jsonl", records)), tmp_path / "out", verifier=verifier))
    assert [d["row"] for d in training["suspect_but_kept"]] == [1, 2] and training["rows"] == 300
    with pytest.raises(Refused, match=r"(?s)row 1 .*U\+0009 before 'riangle'.*row 2 .*row breaks lost"):
        prepare(str(write(tmp_path / "math500.jsonl", records)), tmp_path / "out", verifier=verifier)
    few = [records[1], *rows(10)]
    with pytest.raises(Refused, match="row 0"):
        prepare(str(write(tmp_path / "few.jsonl", few)), tmp_path / "out", verifier=verifier)


def test_aime_answers_become_canonical_integers(tmp_path, verifier):
    answers = ["025", "336^\\circ", " 7 ", "$12$", "0"]
    records = [{"id": f"2023-I-{i}", "problem": f"P{i}?", "answer": a} for i, a in enumerate(answers, 1)]
    path = prepare(str(write(tmp_path / "aime25-part.jsonl", records)), tmp_path / "out", verifier=verifier)
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
    with pytest.raises(Refused) as error:
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
        with pytest.raises(Refused, match=rf"row 1 .* is also {against.name}, row 0"):
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
    with pytest.raises(Refused, match="not in veRL's layout"):
        show(tmp_path / "train.jsonl", model=None, rows=1, start=0)


def test_command_refuses_with_exit_code_two(tmp_path):
    source = write(tmp_path / "train.jsonl", [{"question": "a\x00", "answer": "1"}])
    done = CliRunner().invoke(app, ["data", "prepare", str(source), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "U+0000" in done.stderr and not (tmp_path / "out").exists()


def test_unreadable_files_are_named(tmp_path):
    for name, content in (("a.jsonl", "{"), ("b.parquet", "PAR"), ("c.txt", "x"), ("d.json", "[]"), ("e.csv", "a\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(Refused, match=name):
            list(iter_records(tmp_path / name))
    with pytest.raises(Refused, match="absent"):
        list(iter_records(tmp_path / "absent.jsonl"))


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
    with pytest.raises(Refused) as error:
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
    assert sum(card["by_level"].values()) == 8520 and card["layout"] == "question, answer: 8523"
    assert len(held_out(against)) == 60


def prepared(tmp_path, verifier, records, name="train.jsonl", **options):
    path = prepare(str(write(tmp_path / name, records)), tmp_path / "out", verifier=verifier, **options)
    return pq.ParquetFile(path).read().to_pylist(), card_of(path)


@pytest.mark.parametrize(
    "prompt",
    [
        VERL.format("What?"), DAPO.format("What?"), "[INST] What? [/INST]", "<s> What?", "<think>\nWhat?",
        "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>", "<start_of_turn>user\nWhat?<end_of_turn>",
        "<｜User｜>What?<｜Assistant｜>", "What? Write it as \\boxed{}.", "### Instruction:\nWhat?",
    ],
)  # fmt: skip
def test_prompt_in_a_column_of_questions_is_refused(tmp_path, verifier, prompt):
    with pytest.raises(Refused, match=r"row 3 .*question is a prompt already"):
        prepared(tmp_path, verifier, [*rows(3), {"question": prompt, "answer": "1"}])


def test_a_fault_of_every_row_is_not_told_of_every_row(tmp_path, verifier):
    with pytest.raises(Refused) as error:
        prepared(tmp_path, verifier, [row | {"question": VERL.format(row["question"])} for row in rows(300)])
    assert len(error.value.problems) == 21 and "280 more rows: question is a prompt already" in error.value.problems[-1]
    with pytest.raises(Refused, match=r"no row is left of 10: 6 empty answer; 4 answer is neither text nor a number"):
        prepared(tmp_path, verifier, [row | {"answer": None if i < 6 else True} for i, row in enumerate(rows(10))])


def test_same_question_with_an_equal_answer_is_kept_once(tmp_path, verifier):
    records = [{"question": "Half?", "answer": answer} for answer in ("0.5", "\\frac12", "0.5")] + rows(2)
    table, card = prepared(tmp_path, verifier, records)
    assert [r["reward_model"]["ground_truth"] for r in table] == ["0.5", "1", "2"]
    assert [d["reason"] for d in card["dropped"]] == ["same question as row 0"] * 2


def test_copies_of_an_evaluation_set_are_no_loss(tmp_path, verifier):
    """DAPO's AIME has 32 of each."""
    records = [verl_row([{"role": "user", "content": DAPO.format(f"P{i % 30}?")}], str(i % 30)) for i in range(90)]
    table, card = prepared(tmp_path, verifier, records, "aime-2024.jsonl")
    assert len(table) == 30 and card["dropped_by_reason"] == {"same question": 60}
    assert table[3]["prompt"] == messages("P3?", "qwen-boxed")


@pytest.mark.parametrize(
    ("name", "count", "whole"), [("math500", 499, 500), ("AIME_2024", 29, 30), ("aime25-II", 16, 15)]
)
def test_part_of_a_set_does_not_pass_for_the_whole(tmp_path, verifier, name, count, whole):
    with pytest.raises(Refused, match=f"{count} problems; {name} has {whole}"):
        prepared(tmp_path, verifier, rows(count), f"{name}.jsonl")
    assert len(prepared(tmp_path, verifier, rows(count), f"{name}-part.jsonl")[0]) == count


def test_set_that_has_lost_its_choices_is_refused(tmp_path, verifier):
    records = [{"question": f"Which of them is {i}?", "answer": "ABCDE"[i % 5]} for i in range(20)]
    with pytest.raises(Refused, match="lost its choices"):
        prepared(tmp_path, verifier, records)
    shown = [row | {"question": row["question"] + " (A) 1 (B) 2 (C) 3 (D) 4 (E) 5"} for row in records]
    assert len(prepared(tmp_path, verifier, shown)[0]) == 20


LONG = (
    "Let $x$ and $y$ be real numbers with $x + y = 12$ and $\\frac{x}{y} = 3$. Find the greatest value of $x^2 + y^2$."
)


@pytest.mark.parametrize(
    "copy",
    [
        VERL.format(LONG),
        DAPO.format(LONG),
        LONG.replace("real", "re\u200bal"),
        LONG.replace("$x$", "\\(x\\)").replace("\\frac{x}{y}", "\\dfrac{x}{y}"),
        LONG.replace("numbers", "numbres"),
        LONG + " Express your answer as a decimal rounded to 2 places.",
        "Here is a riddle for you, take care. " + LONG.upper(),
        LONG.replace("Find", "Compute").replace(" be ", " are "),
    ],
)
def test_overlap_is_seen_through_wrappers_spellings_and_small_changes(copy):
    questions = HeldOut()
    questions.add("Another problem of 7 words and 12 signs.", "a")
    questions.add(LONG, "b")
    assert questions.find(copy) == "b"


@pytest.mark.parametrize("other", [LONG.replace("12", "13"), "Find the greatest value of $x^2 + y^2$.", "What?", ""])
def test_another_problem_is_no_overlap(other):
    questions = HeldOut()
    questions.add(LONG, "b")
    questions.add("What is 3 plus 4?", "c")
    assert questions.find(other) is None and questions.find("What is 4 plus 3?") is None


@needs_real
def test_aime_keys_are_those_of_the_problems_and_known_by_their_words(tmp_path, verifier):
    problems, keys = aime_keys()
    assert len(keys) == 60 and (keys["2024-I-8"], keys["2024-I-12"]) == (197, 385)
    for year in ("2024", "2025"):
        for record in iter_records(REAL / f"aime{year}.jsonl"):
            name = record["id"].removeprefix("aime")
            assert problems.find(record["problem"]) == name and keys[name] == int(record["answer"])
    records = list(iter_records(REAL / "aime2024.jsonl"))
    wrong = [{"problem": r["problem"], "answer": "480" if r["answer"] == "197" else r["answer"]} for r in records]
    with pytest.raises(Refused, match="wrong key 480: this is AIME 2024-I-8, the right one is 197"):
        prepared(tmp_path, verifier, wrong, "aime24.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.json",
            '{"train": [{"question": "q", "answer": "1"}], "test": [{"question": "p"}]}',
            r"'train' \(1\), 'test'",
        ),
        ("b.json", "5", "holds 5, no list"),
        ("c.json", "[1, 2]", "row 0 is 1, no object"),
        ("d.json", "[" * 100_000, "recursion"),
        ("e.jsonl", '{"a": ' * 100_000, "recursion"),
        ("f.csv", "question,answer\nq,1\nWhat, then?,2,3\n", "line 3: more cells than the header"),
        ("g.jsonl", '{"question": "q", "answer": ' + "1" * 5000 + "}", "g.jsonl: Exceeds the limit"),
        ("h.json", '{"question": "q", "answer": "1"}', "one list of rows is read; got none"),
    ],
)
def test_files_of_other_shapes_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=said):
        list(iter_records(tmp_path / name))


def test_byte_order_mark_and_lines_under_the_other_suffix_are_read(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in rows(2))
    for name, text in (
        ("a.jsonl", lines),
        ("b.json", lines),
        ("c.json", json.dumps(rows(2))),
        ("d.csv", "level\n3\n3\n"),
    ):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert [str(record["level"]) for record in iter_records(tmp_path / name)] == ["3", "3"]


def test_lone_surrogates_are_refused_in_texts_and_replaced_in_names(tmp_path, verifier):
    with pytest.raises(Refused, match=r"U\+D800"):
        prepared(tmp_path, verifier, [{"question": "a\ud800", "answer": "1"}])
    table, _ = prepared(tmp_path, verifier, [{"id": "a\ud800", "question": "q", "answer": "1", "subject": "\udfff"}])
    assert (table[0]["extra_info"]["id"], table[0]["extra_info"]["subject"]) == ("a?", "?")


def test_what_would_be_overwritten_is_refused(tmp_path, verifier):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "test.jsonl", rows(2))
    both = [str(tmp_path / folder / "test.jsonl") for folder in ("a", "b")]
    done = CliRunner().invoke(app, ["data", "prepare", *both, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "sources of one name" in done.stderr and not (tmp_path / "out").exists()
    made = prepare(both[0], tmp_path / "out", verifier=verifier)
    with pytest.raises(Refused, match="is its own source"):
        prepare(str(made), tmp_path / "out", verifier=verifier)
    again = prepare(str(made), tmp_path / "again", verifier=verifier)
    assert pq.ParquetFile(again).read(["prompt"]).equals(pq.ParquetFile(made).read(["prompt"]))


def test_ids_that_several_problems_share_are_told_apart(tmp_path, verifier):
    table, _ = prepared(tmp_path, verifier, [row | {"id": "7"} for row in rows(2)])
    ids = [row["extra_info"]["id"] for row in table]
    assert len(set(ids)) == 2 and all(identity.startswith("7-") for identity in ids)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (verl_row("What?", "1"), "veRL takes messages"),
        (verl_row(None, "1"), "veRL takes messages"),
        (verl_row([{"role": "user", "content": ["What?"]}], "1"), "veRL takes messages"),
        ({"prompt": messages("What?", "bare"), "reward_model": None}, "answer None"),
        ({"prompt": messages("What?", "bare"), "extra_info": "x"}, "answer None"),
    ],
)
def test_show_of_odd_rows_ends_without_a_traceback(tmp_path, row, said):
    done = CliRunner().invoke(app, ["data", "show", str(write(tmp_path / "odd.jsonl", [row]))])
    assert said in done.output and done.exit_code == (2 if "veRL" in said else 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "has no chat template"), ("{{ raise_exception('no system role') }}", "--prompt boxed")],
)
def test_model_whose_template_does_not_fit_is_refused(tmp_path, verifier, toy_dir, template, said):
    tokenizer = AutoTokenizer.from_pretrained(toy_dir / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    prepared(tmp_path, verifier, rows(1))
    command = ["data", "show", str(tmp_path / "out" / "train.parquet"), "--model", str(tmp_path / "model")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and said in done.output
    assert [turn["role"] for turn in messages("q", "boxed")] == ["user"]
