"""A trainer of the right outline and no weight: steps, saves, stops and resumes as `rapo train` does, in seconds.

Its state is the list of the steps it has done, so that a lost or a repeated step shows. Arguments as of `rapo train`,
of which it reads run_dir=; settings from the environment, FAULT among them.
"""

import json
import os
import sys
import time
from pathlib import Path

from rapo_verl.run import checkpoints
from rapo_verl.run.files import write_atomic
from rapo_verl.run.names import COLLAPSED, DUMP_FILE, SAVED, STALLED, STATE_VARIABLE
from rapo_verl.run.stopping import Stopping

WANTED = {"model": "stub", "data": "stub", "world": "stub"}


def save(root, done):
    folder = root / f"global_step_{len(done)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps(done) + " " * int(os.environ.get("SAVE_BYTES", "0")))
    write_atomic(root / checkpoints.TRACKER, str(len(done)))
    checkpoints.finish(folder, len(done), WANTED)


def main():
    # Quoted for Hydra, as launch.sh names it.
    run_dir = Path(next(arg for arg in sys.argv if arg.startswith("run_dir=")).removeprefix("run_dir=").strip("'"))
    root, fault = run_dir / "checkpoints", os.environ.get("FAULT", "")
    if fault == "refuse":
        print("rapo: 1 problem(s); nothing was started: the stub was told to refuse")
        return 2
    if "--dry-run" in sys.argv:
        print(f"plan: {' '.join(sys.argv[1:])}")
        return 0
    root.mkdir(parents=True, exist_ok=True)
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    step, said = checkpoints.choose(root, WANTED)
    print("\n".join([f"stub: goes on from step {step}", *said]), flush=True)
    done = json.loads((root / f"global_step_{step}" / "state.json").read_text()) if step else []
    stopping = Stopping.from_environment()
    stopping.margin = float(os.environ.get("MARGIN", "2"))
    total, save_freq = int(os.environ.get("STEPS", "6")), int(os.environ.get("SAVE_FREQ", "1"))
    while len(done) < total:
        time.sleep(float(os.environ.get("STEP_SECONDS", "0.2")))
        done.append(len(done) + 1)
        print(f"stub: attempt {attempt} step {len(done)}", flush=True)
        if fault == "exit7" and len(done) == 2:
            print("ValueError: the stub was told to fail", flush=True)
            return 7
        if fault == "orphan" and len(done) == 2:
            # Leaves its parent as Ray's daemons do.
            os.system("setsid sleep 4242 </dev/null >/dev/null 2>&1 &")
        if fault == "stall" and len(done) == 2:
            (Path(os.environ[STATE_VARIABLE]) / DUMP_FILE).touch()
            time.sleep(8)
            return STALLED
        if fault == "collapse" and len(done) == 2:
            save(root, done)
            return COLLAPSED
        reason = stopping.reason()
        if reason or len(done) % save_freq == 0 or len(done) == total:
            save(root, done)
        if reason and len(done) < total:
            print(f"stub: {reason}; saved step {len(done)}", flush=True)
            return SAVED
    return 0


if __name__ == "__main__":
    sys.exit(main())
