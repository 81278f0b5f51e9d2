"""The Slurm scripts without a Slurm: tests/slurm has them on a real one."""

import os
import re
import shutil
import subprocess
import sys
import time
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
    jobs = [script for script in SCRIPTS if script.name not in ("launch.sh", "compare.sh", "part.sh")]
    assert len(jobs) == 12
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


def test_comparison_samples_the_answers_before_the_training_that_reads_them(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(CLONE / "slurm", clone / "slurm")

    def lines():
        done = subprocess.run(
            [str(clone / "slurm" / "compare.sh"), "3b", "--answers", "--dry-run", "data.seed=3"],
            capture_output=True, text=True, env={**os.environ, "RAPO_ENV_FILE": str(CLONE / "slurm" / "env.example")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    folder = clone / "answers" / "qwen2.5_3b"
    assert str(folder).endswith(compose_config(["experiment=qwen2.5_3b_rapo_answers"]).rapo.forward_kl.samples)
    chain = [line for line in lines() if "answers" in line]
    assert f"eval_passk.sh Qwen/Qwen2.5-3B {folder} --data data/simplerl-8k.parquet" in chain[0]
    assert "afterok:<sample_answers>" in chain[1] and chain[1].endswith(f"slurm/reference_answers.sh {folder}")
    assert "--dependency=singleton,afterok:<answers> slurm/qwen3b_rapo_answers.sh data.seed=3" in chain[2]
    assert "afterok:<qwen3b_rapo_answers> slurm/eval_passk.sh" in chain[3]
    folder.mkdir(parents=True)
    (folder / "answers.parquet").touch()
    assert "sbatch slurm/qwen3b_rapo_answers.sh data.seed=3" in lines()


def accepted(tmp_path, script, *arguments, **environment):
    """Return what the real command line makes of the arguments that a script gives to launch.sh."""
    launcher = tmp_path / "slurm" / "launch.sh"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    shutil.copy(CLONE / "slurm" / "part.sh", launcher.parent)
    env = {**os.environ, "RAPO_CLONE": str(tmp_path), "SLURM_SUBMIT_DIR": "/home/you", **environment}
    done = subprocess.run([CLONE / "slurm" / script, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        return done.returncode, done.stderr
    name, *args = done.stdout.splitlines()
    command = typer.main.get_command(app).commands[name]
    if hasattr(command, "commands"):
        name, *args = args
        command = command.commands[name]
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
    array = {
        "SLURM_ARRAY_TASK_ID": "4",
        "SLURM_ARRAY_TASK_MIN": "2",
        "SLURM_ARRAY_TASK_MAX": "9",
        "SLURM_ARRAY_TASK_COUNT": "8",
    }
    _, given = accepted(tmp_path, "eval_passk.sh", "m", "--data", "a.parquet", "b.parquet", "--draw", "2", **array)
    assert (given["part"], given["draw"], given["out"]) == ("2/8", 2, Path("/home/you/evals/m"))
    assert [str(path) for path in (*given["data"], *given["more"])] == ["a.parquet", "b.parquet"]


def test_report_script_gives_what_the_command_takes(tmp_path):
    _, given = accepted(tmp_path, "eval_report.sh", "out", "base", "rapo", "--hard-from", "base_draw2")
    assert given["score"] and str(given["hard_from"]) == "base_draw2" and str(given["out"]) == "out"
    assert [str(path) for path in given["folders"]] == ["base", "rapo"]


def test_answers_script_gives_what_the_command_takes(tmp_path):
    _, given = accepted(tmp_path, "reference_answers.sh", "answers/base", "--strictness", "integer")
    assert str(given["folder"]) == "answers/base" and given["strictness"] == "integer"


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_training_scripts_name_recipes_and_their_nodes(size):
    # The methods of a size differ in the method only: tests/test_recipes.py, which also dry-runs them. launch.sh sets
    # the two numbers from the job, so that what was checked there is what runs here.
    trainer = compose_config([f"experiment=qwen2.5_{size}_rapo"]).trainer
    for method in ("rapo", "rapo_answers", "grpo", "grpo_reverse_kl"):
        text = (CLONE / "slurm" / f"qwen{size}_{method}.sh").read_text()
        assert f" train experiment=qwen2.5_{size}_{method} " in text and f"qwen2.5_{size}_{method}" in experiments()
        assert f"--nodes={trainer.nnodes}\n" in text and f"--gpus-per-node={trainer.n_gpus_per_node}\n" in text


def test_comparison_without_the_clusters_facts_says_what_to_do(tmp_path):
    done = subprocess.run(
        [str(CLONE / "slurm" / "compare.sh"), "3b"],
        capture_output=True, text=True, env={**os.environ, "RAPO_ENV_FILE": str(tmp_path / "none")},
    )  # fmt: skip
    assert done.returncode == 2 and "cp slurm/env.example slurm/env" in done.stderr


@pytest.mark.parametrize(
    ("numbers", "step"), [((2, 5), 1), ((0, 2, 4, 6), 2), ((0, 1, 2, 7), 1), ((3,), 1), ((9, 1, 4), 1), ((5, 6, 7), 1)]
)
def test_tasks_of_any_array_make_every_part_once(tmp_path, numbers, step):
    array = {
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_MIN": min(numbers),
        "SLURM_ARRAY_TASK_MAX": max(numbers),
        "SLURM_ARRAY_TASK_STEP": step,
        "SLURM_ARRAY_TASK_COUNT": len(numbers),
    }
    # Each twice, as if requeued.
    parts = [
        accepted(tmp_path, "eval_passk.sh", "m", str(tmp_path / "out"), "--data", "a.parquet",
                 **{key: str(value) for key, value in array.items()}, SLURM_ARRAY_TASK_ID=str(number))[1]["part"]
        for number in numbers * 2
    ]  # fmt: skip
    assert sorted(parts[: len(numbers)]) == [f"{i}/{len(numbers)}" for i in range(len(numbers))]
    assert parts[len(numbers) :] == parts[: len(numbers)]


STANDINS = {
    "scontrol": "seq -f n%g $SLURM_JOB_NUM_NODES",
    # The verdict that a node's agent would leave, and what it would be told.
    "srun": """while [[ $1 != rapo-node ]]; do shift; done; shift
printf 'code: 0\\n' >"$RAPO_STATE/verdict"; printf 'argument %s\\n' "$@"; printf 'deadline %s\\n' "$RAPO_DEADLINE"
printf 'seen %s\\n' "${SEEN-}" """,
    "squeue": 'echo "${SQUEUE_SAYS-}"; exit "${SQUEUE_CODE-0}"',
}


def launch(tmp_path, *arguments, facts="", nodes=2, **environment):
    """Return what slurm/launch.sh gives to a node's agent, with stand-ins for Slurm's commands."""
    for name, code in STANDINS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    venv, env_file = Path(sys.executable).parent.parent, tmp_path / "env"
    env_file.write_text(f"RAPO_RUNS={tmp_path}/runs\nRAPO_RUNTIME=venv\nRAPO_VENV={venv}\n{facts}")
    env_file.chmod(0o600)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAPO"))}
    inherited.pop("LD_LIBRARY_PATH", None)
    env = {
        **inherited, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RAPO_ENV_FILE": str(env_file),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a_run", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "n[1-9]", **environment,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(CLONE / "slurm" / "launch.sh"), *arguments], capture_output=True, text=True, env=env
    )
    told = [line.removeprefix("argument ") for line in done.stdout.splitlines() if line.startswith("argument ")]
    return done.returncode, told, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("says", "code", "known"),
    [
        ("", 0, False),
        ("", 1, False),
        ("slurm_load_jobs error: Unable to contact slurm controller", 1, False),
        ("N/A", 0, False),
        ("2001-01-01T00:00:00", 0, False),
        ("tomorrow", 0, False),
        ("2037-05-06T07:08:09\n2037-05-06T07:08:10", 0, False),
        ("2037-05-06T07:08:09", 1, False),
        ("2037-05-06T07:08:09", 0, True),
    ],
)
def test_no_answer_of_slurm_is_no_deadline(tmp_path, says, code, known):
    _, _, output = launch(tmp_path, "train", SQUEUE_SAYS=says, SQUEUE_CODE=str(code))
    (deadline,) = (line.removeprefix("deadline ") for line in output.splitlines() if line.startswith("deadline"))
    want = time.mktime(time.strptime("2037-05-06T07:08:09", "%Y-%m-%dT%H:%M:%S"))
    assert deadline == (f"{want:.0f}" if known else "")


@pytest.mark.parametrize(
    "line",
    [
        "SEEN=/x:$NOT_SET", "SEEN=/x:; false", "module() { return 1; }; SEEN=/x:; module load cuda",
        "SEEN=/x:; [[ -n $NOT_SET ]] && A=1", "set -euo pipefail; SEEN=/x:; return 0", "SEEN=/x:; no-such-command-here",
    ],
)  # fmt: skip
def test_what_a_shells_startup_may_hold_does_not_end_the_job(tmp_path, line):
    code, _, output = launch(tmp_path, "train", facts=line + "\n")
    assert code == 0 and "seen /x:" in output


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("exit 0", "has left the shell"), ("if true; then", "is no shell code"), ("A=1\r", "line ends of Windows"),
        ("RAPO_JOIN_SECONDS=5m", "RAPO_JOIN_SECONDS=5m is no whole number"), ("RAPO_RUNS=runs", "is relative"),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_read_are_refused_with_a_word(tmp_path, line, said):
    code, told, output = launch(tmp_path, "train", facts=line + "\n")
    assert code == 2 and told == [] and said in output


@pytest.mark.parametrize("name", ["a=b", "a,b", "a(b)", "it's", "a#b", "a b", "a$b", "a:b", '"a"', "[a]", "{a}", "~a"])
def test_any_name_of_a_job_is_its_run_folder(tmp_path, name):
    _, told, _ = launch(tmp_path, "train", "experiment=qwen2.5_7b_rapo", SLURM_JOB_NAME=name)
    config = compose_config(told[1:])
    assert config.run_dir == f"{tmp_path}/runs/{name}"
    assert (tmp_path / "runs" / name / "slurm").is_dir()


def test_name_that_hydra_would_interpolate_is_refused(tmp_path):
    code, _, output = launch(tmp_path, "train", SLURM_JOB_NAME="a${b}c")
    assert code == 2 and "begins an interpolation" in output


def test_quoted_run_folder_is_the_one_that_hydra_reads(tmp_path):
    folder = tmp_path / "a (b)"
    code, told, _ = launch(tmp_path, "train", "experiment=qwen2.5_7b_rapo", f"run_dir='{folder}'")
    assert code == 0 and compose_config(told[1:]).run_dir == str(folder) and (folder / "slurm").is_dir()


@pytest.mark.parametrize(
    ("overrides", "trainers"),
    [
        ([], 4),
        (["trainer.nnodes=2"], 2),
        (["trainer.v1.trainer_mode=rapo_separate_async", "actor_rollout_ref.rollout.nnodes=1"], 3),
        (["actor_rollout_ref.rollout.nnodes=1", "trainer.nnodes=1"], 1),
    ],
)
def test_trainer_takes_the_jobs_nodes_but_for_the_users_own(tmp_path, overrides, trainers):
    _, told, _ = launch(tmp_path, "train", "experiment=qwen2.5_7b_rapo", *overrides, nodes=4)
    trainer = compose_config(told[1:]).trainer
    assert (trainer.nnodes, trainer.n_gpus_per_node) == (trainers, 8)


def test_rollout_that_leaves_the_trainer_no_node_is_refused(tmp_path):
    code, _, output = launch(tmp_path, "train", "actor_rollout_ref.rollout.nnodes=2")
    assert code == 2 and "leaves the trainer none of 2 node(s)" in output
