"""Verdicts beside samples, counts from verdicts, and the statistics that need answers."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from stub_evaluation import PROBLEMS, SHARD, N, StubEngine, answer, draw, plan, run, samples

from rapo_verl import Refused
from rapo_verl.evaluation import score as scoring
from rapo_verl.evaluation.score import score, score_path
from rapo_verl.evaluation.store import Samples, Store, read_stated, read_table
from rapo_verl.method.passk import default_ks
from rapo_verl.report.load import load_result, load_study
from rapo_verl.report.responses import answer_key, majority_at, read_responses
from rapo_verl.reward import VerifierSettings

INTEGER = VerifierSettings(strictness="integer")


@pytest.fixture
def store(tmp_path):
    drawn = draw(tmp_path / "base")
    run(drawn, StubEngine())
    return drawn.store


def texts(problem, number=1):
    shards = sorted(shard for shard in plan(draw=number).shards if shard.problem == problem)
    return [answer(shard.seed + i, problem) for shard in shards for i in range(shard.samples)]


def test_verdicts_counts_and_lengths_are_those_of_the_texts(store):
    assert score(store, INTEGER, jobs=1) == PROBLEMS
    result = load_result(store, "stub")
    responses = result.responses
    for i in range(PROBLEMS):
        said = texts(i)
        right = sum(f"{{{i}}}" in text for text in said)
        boxless = sum("none" in text for text in said)
        assert result.correct[i] == right == responses.problems["correct"][i]
        assert responses.problems["no_box"][i] == boxless == responses.problems["truncated"][i]
        assert responses.problems["wrong"][i] == N - right - boxless
    assert result.groups[:2] == ("b", "a")
    assert result.draw == 1
    rows = [row for i in range(PROBLEMS) for row in read_table(score_path(store, i)).to_pylist()]
    tokens = [row["tokens"] for row in rows]
    assert responses.tokens["mean"] == pytest.approx(np.mean(tokens))
    assert responses.tokens["median"] == np.quantile(tokens, 0.5, method="inverted_cdf")
    assert responses.tokens["95"] == np.quantile(tokens, 0.95, method="inverted_cdf")
    right_tokens = [row["tokens"] for row in rows if row["verdict"] == "correct"]
    assert responses.tokens["right"] == pytest.approx(np.mean(right_tokens))


def test_guess_is_the_share_of_answers_to_other_problems(store):
    score(store, INTEGER, jobs=1)
    responses = read_responses(store)
    for i in range(PROBLEMS):
        others = [text for j in range(PROBLEMS) if j != i for text in texts(j)]
        assert responses.problems["guess"][i] == pytest.approx(sum(f"{{{i}}}" in text for text in others) / len(others))


def test_scoring_twice_judges_nothing_and_resumes_by_problem(store):
    score(store, INTEGER, jobs=1)
    stamps = [score_path(store, i).stat().st_mtime_ns for i in range(PROBLEMS)]
    assert score(store, INTEGER, jobs=1) == 0
    score_path(store, 5).unlink()
    assert score(store, INTEGER, jobs=1) == 1
    assert [score_path(store, i).stat().st_mtime_ns for i in range(PROBLEMS) if i != 5] == stamps[:5] + stamps[6:]


def test_other_verifier_settings_or_samples_are_judged_again(store, monkeypatch):
    score(store, INTEGER, jobs=1)
    assert score(store, VerifierSettings(), jobs=1) == PROBLEMS
    monkeypatch.setattr(scoring, "verifier_sha256", lambda: "another verifier")
    assert score(store, VerifierSettings(), jobs=1) == PROBLEMS
    assert read_stated(score_path(store, 0))["basis"]["verifier"] == "another verifier"
    shard = next(shard for shard in plan().shards if shard.problem == 3)
    store.write(shard, Samples([1] * SHARD, ["stop"] * SHARD, [0.0] * SHARD, ["\\boxed{3}"] * SHARD))
    with pytest.raises(Refused, match="verdicts on other samples than are there now; run `rapo eval score` again"):
        read_responses(store)
    assert score(store, VerifierSettings(), jobs=1) == 1
    store.problems[5]["gold"] = "27"  # problems.json had a wrong key
    assert score(store, VerifierSettings(), jobs=1) == 1


def test_two_processes_judge_as_one_does(store):
    score(store, VerifierSettings(workers=1), jobs=1)
    alone = [read_table(score_path(store, i)) for i in range(PROBLEMS)]
    for i in range(PROBLEMS):
        score_path(store, i).unlink()
    assert score(store, VerifierSettings(workers=1), jobs=2) == PROBLEMS
    assert all(read_table(score_path(store, i)).equals(alone[i]) for i in range(PROBLEMS))


def test_missing_and_damaged_samples_are_refused_with_the_command(store):
    path = store.shard_path(2, 0)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(Refused, match=r"1 problem\(s\) are not complete; run `rapo eval generate` again"):
        score(store, INTEGER, jobs=1)
    damaged = bytearray(whole)
    damaged[damaged.find(b"\x28\xb5\x2f\xfd", len(damaged) // 4) + 12] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(Refused, match="run `rapo eval generate` again"):
        score(store, INTEGER, jobs=1)
    with pytest.raises(Refused, match="run `rapo eval score"):
        read_responses(store)


def exact_majority(classes, k):
    total = 0.0
    for subset in itertools.combinations(classes, k):
        votes = Counter(c for c in subset if c >= 0)
        best = max(votes.values(), default=0)
        if best and votes[0] == best:
            total += 1 / sum(v == best for v in votes.values())
    return total / math.comb(len(classes), k)


def test_majority_equals_enumeration_over_all_subsets():
    classes = np.array([0, 0, 0, 1, 1, 2, -1, -1, 3])
    ks = (1, 2, 3, 5, 9)
    got = majority_at(classes, ks, seed=0, draws=4000)
    # Means of 4000 values in [0, 1]: four standard errors are at most 0.032.
    np.testing.assert_allclose(got, [exact_majority(classes, k) for k in ks], atol=0.032)
    assert got[-1] == 1.0  # three right of nine, no other as often
    assert majority_at(np.array([-1, -1]), (1, 2), seed=0).tolist() == [0.0, 0.0]


def test_majority_of_all_samples_counts_right_spellings_together(store):
    score(store, INTEGER, jobs=1)
    result = load_result(store, "stub")
    responses = result.responses
    assert responses.majority.shape == (PROBLEMS, len(default_ks(N)))
    # About 28 % right, five wrong values of about 11 % each: the right one wins at large k.
    assert responses.majority[:, -1].mean() > 0.9
    assert responses.majority[:, 0].mean() == pytest.approx(np.mean(result.correct) / N, abs=1e-12)


def test_study_takes_hard_from_another_draw_of_the_same_weights(tmp_path):
    folders = {}
    for name, changes in (("base", {}), ("rl", {"model": "1" * 64}), ("base_draw2", {"draw": 2})):
        drawn = draw(tmp_path / name, **changes)
        run(drawn, StubEngine())
        score(drawn.store, INTEGER, jobs=1)
        folders[name] = tmp_path / name
    study = load_study([folders["base"], folders["rl"]], folders["base_draw2"])
    assert [r.name for r in study.results] == ["base", "rl"]
    assert study.hard_choice.name == "base" and study.hard_choice.draw == 2
    assert study.hard_choice.correct != study.results[0].correct
    with pytest.raises(Refused, match="none of the report's"):
        load_study([folders["rl"]], folders["base_draw2"])
    for settings in (VerifierSettings(), VerifierSettings(strictness="integer", deadline_s=9)):
        score(Store.open(folders["rl"]), settings, jobs=1)
        with pytest.raises(Refused, match="judged differently"):
            load_study([folders["base"], folders["rl"]], None)


@pytest.mark.parametrize(
    ("texts", "key"),
    [
        (["27", "27.0", "27.", "027", "+27", "54/2", "\\frac{54}{2}", "$27$"], "27"),
        (["0.5", ".5", "1/2", "\\frac{1}{2}", "\\dfrac{2}{4}"], "1/2"),
        (["-3", "-3.00", "\u22123", "-6/2"], "-3"),
        (["x", "$x$"], "x"),
        (["1/0"], "1/0"),
        (["(1,2)", "(1, 2)"], answer_key("(1,2)")),
    ],
)
def test_equal_numbers_have_one_key(texts, key):
    assert {answer_key(text) for text in texts} == {key}


def test_guess_counts_other_spellings_of_a_number(tmp_path):
    class Decimal(StubEngine):
        async def sample(self, request):
            return samples(request)._replace(text=["\\boxed{7.0}"] * request.samples)

    drawn = draw(tmp_path)
    run(drawn, Decimal())
    score(drawn.store, VerifierSettings(), jobs=1)
    assert read_responses(drawn.store).problems["guess"][7] == 1.0


@pytest.mark.parametrize("damage", ["emptied", "truncated", "flipped", "foreign", "short"])
def test_damaged_score_file_is_judged_again(store, damage):
    score(store, INTEGER, jobs=1)
    path = score_path(store, 4)
    data = path.read_bytes()
    if damage == "flipped":
        # A byte of a column's page: its checksum tells.
        place = data.find(b"\x28\xb5\x2f\xfd") + 12  # a zstd frame
        data = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
    if damage == "short":
        table = read_table(path)
        scoring.write_table(path, table.slice(0, 5), read_stated(path))
    changed = {"emptied": b"", "truncated": data[: len(data) // 2], "flipped": data}
    changed["foreign"] = store.shard_path(4, 0).read_bytes()
    if damage in changed:
        path.write_bytes(changed[damage])
    assert score(store, INTEGER, jobs=1) == 1
    assert read_responses(store).problems["correct"].sum() > 0
