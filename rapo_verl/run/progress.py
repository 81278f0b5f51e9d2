"""A progress bar for a training run, fed by the metrics file that veRL's file logger writes."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# (metric of veRL or ours, its label, format)
SHOWN = (
    ("critic/rewards/mean", "reward", ".3f"),
    ("actor/entropy", "entropy", ".3f"),
    ("rapo/forward_kl", "forward KL", ".4f"),
    ("timing_s/step", "s/step", ".1f"),
)


def bar_interval() -> float:
    """Return tqdm's ``mininterval`` in seconds: lively on a terminal, a few lines in a log."""
    return 0.5 if sys.stderr.isatty() else 20.0


class TrainingProgress(Progress):
    """Shows steps done, time left and a few metrics; on a plain pipe, a line every tenth of the run."""

    def __init__(self, config: DictConfig, metrics_file: Path):
        console, total = Console(stderr=True), config.trainer.total_training_steps
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.metrics_file, self.offset = metrics_file, 0
        self.started = self.active = time.monotonic()
        self.line_every = max(1, (total or 100) // 10)
        self.name = config.trainer.experiment_name
        self.bar = self.add_task(self.name, total=total, shown="starting Ray, the models and vLLM (about a minute)")

    def idle_seconds(self) -> float:
        """Return the seconds since a step was logged, or since the start."""
        return time.monotonic() - self.active

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def echo(self, text: str) -> None:
        """Print raw log text above the bar."""
        if text:
            self.console.out(text, end="", highlight=False)

    def look(self) -> None:
        """Read what the run has logged since the last call."""
        if not self.metrics_file.exists():
            return
        with self.metrics_file.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self.offset += len(line)
                self.active = time.monotonic()
                self._show(json.loads(line))

    def _show(self, record: dict[str, Any]) -> None:
        step, data = record["step"], record["data"]
        shown = ", ".join(f"{label} {data[key]:{form}}" for key, label, form in SHOWN if key in data)
        if not shown:
            return
        self.update(self.bar, completed=step, shown=shown)
        if not self.console.is_terminal and (step % self.line_every == 0 or step == 1):
            self.say(f"{self.name}: step {step}, {time.monotonic() - self.started:.0f} s, {shown}")
