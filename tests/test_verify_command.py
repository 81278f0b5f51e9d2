"""`rapo verify`: the verdict on one answer or a file of them, and why."""

import json

import pytest
from typer.testing import CliRunner

from rapo_verl.cli import app


def rapo(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.mark.parametrize(
    ("gold", "response", "code", "said"),
    [
        ("204", "so \\boxed{204}", 0, "the same integer"),
        ("204", "so \\boxed{205}", 1, "two different integers"),
        ("204", "204", 1, "no \\boxed{}"),
        ("\\frac12", "\\boxed{0.5}", 0, "equal; gold read as \\frac12"),
        ("(2,3)", "\\boxed{y=2, x=3}", 1, "list of 2: value named y"),
    ],
)
def test_one_answer_gets_its_verdict_and_why(gold, response, code, said):
    done = rapo(gold, response)
    assert done.exit_code == code and said in done.output


def test_a_file_is_judged_line_by_line_as_json(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"gold": "1", "response": "\\boxed{1}"}, {"gold": "2", "response": "\\boxed{3}"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    done = rapo("--file", file, "--json")
    found = [json.loads(line) for line in done.output.splitlines()]
    assert done.exit_code == 1 and [row["verdict"] for row in found] == ["correct", "wrong"]
    assert [row["answer"] for row in found] == ["1", "3"] and all(row["why"] for row in found)
    file.write_text(json.dumps(rows[0]))
    assert rapo("--file", file).exit_code == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"gold": 1, "response": "x"}', '{"gold": "1"}', '{"gold": "", "response": "x"}']
)
def test_a_bad_file_is_refused(tmp_path, text):
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    assert rapo("--file", file).exit_code == 2
    assert rapo("--file", tmp_path / "absent").exit_code == 2
    assert rapo("1").exit_code == 2
