"""The Slurm scripts without a Slurm: tests/slurm has them on a real one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from rapo_verl.cli import app
from rapo_verl.run.compose import compose_config, experiments

CLONE = Path(__file__).parent.parent
SCRIPTS = sorted((CLONE / "slurm").glob("*.sh"))


def test_scripts_are_shellcheck_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    files = [*SCRIPTS, *(CLONE / "tests" / "slurm").glob("*.sh"), *(CLONE / "tests" / "slurm" / "bin").iterdir()]
    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_job_scripts_are_thin_and_name_no_hyperparameter():
    jobs = [script for script in SCRIPTS if script.name not in ("launch.sh", "compare.sh")]
    assert len(jobs) == 8
    for script in jobs:
        lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) <= 15 and os.access(script, os.X_OK)
        assert not re.search(r"\blr\b|batch_size|\.yaml|[a-z]\.[a-z_]+=", "\n".join(lines)), script
    for script in (script for script in jobs if script.name.startswith("qwen")):
        text = script.read_text()
        for want in ("--requeue", "--open-mode=append", "--signal=B:USR1@", "--dependency=singleton"):
            assert f"#SBATCH {want}" in text
        assert f"#SBATCH --job-name={script.stem}\n" in text


def test_scripts_touch_no_process_of_others_and_print_no_environment():
    for script in SCRIPTS:
        code = "\n".join(line.split("#")[0] for line in script.read_text().splitlines())
        assert not re.search(r"ray stop|pkill|killall|set -x|printenv|\benv\b *$", code), script


def test_comparison_chains_trainings_evaluations_and_report(tmp_path):
    done = subprocess.run(
        [str(CLONE / "slurm" / "compare.sh"), "7b", "--dry-run", "data.seed=3"],
        capture_output=True, text=True, env={**os.environ, "RAPO_ENV_FILE": str(CLONE / "slurm" / "env.example")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 9 and all(line.startswith("sbatch ") for line in lines)
    for method in ("grpo", "grpo_reverse_kl", "rapo"):
        assert f"sbatch slurm/qwen7b_{method}.sh data.seed=3" in lines
        assert any(f"afterok:<qwen7b_{method}> slurm/eval_passk.sh" in line for line in lines)
    assert any("/compare_7b/base_draw2 --draw 2" in line for line in lines)
    evals = [
        f"<eval_{name}>" for name in ("base", "base_draw2", "qwen7b_grpo", "qwen7b_grpo_reverse_kl", "qwen7b_rapo")
    ]
    assert f"--dependency=afterok:{':'.join(evals)} slurm/eval_report.sh" in lines[-1]
    assert lines[-1].endswith("--hard-from " + str(CLONE / "evals" / "compare_7b" / "base_draw2"))


def accepted(tmp_path, script, *arguments, **environment):
    """Return what the real command line makes of the arguments that a script gives to launch.sh."""
    launcher = tmp_path / "slurm" / "launch.sh"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    env = {**os.environ, "RAPO_CLONE": str(tmp_path), "SLURM_SUBMIT_DIR": "/home/you", **environment}
    done = subprocess.run([CLONE / "slurm" / script, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        return done.returncode, done.stderr
    group, name, *args = done.stdout.splitlines()
    command = typer.main.get_command(app).commands[group].commands[name]
    return 0, command.make_context(name, args).params


def test_evaluation_script_gives_what_the_command_takes(tmp_path):
    code, said = accepted(tmp_path, "eval_passk.sh", "Qwen/Qwen2.5-7B")
    assert code == 2 and "rapo data prepare aime24 aime25 --model Qwen/Qwen2.5-7B --out" in said
    (tmp_path / "data").mkdir()
    for name in ("aime24", "aime25"):
        (tmp_path / "data" / f"{name}.parquet").touch()
    _, given = accepted(tmp_path, "eval_passk.sh", "Qwen/Qwen2.5-7B")
    assert (given["model"], given["ray"], given["part"]) == ("Qwen/Qwen2.5-7B", "auto", "0/1")
    assert [path.name for path in (*given["data"], *given["more"])] == ["aime24.parquet", "aime25.parquet"]
    assert given["out"] == Path("/home/you/evals/Qwen2.5-7B") and given["preset"] == "rapo-paper"
    # A task of --array=2-9, with options and data of its own.
    array = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "8"}
    _, given = accepted(tmp_path, "eval_passk.sh", "m", "--data", "a.parquet", "b.parquet", "--draw", "2", **array)
    assert (given["part"], given["draw"], given["out"]) == ("2/8", 2, Path("/home/you/evals/m"))
    assert [str(path) for path in (*given["data"], *given["more"])] == ["a.parquet", "b.parquet"]


def test_report_script_gives_what_the_command_takes(tmp_path):
    _, given = accepted(tmp_path, "eval_report.sh", "out", "base", "rapo", "--hard-from", "base_draw2")
    assert given["score"] and str(given["hard_from"]) == "base_draw2" and str(given["out"]) == "out"
    assert [str(path) for path in given["folders"]] == ["base", "rapo"]


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_training_scripts_name_recipes_and_their_nodes(size):
    # The methods of a size differ in the method only: tests/test_recipes.py, which also dry-runs them. launch.sh sets
    # the two numbers from the job, so that what was checked there is what runs here.
    trainer = compose_config([f"experiment=qwen2.5_{size}_rapo"]).trainer
    for method in ("rapo", "grpo", "grpo_reverse_kl"):
        text = (CLONE / "slurm" / f"qwen{size}_{method}.sh").read_text()
        assert f" train experiment=qwen2.5_{size}_{method} " in text and f"qwen2.5_{size}_{method}" in experiments()
        assert f"--nodes={trainer.nnodes}\n" in text and f"--gpus-per-node={trainer.n_gpus_per_node}\n" in text


def test_comparison_without_the_clusters_facts_says_what_to_do(tmp_path):
    done = subprocess.run(
        [str(CLONE / "slurm" / "compare.sh"), "3b"],
        capture_output=True, text=True, env={**os.environ, "RAPO_ENV_FILE": str(tmp_path / "none")},
    )  # fmt: skip
    assert done.returncode == 2 and "cp slurm/env.example slurm/env" in done.stderr
