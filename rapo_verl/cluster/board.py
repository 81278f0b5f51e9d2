"""What the nodes of a job tell each other, as files in one shared folder.

Files, since they need no port, outlive every process and can be read afterwards. The first verdict stands: it names the
cause, later ones its consequences.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rapo_verl.run.files import write_atomic

VERDICT = "verdict"
# Each node looks into the folder and writes a file there once a beat, which is longer with more nodes: a shared
# filesystem sees some hundred operations a second, of however many nodes.
BEAT_SECONDS, NODES_A_SECOND = 1.0, 16


class Board:
    """The shared folder of one attempt of a job (RAPO_STATE, made by slurm/launch.sh), seen from one of its nodes."""

    def __init__(self, folder: Path, node: int, hosts: list[str]):
        self.folder, self.node, self.hosts = folder, node, hosts
        self.beat_seconds = max(BEAT_SECONDS, len(hosts) / NODES_A_SECOND)
        self._told: dict[str, Any] = {}
        self._beats: dict[int, tuple[str, float]] = {}
        self._beaten = -self.beat_seconds

    @property
    def host(self) -> str:
        """Return this node's name."""
        return self.hosts[self.node]

    def log_file(self, what: str) -> Path:
        """Return the path of a log of this node."""
        return self.folder / f"{what}.{self.node}.{self.host}.log"

    def write(self, name: str, value: Any) -> None:
        """Tell the others ``value``."""
        write_atomic(self.folder / name, json.dumps(value))

    def read(self, name: str) -> Any:
        """Return what was told under this name, None if nothing was."""
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return None

    def told(self, name: str) -> dict[int, Any]:
        """Return what each node has told under ``name.<node>``, which it does once: nothing is read again."""
        names = {node: f"{name}.{node}" for node in range(len(self.hosts))}
        missing = set(names.values()) - self._told.keys()
        for there in missing.intersection(os.listdir(self.folder) if missing else ()):
            self._told[there] = self.read(there)
        return {node: self._told[known] for node, known in names.items() if known in self._told}

    def judge(self, code: int, reason: str, log: Path | None = None) -> None:
        """Give the job's verdict, unless another node has: a hard link is made by one only, on NFS too."""
        path = self.folder / f".{VERDICT}.{self.node}"
        write_atomic(path, f"code: {code}\nnode: {self.host}\nreason: {reason}\nlog: {log or ''}\n")
        try:
            os.link(path, self.folder / VERDICT)
        except FileExistsError:
            return

    def verdict(self) -> int | None:
        """Return the code of the job's verdict, None before there is one."""
        try:
            lines = (self.folder / VERDICT).read_text().splitlines()
        except FileNotFoundError:
            return None
        return int(lines[0].removeprefix("code: "))

    def beat(self) -> bool:
        """Show that this node lives, once in ``beat_seconds``; return whether it was time to."""
        if time.monotonic() - self._beaten < self.beat_seconds:
            return False
        self._beaten = time.monotonic()
        self.write(f"beat.{self.node}", time.time())
        return True

    def silent(self, seconds: float) -> list[int]:
        """Return the nodes whose beat has not changed for ``seconds`` (and four beats), by this node's clock alone.

        The first node looks after all others, they after it: a hundred that looked after each other would be thousands
        of reads a second.
        """
        now, least = time.monotonic(), max(seconds, 4 * self.beat_seconds)
        for node, beat in self.beats().items():
            if self._beats.get(node, ("", 0.0))[0] != beat:
                self._beats[node] = (beat, now)
        return [node for node, (_, seen) in self._beats.items() if now - seen > least]

    def beats(self) -> dict[int, str]:
        """Return the last beat of each node that this one looks after."""
        return {node: str(self.read(f"beat.{node}")) for node in (range(1, len(self.hosts)) if self.node == 0 else [0])}

    def wait(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``ready()``, a verdict, or the time is over; beat meanwhile; return whether it is ready."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.verdict() is not None or time.monotonic() > deadline:
                return False
            self.beat()
            time.sleep(self.beat_seconds / 2)
        return True

    def names(self, nodes: list[int]) -> str:
        """Return the names of these nodes for a message."""
        return ", ".join(self.hosts[node] for node in nodes)
