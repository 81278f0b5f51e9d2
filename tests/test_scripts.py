"""The Slurm scripts without a Slurm: tests/slurm has them on a real one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    assert len(lines) == 8 and all(line.startswith("sbatch ") for line in lines)
    for method in ("grpo", "grpo_reverse_kl", "rapo"):
        assert f"sbatch slurm/qwen7b_{method}.sh data.seed=3" in lines
        assert any(f"afterok:<qwen7b_{method}> slurm/eval_passk.sh" in line for line in lines)
    evals = [f"<eval_{name}>" for name in ("base", "qwen7b_grpo", "qwen7b_grpo_reverse_kl", "qwen7b_rapo")]
    assert f"--dependency=afterok:{':'.join(evals)} slurm/eval_report.sh" in lines[-1]


def test_comparison_without_the_clusters_facts_says_what_to_do(tmp_path):
    done = subprocess.run(
        [str(CLONE / "slurm" / "compare.sh"), "3b"],
        capture_output=True, text=True, env={**os.environ, "RAPO_ENV_FILE": str(tmp_path / "none")},
    )  # fmt: skip
    assert done.returncode == 2 and "cp slurm/env.example slurm/env" in done.stderr
