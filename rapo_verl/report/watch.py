"""`rapo watch`: one page of a run's folder, which may be in the middle of being written; it is only read."""

import http.server
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text
from yaml import YAMLError

from rapo_verl import Refused
from rapo_verl.report.dumps import newest_dump, samples
from rapo_verl.report.problems import SHOWN, Seen, seen_again, told
from rapo_verl.run import folder
from rapo_verl.run.alarms import Alarm, alarms
from rapo_verl.run.files import filled
from rapo_verl.run.lock import DEAD_SECONDS
from rapo_verl.run.names import (
    BAD_BATCHES_DIR,
    COLLAPSED_FILE,
    CONFIG_FILE,
    FAILURE_FILE,
    LOCK_FILE,
    LOG_FILE,
    METRICS_DIR,
    STOPPED_FILE,
)
from rapo_verl.run.signs import FINE, WARN, WINDOW, History, Reading, readings, series

# A run is silent after so many of its own steps, and so many seconds, without a record.
SILENT_STEPS, SILENT_SECONDS = 10, 600
HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Snapshot(NamedTuple):
    """A run as its folder has it now.

    Attributes:
        headline: how it stands, in one sentence; ``level`` says whether that is good.
        stages: of the mean step of the last records: name, seconds and share.
        facts: label and text each.
        samples: of the newest dump, by the title of their list; empty if the run keeps none.
    """

    name: str
    headline: str
    level: str
    step: int
    total: int | None
    progress: str
    alarms: list[Alarm]
    readings: list[Reading]
    stages: list[tuple[str, float, float]]
    facts: list[tuple[str, str]]
    seen: Seen | None
    samples: dict[str, list[dict[str, str]]]


def take(run: Path) -> Snapshot:
    """Return a run as its folder has it; Refused if it is no run's."""
    if not (run / CONFIG_FILE).is_file() and not (run / METRICS_DIR).is_dir():
        raise Refused(f"{run} is no run's folder: it has neither {CONFIG_FILE} nor {METRICS_DIR}/")
    config = _config(run / CONFIG_FILE)
    history = folder.read_metrics(run)
    step = int(history[-1]["step"]) if history else 0
    total = OmegaConf.select(config, "trainer.total_training_steps")
    seconds = series(history, "timing_s/step")[1][-4 * WINDOW :]
    median = float(np.median(seconds)) if len(seconds) else None
    sounding = alarms(history)
    headline, level = _stands(run, step, total, median, sounding)
    left = f", about {_duration((total - step) * median)} left" if total and median and step < total else ""
    dump = newest_dump(config)
    return Snapshot(
        name=str(OmegaConf.select(config, "trainer.experiment_name") or run.resolve().name),
        headline=headline,
        level=level,
        step=step,
        total=total,
        progress=f"step {step}{f' of {total}' if total else ''}{left}",
        alarms=sounding,
        readings=readings(history),
        stages=_stages(history),
        facts=_facts(history, median),
        seen=seen_again(run),
        samples=samples(dump),
    )


def _config(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except (OSError, YAMLError, OmegaConfBaseException):
        return OmegaConf.create()
    return config if isinstance(config, DictConfig) else OmegaConf.create()


def _stands(run: Path, step: int, total: int | None, median: float | None, sounding: list[Alarm]) -> tuple[str, str]:
    failure, stopped = run / FAILURE_FILE, run / STOPPED_FILE
    if failure.is_file():
        return f"The reward function failed: {failure}.", WARN
    # One of an earlier step was mended, and trained on.
    bad = [path for path in (run / BAD_BATCHES_DIR).glob("step_*.pt") if int(path.stem.removeprefix("step_")) > step]
    if bad:
        return f"It stopped on NaN or infinity: rapo inspect-batch {bad[0]}.", WARN
    ended = bool(total and step >= total)
    if sounding:
        if (run / COLLAPSED_FILE).is_file():
            return f"Ended because of an alarm, and saved: {(run / COLLAPSED_FILE).read_text().strip()}", WARN
        since, names = min(alarm.since for alarm in sounding), ", ".join(alarm.name for alarm in sounding)
        return f"{'Collapsed' if ended else 'Collapsing'} since step {since}: {names}.", WARN
    if ended:
        return "Finished, and no alarm holds at its end.", FINE
    if stopped.is_file():
        return "It has saved and stopped before its last step; the same command goes on.", FINE
    lock = run / LOCK_FILE
    if lock.is_file() and (not lock.read_text().strip() or time.time() - lock.stat().st_mtime > 3 * DEAD_SECONDS):
        return f"No process trains here any more, and its last step was not made: {run / LOG_FILE} says why.", WARN
    if not step:
        return "No step has been logged yet: Ray, the models and vLLM take minutes to start.", FINE
    silent = time.time() - max(path.stat().st_mtime for path in (run / METRICS_DIR).glob("*.jsonl"))
    if silent > max(SILENT_SECONDS, SILENT_STEPS * (median or 0)):
        return f"Nothing logged for {_duration(silent)}: it has ended, or hangs.", WARN
    return "Training, and no alarm holds.", FINE


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _stages(history: History) -> list[tuple[str, float, float]]:
    last = history[-WINDOW:]
    keys = {key for record in last for key in record if key.startswith("timing_s/")} - {"timing_s/step"}
    whole = series(last, "timing_s/step")[1]
    if not len(whole) or not whole.sum():
        return []
    # Per step, also of what not every step has, a save for one.
    parts = {key: float(series(last, key)[1].sum()) / len(whole) for key in keys}
    mean = float(whole.mean())
    named = [(key.removeprefix("timing_s/"), part, part / mean) for key, part in parts.items() if part > 0.01 * mean]
    return sorted(named, key=lambda stage: -stage[1])


def _facts(history: History, median: float | None) -> list[tuple[str, str]]:
    last = history[-WINDOW:]
    facts = [("Median step", f"{median:.1f} s")] if median else []
    for key, label, form in (
        ("perf/throughput", "Throughput", "{:,.0f} tokens / s and GPU"),
        ("perf/mfu/actor", "MFU of the update", "{:.1%}"),
        ("actor/perf/max_memory_allocated_gb", "Actor's memory, peak", "{:.1f} GB allocated"),
        ("actor/perf/cpu_memory_used_gb", "Host memory", "{:.1f} GB"),
        ("actor/lr", "Learning rate", "{:.2g}"),
    ):
        values = series(last, key)[1]
        if len(values) and values[-1]:
            facts.append((label, form.format(values.mean() if key.startswith("perf/") else values[-1])))
    counts = []
    for key in last[-1] if last else {}:
        if key.startswith("rapo/verifier/") and len(values := series(last[-1:], key)[1]) and values[0]:
            counts.append(f"{values[0]:.0f} {key.rpartition('/')[2]}")
    return facts + ([("Verdicts of the last step", ", ".join(counts))] if counts else [])


def render(shot: Snapshot, *, refresh: int | None = None) -> str:
    """Return the page; refresh: seconds after which a browser asks again."""
    template, written = Path(__file__).parent / "watch.html.j2", time.strftime("%F %T")
    return filled(template, {"tick": _tick}, s=shot, told=told, shown=SHOWN, refresh=refresh, written=written)


def _tick(value: float) -> str:
    return "0" if abs(value) < 1e-6 else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.3g}"


def show(shot: Snapshot, console: Console) -> None:
    """Print a snapshot to a terminal."""
    console.print(
        Text(f"{shot.name}: {shot.progress}. {shot.headline}", style="bold red" if shot.level == WARN else "bold")
    )
    for alarm in shot.alarms:
        console.print(Text(f"{alarm.name}, since step {alarm.since}: {alarm.sentence}", style="red"))
    table = Table("", "what it means now", box=None)
    for reading in shot.readings:
        style = {FINE: "", WARN: "red"}.get(reading.level, "yellow")
        table.add_row(Text(reading.title), Text(reading.sentence, style=style))
    for label, text in shot.facts:
        table.add_row(Text(label, style="dim"), Text(text, style="dim"))
    if shot.seen:
        table.add_row(Text("Problems seen again", style="dim"), Text(told(shot.seen), style="dim"))
    if shot.stages:
        stages = ", ".join(f"{name} {seconds:.1f} s ({share:.0%})" for name, seconds, share in shot.stages)
        table.add_row(Text("Where a step's time goes", style="dim"), Text(stages, style="dim"))
    console.print(table)


def serve(run: Path, port: int, refresh: int) -> None:
    """Serve the page on this machine's loopback until Ctrl-C."""
    take(run)  # refuses now what it would refuse at every request
    # Half a line is what a running run leaves at any moment, and would be told at every refresh.
    folder.logger.setLevel(logging.ERROR)

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's name that resolves to this machine must not read the page through a browser.
            host = self.headers.get("Host", "").rsplit(":", 1)[0]
            if host not in HOSTS or self.path != "/":
                self.send_error(404)
                return
            body = render(take(run), refresh=refresh).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing of each request."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise Refused(f"port {port} cannot be had ({error}); give another with --port") from error
    with server:
        print(f"http://localhost:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
