"""The report from folders, through the command line: every file, hostile texts, what is refused, what is marked."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from stub_evaluation import PROBLEMS, N, StubEngine, draw, plan, run, samples
from test_report import Page
from typer.testing import CliRunner

from rapo_verl.cli.evaluate import app
from rapo_verl.method.passk import pass_at_k_curve
from rapo_verl.report.responses import MAX_CHARACTERS

EVIL = '</pre><script>alert("x")</script><img src=http://example.org onerror=alert(1)>'


class HostileEngine(StubEngine):
    """Texts, answers and lengths as a model under optimisation may write them."""

    async def sample(self, request):
        found = samples(request)
        texts = [f"{EVIL}{text}" for text in found.text]
        texts[-1] = f"{EVIL}\\boxed{{{EVIL}}}{'long ' * 9000}"
        return found._replace(text=texts)


def rapo(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base, its second draw and an RL model, on two sets of problems; the last is judged already."""
    root = tmp_path_factory.mktemp("evals")
    problems = tuple(
        replace(p, id=f"{p.id}{EVIL}", source=f"aime2{4 + i % 2}", messages=({"role": "user", "content": f"{EVIL}?"},))
        for i, p in enumerate(plan().problems)
    )
    for name, changes in (("base", {}), ("rapo", {"model": "1" * 64}), ("base_draw2", {"draw": 2})):
        drawn = draw(root / name, problems=problems, **changes)
        run(drawn, HostileEngine())
    done = rapo("score", root / "rapo", "--strictness", "integer", "--jobs", 1)
    assert done.exit_code == 0, done.output
    return root


@pytest.fixture(scope="module")
def report(folders):
    out = folders / "report"
    wish = ("report", folders / "base", folders / "rapo", "--hard-from", folders / "base_draw2", "--out", out)
    done = rapo(*wish, "--draws", 100, "--score", "--strictness", "integer")
    assert done.exit_code == 0, done.output
    judged = [int(count) for count in re.findall(r": (\d+) problems judged", done.output)]
    return out, json.loads((out / "summary.json").read_text()), judged


def test_report_with_score_judges_first_what_is_not_judged(report):
    assert report[2] == [PROBLEMS, 0, PROBLEMS]
    assert report[1]["hard"]["draw"] == 2


def test_hostile_responses_questions_and_ids_stay_text(report):
    page = (report[0] / "report.html").read_text()
    parsed = Page(page)
    assert "script" not in parsed.tags and "<script" not in page.casefold()
    assert {source.split(":")[0].split("#")[0] for source in parsed.loads} <= {"data", ""}  # images and anchors
    assert page.count("<img") == 6  # two panels for all and for each set
    words = "".join(parsed.words)
    assert f"{EVIL}sample " in words and f"{EVIL}?" in words
    assert "<script" not in (report[0] / "passk.svg").read_text().casefold()


def test_long_texts_are_cut_in_the_middle(report):
    page = (report[0] / "report.html").read_text()
    assert len(page) < 3_000_000
    cut = re.search(r"\[… (\d+) characters left out …\]", page)
    assert cut is None or int(cut[1]) > 0
    assert max(len(words) for words in Page(page).words) < MAX_CHARACTERS + 200


def test_every_cell_of_the_matrix_says_its_counts(report):
    out, summary, _ = report
    page = (out / "report.html").read_text()
    titles = re.findall(r'<td title="[^"]*?(base|rapo) (\d+) of (\d+), p in \[', page)
    want = [(row["model"], str(row["correct"]), str(N)) for row in summary["problems"]]
    assert sorted(titles) == sorted(want)
    assert page.count('href="#p') == 2 * PROBLEMS
    assert all(f'id="p{i}"' in page for i in range(PROBLEMS))


def row_of(rows, *place):
    keys = ("set", "scope", "model", "k")
    (found,) = (row for row in rows if tuple(row[key] for key in keys) == place)
    return found


def test_two_sets_have_their_own_curves_guess_majority_and_differences_beside_the_combined(report):
    out, summary, _ = report
    page = (out / "report.html").read_text()
    counts = np.array([row["correct"] for row in summary["problems"] if row["model"] == "base"])
    even = np.arange(PROBLEMS) % 2 == 0
    for label, mask in (("all", even | True), ("aime24", even), ("aime25", ~even)):
        for k, want in zip(summary["ks"], pass_at_k_curve(counts[mask], N, summary["ks"])):
            row = row_of(summary["curves"], label, "full", "base", k)
            assert row["pass_at_k"] == pytest.approx(want)
            assert row["guess_at_k"] is not None and 0 < row["majority_at_k"] <= 1
        assert row_of(summary["curves"], label, "full", "base", 1)["majority_at_k"] == pytest.approx(
            counts[mask].mean() / N
        )
        assert any((d["set"], d["scope"]) == (label, "full") for d in summary["differences"])
    assert all(words in page for words in ("All sets · Full · 12", "aime24 · Full · 6", "aime25 · Full · 6"))


def test_csv_and_latex_hold_the_summary(report):
    out, summary, _ = report
    rows = list(csv.DictReader((out / "passk.csv").open()))
    (row,) = (r for r in rows if (r["set"], r["scope"], r["model"], r["k"]) == ("all", "full", "rapo", "16"))
    want = row_of(summary["curves"], "all", "full", "rapo", 16)
    assert float(row["pass_at_k"]) == want["pass_at_k"]
    assert float(row["guess_at_k"]) == want["guess_at_k"]
    problems = list(csv.DictReader((out / "problems.csv").open()))
    assert len(problems) == 2 * PROBLEMS
    assert problems[0]["problem"].endswith(EVIL)
    table = (out / "table.tex").read_text()
    assert r"\multicolumn{4}{l}{aime24 Full, 6 problems}" in table
    assert f"{100 * row_of(summary['curves'], 'aime24', 'full', 'base', 1)['pass_at_k']:.1f}" in table


def test_hashes_and_settings_are_on_the_page(report, folders):
    page = (report[0] / "report.html").read_text()
    manifest = json.loads((folders / "base" / "manifest.json").read_text())
    for value in (manifest["sha256"], manifest["model_sha256"], manifest["prompts_sha256"]):
        assert value in page
    assert "Hard chosen on" in page


def test_hard_from_a_scored_draw_is_refused_and_when_forced_marked(folders, report, tmp_path):
    same = ("report", folders / "base", folders / "rapo", "--hard-from", folders / "base", "--draws", 100)
    refused = rapo(*same, "--out", tmp_path / "no")
    assert refused.exit_code == 2 and not (tmp_path / "no").exists()
    forced = rapo(*same, "--out", tmp_path / "yes", "--force-same-draw")
    assert forced.exit_code == 0, forced.output
    assert "regression to the mean" in (tmp_path / "yes" / "report.html").read_text()
    assert "the SAME draw" in (tmp_path / "yes" / "passk.svg").read_text()


def test_report_without_hard_says_so(folders, report, tmp_path):
    done = rapo("report", folders / "base", "--out", tmp_path / "r", "--draws", 100)
    assert done.exit_code == 0, done.output
    assert "there is no Hard set" in (tmp_path / "r" / "report.html").read_text()


def test_unjudged_folder_and_no_folder_are_refused_with_the_command(tmp_path):
    drawn = draw(tmp_path / "new")
    run(drawn, StubEngine())
    done = rapo("report", tmp_path / "new", "--out", tmp_path / "r")
    assert done.exit_code == 2 and "rapo eval score" in done.output
    done = rapo("score", tmp_path)
    assert done.exit_code == 2 and "rapo eval generate" in done.output
    done = rapo("score", tmp_path / "new", tmp_path / "absent")
    assert done.exit_code == 2 and "problems judged" in done.output and "absent holds no evaluation" in done.output
    (tmp_path / "a report").mkdir()
    done = rapo("score", tmp_path / "a report", tmp_path / "new")
    assert done.exit_code == 0 and "a report: no evaluation, left out" in done.output and "judged" in done.output


def test_one_folder_given_twice_and_folders_of_one_name(folders, report, tmp_path):
    done = rapo("report", folders / "base", folders / "base", "--out", tmp_path / "r", "--draws", 100)
    assert done.exit_code == 2 and "are one evaluation" in done.output
    same = tmp_path / "y" / "base"
    shutil.copytree(folders / "rapo", same)
    done = rapo("report", folders / "base", same, "--out", tmp_path / "r", "--draws", 100)
    assert done.exit_code == 0, done.output
    assert str(same) in (tmp_path / "r" / "report.html").read_text()


def test_command_line_starts_without_heavy_imports():
    code = (
        "import sys; from rapo_verl.cli import app; heavy = {'torch', 'vllm', 'ray', 'transformers', 'numpy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "slow"], "--preset is 'slow'; allowed: rapo-paper, quick"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--engine-arg", "nothing"], "key=value"),
        (["--limit", "0"], "--limit"),
        (["--limit", "-1"], "--limit"),
        (["--n", "0"], "--n"),
        (["--shard", "0"], "--shard"),
        (["--tensor-parallel", "0"], "--tensor-parallel"),
        (["--model", "./nowhere"], "does not exist; give a checkpoint folder or a hub id"),
        (["--data", "absent.parquet"], "absent.parquet"),
    ],
)
def test_generate_refuses_impossible_wishes_before_anything_starts(toy_dir, tmp_path, arguments, words):
    given = ["--model", toy_dir / "model", "--data", toy_dir / "eval.parquet", "--max-tokens", 24]
    done = rapo("generate", *given, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "out").exists()


def test_too_long_responses_are_refused_with_the_limit(toy_dir, tmp_path):
    given = ["--model", toy_dir / "model", "--data", toy_dir / "eval.parquet", "--out", tmp_path / "out"]
    done = rapo("generate", *given, "--max-tokens", 100_000)
    assert done.exit_code == 2 and "lower max_tokens to" in done.output
