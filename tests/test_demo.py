"""The demo's evaluation and report: its commands are those that a user has; only the engines are stubs here."""

import json
import shutil

import pytest
from stub_evaluation import StubEngine, run
from typer.testing import CliRunner

from rapo_verl import Failed
from rapo_verl.cli import app
from rapo_verl.toy import demo
from rapo_verl.toy.make import MODEL_DIR


@pytest.fixture
def models(toy_dir, tmp_path):
    """The toy's base and two others, told apart by a setting that changes no text of a stub."""
    (toy_dir / "world.json").write_text(json.dumps({"world_seed": 0, "eval": [24, 99]}))
    found = {"base": toy_dir / MODEL_DIR}
    for i, key in enumerate(("rapo", "grpo"), 1):
        found[key] = shutil.copytree(toy_dir / MODEL_DIR, tmp_path / key)
        config = json.loads((found[key] / "config.json").read_text())
        (found[key] / "config.json").write_text(json.dumps(config | {"note": i}))
    return found


def test_models_are_sampled_judged_and_enumerated_and_hard_is_of_another_draw(toy_dir, models, tmp_path, monkeypatch):
    commands = []

    def rapo(folder, *arguments, parts=1):
        commands.append(arguments[1])
        done = CliRunner().invoke(app, [*map(str, arguments)])
        assert done.exit_code == 0, done.output

    monkeypatch.setattr(demo, "_rapo", rapo)
    monkeypatch.setattr("rapo_verl.evaluation.session.generate_draw", lambda draw, _: run(draw, StubEngine())[1])
    demo.evaluate(models, toy_dir, tmp_path / "eval", n=8, limit=12)
    assert commands == ["generate"] * 4 + ["score"]
    labels = {"base": "base", "grpo": "GRPO", "rapo": "RAPO"}
    numbers = demo.write_demo_report(tmp_path, labels, {"command": "rapo demo"})
    assert numbers.study.names == ["base", "GRPO", "RAPO"] and len(numbers.study.base.ids) == 12
    assert (numbers.study.base.draw, numbers.study.hard_choice.draw) == (1, 2)
    assert all(0 < p < 1 for result in numbers.study.results for p in result.exact)
    assert (tmp_path / "report.html").exists()


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(Failed, match=r"`rapo eval score` ended with exit code 2; see .*evaluate.log"):
        demo._rapo(tmp_path, "eval", "score", tmp_path)


def test_parts_run_side_by_side_and_end_together_on_an_interrupt(tmp_path, monkeypatch):
    started, killed = [], []

    class Part:
        def __init__(self, command, **_):
            started.append(command[-2:])
            self.number = len(started)

        def wait(self):
            assert len(started) == 2
            if self.number == 2:
                raise KeyboardInterrupt
            return 0

        def kill(self):
            killed.append(self.number)

    monkeypatch.setattr(demo.subprocess, "Popen", Part)
    with pytest.raises(KeyboardInterrupt):
        demo._rapo(tmp_path, "eval", "generate", parts=2)
    assert started == [["--part", "0/2"], ["--part", "1/2"]] and killed == [1, 2]
