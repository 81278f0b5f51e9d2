"""A mini cluster, and jobs on it, for the tests."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CLONE = HERE.parent.parent
SECRET = "planted-secret-6f1d0c"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip", "shellcheck")
# What a job could leave behind.
LEFT = r"raylet|rapo_verl|stub_trainer|sleep 4242|ray::"
# One step of the mini Slurm's scheduler is a second; a requeued job waits for about ten.
SETTINGS = {
    "RAPO_JOIN_SECONDS": "60",
    "RAPO_LOST_SECONDS": "15",
    "RAPO_END_SECONDS": "40",
    "RAPO_NODE_TMP": "/tmp/rapo-mini",
    "RAPO_SMOKE": "off",
    "HF_TOKEN": SECRET,
    "WANDB_API_KEY": SECRET,
}


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "not root: the mini cluster needs namespaces"
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return f"missing {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge shellcheck"
    probe = "ip link add br0 type bridge && mknod $0 c 1 3"
    device = f"/tmp/rapo-probe-{os.getpid()}"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "bash", "-c", probe, device], capture_output=True, text=True
    )
    Path(device).unlink(missing_ok=True)
    return None if done.returncode == 0 else f"no capability for namespaces and devices: {done.stderr.strip()}"


FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    def __init__(self, root: Path):
        self.root, self.work = root / "mini", root / "work"
        self.runs = self.work / "runs"
        self.runs.mkdir(parents=True)
        (self.work / "env").write_text(f"RAPO_RUNS={self.runs}\nRAPO_RUNTIME=venv\nRAPO_VENV={HERE}\n")
        (self.work / "env").chmod(0o600)
        (self.work / "secrets").write_text(f"MY_SECRET={SECRET}\n")
        (self.work / "secrets").chmod(0o600)

    def __call__(self, *verb, env=None, check=True, timeout=120) -> str:
        done = subprocess.run(
            ["bash", str(HERE / "mini_cluster.sh"), str(self.root), *map(str, verb)],
            capture_output=True, text=True, cwd=self.work, timeout=timeout, env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{verb}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *command, **kwargs) -> str:
        return self("exec", *command, **kwargs)

    def on(self, node, *command, **kwargs) -> str:
        return self("on", node, *command, **kwargs)

    def submit(self, name, *arguments, script="qwen7b_rapo.sh", options=(), command=None, **settings) -> "Job":
        stub = f"{sys.executable} {HERE / 'stub_trainer.py'}"
        env = {
            **SETTINGS,
            "RAPO_CLONE": str(CLONE),
            "RAPO_ENV_FILE": str(self.work / "env"),
            "TEST_PYTHON": sys.executable,
            "RAPO_COMMAND": stub if command is None else command,
            **{key: str(value) for key, value in settings.items()},
        }
        options = ["--parsable", "-J", name, "--cpus-per-task=4", *options]
        out = self.run("sbatch", *options, str(CLONE / "slurm" / script), *map(str, arguments), env=env)
        return Job(self, int(out), name)

    def processes(self) -> list[str]:
        """Return the command lines on all nodes that a job could have left."""
        found = []
        for node in (1, 2, 3):
            lines = self.on(node, "ps", "-eo", "args", check=False).splitlines()[1:]
            found += [f"n{node}: {line}" for line in lines if re.search(LEFT, line)]
        return found


@dataclass
class Job:
    cluster: Cluster
    id: int | str
    name: str

    def task(self, number: int) -> "Job":
        """Return a task of an array."""
        return Job(self.cluster, f"{self.id}_{number}", self.name)

    @property
    def facts(self) -> dict[str, str]:
        out = self.cluster.run("scontrol", "-o", "show", "job", str(self.id))
        return dict(pair.split("=", 1) for pair in out.split() if "=" in pair)

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def output(self) -> str:
        path = self.cluster.work / f"{self.name}-{self.facts['JobId']}.out"
        return path.read_text() if path.exists() else ""

    @property
    def run_dir(self) -> Path:
        return self.cluster.runs / self.name

    def until(self, what, timeout=180):
        """Wait for a state, or for a text in the output."""
        end = time.monotonic() + timeout
        while True:
            state = self.state
            if what(self) if callable(what) else what in self.output or what == state:
                return self
            over = time.monotonic() > end or state in FINAL
            assert not over, f"no {what}; {state}\n{self.output}\n{self.logs()}"
            time.sleep(0.5)

    def ended(self, state, code, timeout=240) -> str:
        """Wait for the end, check state and exit code and that no process is left; return the job's output."""
        self.until(lambda job: job.state in FINAL, timeout)
        facts = self.facts
        got = (facts["JobState"], facts["ExitCode"])
        assert got == (state, f"{code}:0"), f"{got}\n{self.output}\n{self.logs()}"
        return self.output

    def logs(self) -> str:
        """Return the ends of all logs, for a failing assertion."""
        files = sorted(path for path in self.run_dir.glob("slurm/*.*/*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-800:]}" for path in files)

    def steps(self) -> list[int]:
        """Return the steps in the newest checkpoint, in the order in which they were done."""
        import json

        from rapo_verl.run.checkpoints import read_checkpoints

        return json.loads((read_checkpoints(self.run_dir / "checkpoints")[-1].folder / "state.json").read_text())
