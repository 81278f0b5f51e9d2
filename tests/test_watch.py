"""`rapo watch`: what metrics are said to mean, the collapse alarm, and the page of a folder in any state."""

import http.client
import json
import re
import threading
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from rapo_verl import Refused
from rapo_verl.cli import app
from rapo_verl.report import watch
from rapo_verl.report.problems import seen_again, visits
from rapo_verl.run.alarms import NAMES, Listener, alarms
from rapo_verl.run.signs import FINE, NOTE, WARN, readings, series, smooth, trend

REWARD, ENTROPY, CUT, MASS = (
    "critic/rewards/mean", "actor/entropy", "rapo/truncated", "rapo/reference_mass_sampled"
)  # fmt: skip


def history(records=40, **curves):
    """Records of named curves: a number, or (first, last) on a straight line."""
    lines = {
        key: np.linspace(*(value if isinstance(value, tuple) else (value, value)), records)
        for key, value in curves.items()
    }
    return [{"step": i + 1, **{key: float(line[i]) for key, line in lines.items()}} for i in range(records)]


def test_smooth_is_the_mean_of_the_last_five():
    values = np.arange(8.0) ** 2
    assert smooth(values).tolist() == pytest.approx([np.mean(values[max(0, i - 4) : i + 1]) for i in range(8)])


def test_series_leaves_out_what_is_no_finite_number():
    steps, values = series(
        [{"step": 1, "x": 1.0}, {"step": 2, "x": float("nan")}, {"step": 3}, {"step": 4, "x": "?"}], "x"
    )
    assert steps.tolist() == [1] and values.tolist() == [1.0]


@pytest.mark.parametrize("end, way", [(2.0, "rising"), (0.5, "falling"), (1.0, "level")])
def test_trend_tells_a_slope_from_noise(end, way):
    noise = np.random.default_rng(0).normal(0, 0.02, 40)
    assert trend(np.linspace(1.0, end, 40) + noise).way == way
    assert trend(np.array([1.0])).way == "level"


@pytest.mark.parametrize(
    "key, curve, level, words",
    [
        (REWARD, (0.2, 0.5), FINE, "rising"),
        (REWARD, (0.5, 0.1), WARN, "less than half of its best"),
        (REWARD, (0.04, 0.01), FINE, "falling"),  # too small to have been anything
        (ENTROPY, (0.5, 0.3), FINE, "between a fifth and twice"),
        (ENTROPY, (0.5, 0.05), NOTE, "under a fifth"),
        (ENTROPY, (0.5, 1.5), WARN, "more than twice"),
        (CUT, (0.0, 0.05), FINE, "cut off"),
        (CUT, (0.0, 0.3), NOTE, "over a tenth"),
        (CUT, (0.0, 0.9), WARN, "more than half"),
        (MASS, (1.0, 0.97), FINE, "covers the reference"),
        (MASS, (1.0, 0.8), NOTE, "begins to drop modes"),
        (MASS, (1.0, 0.5), WARN, "modes it has dropped"),
        ("rapo/forward_kl", (0.0, 0.2), FINE, "0 would be the reference"),
        ("rapo/forward_kl", (0.0, 1.5), WARN, "over one nat"),
        ("response_length/mean", (100.0, 400.0), NOTE, "a factor of two"),
        ("actor/pg_clipfrac", 0.3, NOTE, "the steps are large"),
        ("rapo/forward_kl_clipped_fraction", 0.1, NOTE, "far from the reference"),
        ("actor/grad_norm", (0.1, 3.0), WARN, "more than ten times"),
    ],
)
def test_each_metric_says_what_it_means_now(key, curve, level, words):
    (reading,) = readings(history(**{key: curve}))
    assert reading.level == level and words in reading.sentence, reading.sentence


HEALTHY = {REWARD: (0.2, 0.5), ENTROPY: (0.5, 0.2), CUT: 0.02, MASS: (1.0, 0.95)}


@pytest.mark.parametrize(
    "changes, names",
    [
        ({}, []),
        ({REWARD: (0.5, 0.05)}, ["unlearned"]),
        ({REWARD: (0.5, 0.3), ENTROPY: (0.5, 4.0)}, ["noise"]),
        ({REWARD: (0.5, 0.3), CUT: (0.02, 0.9)}, ["runaway"]),
        ({REWARD: (0.2, 0.5), CUT: (0.02, 0.9)}, []),  # longer, and better for it
        ({ENTROPY: (0.5, 0.01), MASS: (1.0, 0.4)}, ["narrowed"]),
        ({ENTROPY: (0.5, 0.01)}, []),  # low entropy alone is no collapse
    ],
)
def test_alarms_name_the_collapse_and_nothing_else(changes, names):
    assert [alarm.name for alarm in alarms(history(**HEALTHY | changes))] == names


def test_alarm_needs_three_records_and_knows_since_when():
    run = history(**{REWARD: 0.5})
    for at in range(20, 40):
        run[at][REWARD] = 0.0
    (alarm,) = alarms(run)
    assert alarm.since == 23  # the first whose mean of five is under half
    assert alarms(run[:24]) == [] and len(alarms(run[:25])) == 1
    run += history(records=8, **{REWARD: 0.6})
    assert alarms([{**r, "step": i} for i, r in enumerate(run)]) == []  # it came back


@pytest.mark.parametrize(
    "most, sounds", [((0.6, 0.55, 0.5, 0.4), True), ((0.6, 0.6, 0.6, 0.4), False), ((0.6, 0.4, 0.6, 0.58), False)]
)
def test_breadth_alarm_wants_two_validations_at_the_most_attempts(most, sounds):
    names = "val/pass@k/aime/2", "val/pass@k/aime/16"
    run = [{"step": 10 * i, names[0]: 0.1 * i, names[1]: value} for i, value in enumerate(most, 1)]
    found = alarms(run)
    assert [alarm.name for alarm in found] == ["breadth"] * sounds
    if sounds:
        assert found[0].since == 30 and "aime: pass@16 fell from 0.600 to 0.400" in found[0].sentence
    assert [r.title for r in readings(run)] == ["Validation, aime: pass@2", "Validation, aime: pass@16"]


def test_breadth_is_measured_at_half_of_the_answers_and_against_the_noise_of_the_problems():
    def run(problems, half):
        keys = {"val/pass@k/a/b/4": 0.5, "val/pass@k/a/b/8": half, "val/pass@k/a/b/16": (0.6, 0.1)}
        return history(records=5, **keys | {"val/problems/a/b": problems})

    assert alarms(run(500, 0.5)) == [] and alarms(run(30, (0.5, 0.42))) == []  # of 30: 0.09
    (alarm,) = alarms(run(500, (0.5, 0.42)))
    assert "a/b: pass@8 fell from 0.500 to 0.420" in alarm.sentence


@pytest.mark.parametrize("run", [[], history(records=1, **HEALTHY), history(records=3, x=1.0)])
def test_short_histories_sound_no_alarm(run):
    assert alarms(run) == []


def write_run(folder, run, config="", tail=""):
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config or "trainer: {experiment_name: a run, total_training_steps: 80}\n")
    lines = [json.dumps({"step": r["step"], "data": {k: v for k, v in r.items() if k != "step"}}) for r in run]
    (folder / "metrics" / "0000.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return folder


TIMES = {"timing_s/step": 10.0, "timing_s/gen": 6.0, "timing_s/ref": 1.0, "perf/throughput": 1234.0}


def test_page_of_a_running_run(tmp_path):
    shot = watch.take(write_run(tmp_path, history(**HEALTHY | TIMES), tail='{"step": 41, "da'))
    assert (shot.step, shot.total, shot.level) == (40, 80, FINE) and "about 7 min left" in shot.progress
    assert shot.stages == [("gen", 6.0, pytest.approx(0.6)), ("ref", 1.0, pytest.approx(0.1))]
    page = watch.render(shot, refresh=15)
    assert 'http-equiv="refresh" content="15"' in page and "Training, and no alarm holds." in page
    assert page.count("<svg") == len(shot.readings) == 4 and "1,234 tokens" in page
    assert not re.search(r"(src|href)=|<script", page)  # it asks nobody for anything


def test_page_of_a_collapse_says_so_first(tmp_path):
    shot = watch.take(write_run(tmp_path, history(**HEALTHY | {REWARD: (0.5, 0.05)})))
    page = watch.render(shot)
    assert shot.level == WARN and page.index("Collapsing since step") < page.index("<svg")


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("stopped.txt", "", "saved and stopped"),
        ("reward_failure.txt", "", "The reward function failed"),
        (".lock", "", "No process trains here any more"),
        (".lock", '{"pid": 1}', "Training, and no alarm holds"),
        ("bad_batches/step_41.pt", "", "NaN or infinity"),
        ("bad_batches/step_3.pt", "", "Training, and no alarm holds"),  # mended, and gone on
    ],
)
def test_page_knows_how_a_run_ended(tmp_path, file, text, words):
    run = write_run(tmp_path, history(**HEALTHY))
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text)
    assert words in watch.take(run).headline


def test_silence_is_told(tmp_path, monkeypatch):
    run = write_run(tmp_path, history(**HEALTHY | TIMES))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert "Nothing logged for 60 min" in watch.take(run).headline


@pytest.mark.parametrize("config", ["", "a: [", "- 1\n"])
def test_folder_without_metrics_or_with_half_a_config_is_shown(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config)
    shot = watch.take(tmp_path)
    assert "No step has been logged yet" in shot.headline and watch.render(shot)


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"


def test_samples_stay_text_and_half_lines_are_left_out(tmp_path):
    run = write_run(
        tmp_path,
        history(**HEALTHY),
        config=f"trainer: {{experiment_name: '{HOSTILE}', rollout_data_dir: {tmp_path / 'rollouts'}}}\n",
    )
    (run / "rollouts").mkdir()
    (run / "rollouts" / "9.jsonl").write_text('{"input": "old", "score": 1}\n')
    records = [
        {"input": f"q{i // 2}", "output": HOSTILE + "x" * i, "score": float(i == 3), "gts": "4"} for i in range(6)
    ]
    lines = [json.dumps(r) for r in records] + ["[1]", '{"score": "x"}', '{"input": "half']
    (run / "rollouts" / "10.jsonl").write_text("\n".join(lines))
    shot = watch.take(run)
    assert [len(found) for found in shot.samples.values()] == [3, 3] and "old" not in str(shot.samples)
    page = watch.render(shot)
    assert "<script>" not in page and "<img" not in page and "&lt;script&gt;" in page


def run(*words):
    return CliRunner().invoke(app, ["watch", *map(str, words)])


def test_command_refuses_a_folder_that_is_no_run(tmp_path):
    assert (
        run(tmp_path, "--text").exit_code == 2 and run(tmp_path / "none", "--once", tmp_path / "x.html").exit_code == 2
    )


def test_command_writes_the_page_and_its_exit_code_is_the_alarm(tmp_path):
    healthy = write_run(tmp_path / "a", history(**HEALTHY))
    assert run(healthy, "--text", "--once", tmp_path / "a.html").exit_code == 0
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    result = run(write_run(tmp_path / "b", history(**HEALTHY | {REWARD: (0.5, 0.05)})), "--text")
    assert result.exit_code == 1 and "Collapsing" in result.output


def test_server_reads_the_folder_anew_and_serves_this_machine_alone(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path, history(records=5, **HEALTHY))
    made = []
    real = watch.http.server.ThreadingHTTPServer
    monkeypatch.setattr(watch.http.server, "ThreadingHTTPServer", lambda *a: made.append(real(*a)) or made[0])
    thread = threading.Thread(target=watch.serve, args=(run_dir, 0, 5), daemon=True)
    thread.start()
    while not made:
        time.sleep(0.01)
    port = made[0].server_port

    def get(path="/", host="localhost"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path, headers={"Host": f"{host}:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    assert "step 5 of 80" in get()[1]
    write_run(tmp_path, history(records=6, **HEALTHY))
    assert "step 6 of 80" in get()[1]
    assert get("/etc/passwd")[0] == 404 and get(host="evil.example")[0] == 404
    assert made[0].server_address[0] == "127.0.0.1"
    with pytest.raises(Refused, match="port"):
        watch.serve(run_dir, port, 5)
    made[0].shutdown()
    thread.join(10)


def test_listener_speaks_once_and_knows_earlier_starts():
    run = history(**{REWARD: 0.5})
    for at in range(20, 40):
        run[at][REWARD] = 0.0
    told = Listener([])
    heard = [told.hear(r["step"], {k: v for k, v in r.items() if k != "step"} | {"other": 1.0}) for r in run]
    assert [i for i, (held, _) in enumerate(heard) if held] == list(range(24, 40))
    assert [i for i, (_, begun) in enumerate(heard) if begun] == [24]
    assert [alarm.name for alarm in heard[24][1]] == ["unlearned"] and set(NAMES) >= {"unlearned"}
    # A start that goes on hears the same at its first step, and a rule that held before does not begin again.
    assert Listener(run[:24]).hear(25, run[24]) == heard[24]
    held, begun = Listener(run[:30]).hear(31, run[30])
    assert held and not begun


def note(folder, *steps):
    lines = [
        json.dumps({"step": step, "problems": [*groups], "right": [*groups.values()], "n": [8] * len(groups)})
        for step, groups in steps
    ]
    (folder / "groups.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "prob')


def test_problems_gained_and_lost_since_they_were_first_seen(tmp_path):
    note(tmp_path, (1, {7: 0, 3: 8}), (2, {5: 4, 9: 1}), (3, {7: 2, 3: 5}), (4, {5: 5, 9: 2}), (5, {7: 8, 3: 0}))
    seen = seen_again(tmp_path)
    assert seen.problems == 4
    ((won,), (lost,)) = seen.gained, seen.lost
    assert (won.problem, won.first, won.last) == (7, (1, 0, 8), (5, 8, 8))
    assert (lost.problem, lost.first.right, lost.last.right) == (3, 8, 0)
    assert won.before == pytest.approx((0.0, 1 - 0.025 ** (1 / 8))) and won.now == pytest.approx((0.025 ** (1 / 8), 1))
    # pass@1: (8 - 8 + 1 + 1) / 8 / 4; pass@8: one problem won, one lost
    assert seen.change.ks == (1, 8) and seen.change.mean.tolist() == pytest.approx([2 / 32, 0])
    assert (seen.change.low < seen.change.mean).all() and (seen.change.mean < seen.change.high).all()


def test_problems_of_steps_that_were_made_again_count_once(tmp_path):
    note(tmp_path, (1, {1: 0}), (2, {1: 8}), (3, {2: 3}), (2, {2: 1}))  # it went on from step 1
    assert visits(tmp_path) == {1: [(1, 0, 8)], 2: [(2, 1, 8)]}
    assert seen_again(tmp_path) is None and seen_again(tmp_path / "none") is None


def test_page_names_problems_gained_and_lost_once_there_are_any(tmp_path):
    run = write_run(tmp_path, history(**HEALTHY | GROUPS))
    assert "when last seen" not in watch.render(watch.take(run))
    note(run, (1, {7: 0, 3: 8}), (5, {7: 8, 3: 0}))
    page = watch.render(watch.take(run))
    assert "Gained: 1" in page and "Lost: 1" in page and "row 7" in page and "0 of 8" in page
    assert "2 problems were seen again; 1 were gained and 1 lost" in page


GROUPS = {
    "rapo/groups/pass@1": (0.2, 0.5),
    "rapo/groups/pass@2": 0.6,
    "rapo/groups/pass@8": 0.7,
    "rapo/groups/all_right": 0.1,
}


def test_training_groups_are_shown_at_one_and_at_all_attempts():
    first, last = readings(history(**GROUPS))
    assert (first.title, last.title) == ("Training groups: pass@1", "Training groups: pass@8")
    assert "40% of the groups have no spread" in last.sentence and last.level == FINE
    assert readings(history(**GROUPS | {"rapo/groups/all_right": 0.6}))[1].level == NOTE


def test_run_that_ended_by_an_alarm_says_so(tmp_path):
    run = write_run(tmp_path, history(**HEALTHY | {REWARD: (0.5, 0.05)}))
    (run / "collapsed.txt").write_text("step 38: unlearned: gone\n")
    assert watch.take(run).headline == "Ended because of an alarm, and saved: step 38: unlearned: gone"


@pytest.mark.parametrize(
    "changes, sounds",
    [
        ({}, False),
        ({"rapo/groups/pass@1": (0.2, 0.7), "rapo/groups/pass@8": (0.6, 0.7)}, True),
        ({"rapo/groups/pass@1": (0.2, 0.9), "rapo/groups/pass@8": (0.6, 0.99)}, False),  # nearly all is right
        ({"rapo/groups/pass@1": (0.2, 0.1), "rapo/groups/pass@8": (0.6, 0.12)}, False),  # `unlearned` tells of it
    ],
)
def test_sharpened_wants_a_pass_at_1_that_rises_and_attempts_that_help_no_more(changes, sounds):
    assert [alarm.name for alarm in alarms(history(**GROUPS | changes))] == ["sharpened"] * sounds
