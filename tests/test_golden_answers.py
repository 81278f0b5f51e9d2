"""The table of golden answers, in both directions, and what only the whole verifier shows."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from golden_answers import PAIRS, RESPONSES

from rapo_verl.reward import Verdict, Verifier, VerifierSettings
from rapo_verl.reward.answer import normalize
from rapo_verl.reward.function import VerifierFailingError, compute_score, reward_settings, verdict_metrics


@pytest.fixture(scope="module")
def verifier():
    # The deadline is for a machine under load: here a timeout would be a wrong verdict.
    made = Verifier(VerifierSettings(deadline_s=60))
    yield made
    made.close()


def boxed(answer):
    return f"\\boxed{{{answer}}}"


def test_golden_pairs_get_their_verdict_in_both_directions(verifier):
    there = verifier.verify_many([boxed(p.box) for p in PAIRS], [p.gold for p in PAIRS])
    back = verifier.verify_many([boxed(p.gold) for p in PAIRS], [p.box for p in PAIRS])
    wrong = [(p, str(a), str(b)) for p, (a, _), (b, _) in zip(PAIRS, there, back) if not a == b == p.verdict]
    assert not wrong
    assert len({(p.gold, p.box) for p in PAIRS}) == len(PAIRS)
    assert all(p.source and p.why for p in PAIRS)


@pytest.mark.parametrize(("response", "gold", "verdict", "box", "why"), RESPONSES)
def test_golden_responses_get_their_verdict_and_box(verifier, response, gold, verdict, box, why):
    assert verifier.verify(response, gold) == (verdict, box)


def test_normalization_is_idempotent():
    assert all(normalize(normalize(t)) == normalize(t) for p in PAIRS for t in (p.gold, p.box))


def test_math_verify_strictness_compares_as_the_library_does(verifier):
    loose = Verifier(VerifierSettings(deadline_s=60, strictness="math_verify"))
    try:
        # Two of its false positives, by which published numbers can be reproduced.
        assert loose.verify(boxed("9=1"), "1")[0] == "correct"
        assert loose.verify(boxed("\\{1,2\\}"), "(1,2)")[0] == "correct"
    finally:
        loose.close()


def test_integer_answers_start_no_process():
    fresh = Verifier()
    many = fresh.verify_many([boxed("204"), boxed("204^\\circ"), "none", boxed("x y z")] * 1000, ["204"] * 4000)
    assert [verdict for verdict, _ in many[:4]] == ["correct", "correct", "no_box", "wrong"]
    assert fresh.pool._nursery is None
    fresh.close()


def test_empty_right_answer_raises():
    for gold in ("", "  ", "$ $"):
        with pytest.raises(ValueError, match="is empty"):
            Verifier().verify(boxed("1"), gold)


def test_verdicts_from_many_threads_at_once(verifier):
    results = {}

    def work(i):
        results[i] = [verifier.verify(boxed(f"{i}+{j}"), str(i + j))[0] for j in range(1, 6)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(results[i] == ["correct"] * 5 for i in range(1, 9))


def test_verdicts_in_a_fork_of_a_process_that_verified(verifier):
    assert verifier.verify(boxed("6\\cdot 34"), "204")[0] == "correct"
    pid = os.fork()
    if pid == 0:
        # Its threads and connections are the parent's; nothing of pytest may run here.
        os._exit(0 if verifier.verify(boxed("3\\cdot 68"), "204")[0] == "correct" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert verifier.verify(boxed("2\\cdot 102"), "204")[0] == "correct"


def test_processes_end_with_a_caller_that_is_killed():
    code = """if True:
        import os, psutil, signal
        from rapo_verl.reward import Verifier
        v = Verifier()
        assert v.verify(r"\\boxed{6\\cdot 34}", "204")[0] == "correct"
        nursery = psutil.Process(v.pool._nursery._process.pid)
        print(*(process.pid for process in (nursery, *nursery.children())), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 2, done.stderr
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_reward_of_one_hanging_answer_holds_up_no_other():
    options = {"verifier": {"deadline_s": 4.0, "workers": 2}}

    async def run():
        first = asyncio.create_task(compute_score("d", boxed("9^{9^{9^9}}"), "204", **options))
        await asyncio.sleep(0.01)
        others = await asyncio.gather(*(compute_score("d", boxed(f"{i}+1"), str(i + 1), **options) for i in range(20)))
        return first.done(), others, await first

    blocked, others, hanging = asyncio.run(run())
    assert not blocked
    assert {other["verdict"] for other in others} == {"correct"}
    assert hanging["verdict"] == "timeout" and hanging["score"] == 0.0


def test_reward_settings_name_every_problem():
    with pytest.raises(ValueError) as error:
        reward_settings(verifier={"deadline": 3, "workers": "two", "memory_mb": 1}, extra=1)
    for said in (
        "unknown key verifier.deadline",
        "verifier.workers is 'two'",
        "verifier.memory_mb is 1",
        "unknown key extra",
    ):
        assert said in str(error.value)


def test_verdicts_become_counts_and_too_many_failures_stop_the_run():
    def records(**counts):
        return [
            {"verdict": verdict, "answer": "9^9", "truncated": verdict == "no_box"}
            for verdict, count in counts.items()
            for _ in range(count)
        ]

    metrics = verdict_metrics(records(correct=60, wrong=30, no_box=3, timeout=9), max_failed_share=0.1)
    assert metrics == {
        "rapo/verifier/correct": 60.0, "rapo/verifier/wrong": 30.0, "rapo/verifier/no_box": 3.0,
        "rapo/verifier/timeout": 9.0, "rapo/verifier/error": 0.0, "rapo/verifier/truncated": 3.0,
        "rapo/truncated": 3 / 102,
    }  # fmt: skip
    counted = {f"rapo/verifier/{name}" for name in (*(v.value for v in Verdict), "truncated")}
    assert set(metrics) == counted | {"rapo/truncated"}
    with pytest.raises(VerifierFailingError, match=r"8 of 80 .* and 4 into .* share of 0.1") as error:
        verdict_metrics(records(correct=68, timeout=8, error=4), max_failed_share=0.1)
    assert "9^9" in str(error.value) and "deadline_s" in str(error.value)
    # One of eight is above the share, but says nothing.
    assert verdict_metrics(records(correct=7, timeout=1), max_failed_share=0.1)["rapo/verifier/timeout"] == 1.0
    # Another reward function's records have no verdict.
    assert verdict_metrics([{"acc": 1.0}, {}], max_failed_share=0.1) == {}


def test_a_verdict_is_plain_text_to_json_and_counters():
    assert json.dumps({"v": Verdict.correct}) == '{"v": "correct"}' and f"{Verdict.no_box}" == "no_box"
    assert {"correct": 1}[Verdict.correct] == 1


# Golds of a set, no two of them equal: forms that MATH and college sets have.
SET = [
    *("2", "-2", "20", "0.2", "2.5", "\\frac{2}{5}", "\\frac{1}{2^{60}}", "2\\sqrt{3}", "3\\sqrt{2}", "\\pi", "2i"),
    *("x+2", "x-2", "2x", "x^2+50=0", "x^2+50=1", "\\log_2(32)=5", "\\log_2(16)=4", "y=2x+1", "y=2x-1", "x=3", "y=7"),
    *("(1,2)", "(2,1)", "[1,2]", "[1,2)", "\\{1,2\\}", "1,1,2", "1,2,2", "x<2", "x\\le 2", "x>2"),
    *("x<2\\text{ or }x>3", "(-\\infty,1)", "\\emptyset", "\\frac{1\\pm\\sqrt5}{2}", "\\pm 3", "12_7", "12_8", "30\\%"),
    *("\\text{Monday}", "\\text{Friday}", "8\\text{ cm}", "6\\text{ cm}^2", "8\\text{ m}"),
    *("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
]  # fmt: skip


def test_every_gold_equals_itself_and_no_other_of_its_set(verifier):
    pairs = [(gold, other) for gold in SET for other in SET]
    verdicts = verifier.verify_many([boxed(other) for _, other in pairs], [gold for gold, _ in pairs])
    assert all(verdict in ("correct", "wrong") for verdict, _ in verdicts)
    equal = [pair for pair, (verdict, _) in zip(pairs, verdicts) if verdict == "correct"]
    assert equal == [(gold, gold) for gold in SET]
