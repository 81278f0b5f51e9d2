"""When a run is to save and stop before its last step: a stop file appears, or its time is nearly up."""

import os
import time
from pathlib import Path

from rapo_verl.run.names import DEADLINE_VARIABLE, STOP_FILE_VARIABLE

# Seconds kept for what is neither step nor save: Slurm may act a minute early.
MARGIN = 90.0


class Stopping:
    """Asked after each step whether to go on.

    Args:
        stop_file: the run stops when it exists.
        deadline: Unix time in seconds; the run stops when the next step and its save might not fit before it.
    """

    def __init__(self, stop_file: Path | None, deadline: float | None, margin: float = MARGIN):
        self.stop_file, self.deadline, self.margin = stop_file, deadline, margin
        self.longest = {"step": 0.0, "save": 0.0, "validation": 0.0}

    @classmethod
    def from_environment(cls) -> "Stopping":
        """Return what `rapo train` and slurm/launch.sh have told this process."""
        stop_file, deadline = os.environ.get(STOP_FILE_VARIABLE), os.environ.get(DEADLINE_VARIABLE)
        return cls(Path(stop_file) if stop_file else None, float(deadline) if deadline else None)

    def note(self, **seconds: float) -> None:
        """Remember how long a ``step`` (without its save), a ``save`` or a ``validation`` took."""
        self.longest |= {what: max(self.longest[what], took) for what, took in seconds.items()}

    def reason(self) -> str | None:
        """Return why to save and stop now, None to go on."""
        if self.stop_file is not None and self.stop_file.exists():
            return f"{self.stop_file} was made"
        needed = sum(self.longest.values()) + self.margin
        if self.deadline is not None and time.time() + needed > self.deadline:
            left = self.deadline - time.time()
            return (
                f"{left:.0f} s are left, a step, a save, a validation and {self.margin:.0f} s might take {needed:.0f} s"
            )
        return None
