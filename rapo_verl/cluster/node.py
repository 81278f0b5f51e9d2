"""One node of a Slurm job: checks it, starts Ray, on the first node runs the command, and leaves nothing behind.

Started on every node by the one srun of slurm/launch.sh with the arguments of `rapo`. Each node writes its own verdict
when it sees a failure; the first one stands (`rapo_verl.cluster.board`).
"""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from rapo_verl.cluster.board import Board
from rapo_verl.cluster.checks import check_node, disagreements, try_links
from rapo_verl.cluster.facts import Facts
from rapo_verl.cluster.ray_node import (
    SMOKE,
    RayNodeError,
    claim_ports,
    node_ip,
    ray_folder,
    remove_ray_folder,
    start_ray,
)
from rapo_verl.run import names as codes
from rapo_verl.run.finding import print_findings
from rapo_verl.run.names import COLLAPSED, DUMP_FILE, SAVED, STALLED, STOP_FILE
from rapo_verl.run.processes import adopt_orphans, descendants, dump_stacks, end_descendants, is_alive

# Seconds from asking processes to end to killing them; below Slurm's own KillWait of 30.
GRACE = 15.0
# Seconds that a worker gives the first node for checking the command, beside those for joining.
GO_SECONDS = 600.0
TERMINATED = 143  # 128 + SIGTERM


class JobEnds(Exception):
    """There is a verdict; nothing is left to do but to clean up."""


class Node:
    """What this process does from start to end, on the first node (`head`) or another."""

    def __init__(self, board: Board, facts: Facts, command: list[str]):
        self.board, self.facts, self.command = board, facts, command
        self.head = board.node == 0
        self.dumped = False
        self.folder: Path | None = None
        self.raylet: psutil.Process | None = None
        self.ports: tuple[int, Any] | None = None  # with the lock that holds them while this process lives

    def run(self) -> None:
        """Do everything; returns or raises `JobEnds` once there is a verdict."""
        self._preflight()
        self._join()
        self._drive_head() if self.head else self._serve()

    def _end(self, code: int, reason: str, log: Path | None = None) -> None:
        self.board.judge(code, reason, log)
        raise JobEnds

    def _say(self, text: str) -> None:
        print(f"[{time.strftime('%T')}] {self.board.host}: {text}", flush=True)

    def _preflight(self) -> None:
        board = self.board
        board.beat()
        findings = check_node(self.facts, board.folder)
        board.write(f"check.{board.node}", [vars(finding) for finding in findings])
        if self.head:
            self._check_everyone()
            self._check_command()
            board.write("go", {"ip": node_ip(self.facts.interface), "port": self._claim() + SMOKE})
        else:
            self._await("go", self.facts.join_seconds * 2 + GO_SECONDS)
        problem = try_links(board, self.facts)
        if problem:
            self._end(codes.PREFLIGHT, f"{board.host}: {problem}", board.log_file("smoke"))

    def _gather(self, name: str) -> dict[str, Any]:
        """Return what every node has told under this name, by its host."""
        board, everyone = self.board, range(len(self.board.hosts))
        if not board.wait(lambda: len(board.told(name)) == len(everyone), self.facts.join_seconds):
            missing = board.names([node for node in everyone if node not in board.told(name)])
            how = f"{missing} did not join Ray" if name == "joined" else f"no sign of {missing} in {board.folder}"
            self._end(codes.MISSING, f"{how} after {self.facts.join_seconds:.0f} s")
        return {board.hosts[node]: told for node, told in board.told(name).items()}

    def _check_everyone(self) -> None:
        wrong = disagreements(self._gather("check"))
        if wrong:
            print_findings(wrong)
            self._end(codes.PREFLIGHT, "; ".join(f"{f.what}: {f.found}; {f.mend}" for f in wrong[:3]))

    def _check_command(self) -> None:
        """Have config, data and model looked at, and the plan said, before Ray starts anywhere."""
        code = self._drive([*self.command, "--dry-run"]) if self.command[0] == "train" else 0
        if code or self.facts.dry_run:
            self._end(code, f"{self.command[0]} --dry-run ended with {code}", self.board.log_file("driver"))

    def _await(self, name: str, seconds: float) -> Any:
        if not self.board.wait(lambda: self.board.read(name) is not None, seconds):
            self._end(codes.HEAD_GONE, f"{self.board.host} waited {seconds:.0f} s in vain for the first node")
        return self.board.read(name)

    def _join(self) -> None:
        board = self.board
        log = board.log_file("ray")
        try:
            ip, ports = node_ip(self.facts.interface), self._claim()
            self.folder = ray_folder(self.facts.tmp, self.facts.tag)
            # vLLM and veRL look for their own address, too.
            os.environ["VLLM_HOST_IP"] = ip
            head = None if self.head else self._await("head", self.facts.join_seconds)
            start_ray(self.facts, head, ip, ports, self.folder, log)
            self.raylet = self._find_raylet()
        except (RayNodeError, OSError) as error:
            code = codes.HEAD_FAILED if self.head else codes.WORKER_FAILED
            self._end(code, f"Ray does not start on {board.host}: {error}", log)
        if self.head:
            os.environ["RAY_ADDRESS"] = f"{ip}:{ports}"
            board.write("head", os.environ["RAY_ADDRESS"])
        board.write(f"joined.{board.node}", self.facts.gpus)
        self._say(f"Ray runs at {ip}, ports from {ports}")

    def _claim(self) -> int:
        if self.ports is None:
            self.ports = claim_ports(self.facts.job, self.facts.tmp)
        return self.ports[0]

    def _find_raylet(self) -> psutil.Process:
        for _ in range(40):
            found = [process for process in self._alive() if process.name() == "raylet"]
            if found:
                return found[0]
            time.sleep(0.25)
        raise RayNodeError("ray start ended well but there is no raylet")

    def _watch(self) -> None:
        """Look after this node; into the shared folder, for its neighbours, once a beat."""
        if self.raylet not in self._alive():
            self._end(codes.RAYLET_DIED, f"Ray's raylet died on {self.board.host}", self.board.log_file("ray"))
        if not self.board.beat():
            return
        if self.board.verdict() is not None:
            raise JobEnds
        if not self.dumped and (self.board.folder / DUMP_FILE).exists():
            self.dumped = True
            dump_stacks(self.board.folder / f"stacks.{self.board.node}", self._alive())
        self._look_for_lost()

    def _alive(self) -> list[psutil.Process]:
        return [process for process in descendants() if is_alive(process)]

    def _look_for_lost(self) -> None:
        lost = self.board.silent(self.facts.lost_seconds)
        if lost:
            self._end(codes.NODE_LOST, f"{self.board.names(lost)} has been silent for {self.facts.lost_seconds:.0f} s")

    def _serve(self) -> None:
        while True:
            self._watch()
            time.sleep(1)

    def _drive_head(self) -> None:
        joined = self._gather("joined")
        self._say(f"{sum(joined.values())} GPUs on {len(joined)} node(s) have joined")
        code = self._drive(self.command, watch=True)
        if code not in (0, 2, COLLAPSED, *codes.REQUEUED):
            self._was_it_a_node()
        said = {
            SAVED: "saved before the last step",
            STALLED: "no step for too long: stacks.* beside the log",
            COLLAPSED: "an alarm held (survival.stop_on_collapse); saved, not to go on by itself",
        }
        self._end(code, said.get(code, f"{self.command[0]} ended with {code}"), self.board.log_file("driver"))

    def _drive(self, command: list[str], *, watch: bool = False) -> int:
        """Run `rapo` and return its exit code; its output goes to the driver's log and from there to the job's."""
        path = self.board.log_file("driver")
        with path.open("ab") as log, path.open("rb") as tail:
            tail.seek(log.tell())
            driver = subprocess.Popen([*self.facts.command, *command], stdout=log, stderr=subprocess.STDOUT)
            try:
                while driver.poll() is None:
                    if watch:
                        self._watch()
                        self._stop_what_cannot_save(driver)
                    time.sleep(0.5)
                    _show(tail.read())
            finally:
                driver.terminate()  # nothing, if it has ended
                _show(tail.read())
        if watch and self.command[0] != "train" and driver.returncode and self._stop_asked():
            return SAVED
        return driver.returncode if driver.returncode >= 0 else 128 - driver.returncode

    def _stop_asked(self) -> bool:
        return (self.board.folder / STOP_FILE).exists()

    def _stop_what_cannot_save(self, driver: subprocess.Popen) -> None:
        # The trainer saves and ends by itself; an evaluation keeps each finished shard and can be ended at any time.
        if self.command[0] != "train" and self._stop_asked():
            driver.terminate()

    def _was_it_a_node(self) -> None:
        """Blame a lost node rather than the command that failed for want of it: wait for every node's next beat."""
        end = time.monotonic() + self.facts.lost_seconds + 1
        before = self.board.beats()
        while any(beat == before[node] for node, beat in self.board.beats().items()):
            if time.monotonic() > end or self.board.verdict() is not None:
                break
            self._look_for_lost()
            time.sleep(self.board.beat_seconds / 2)
        if self.board.verdict() is not None:
            raise JobEnds

    def clean_up(self) -> None:
        """End every process that this node started and remove Ray's folder."""
        failed = self.board.verdict() not in (0, SAVED, COLLAPSED)
        end_descendants(GRACE)
        if self.folder is not None:
            keep = self.board.folder / f"ray-logs.{self.board.node}" if failed else None
            remove_ray_folder(self.folder, keep)


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.flush()


def main() -> int:
    """Run this node's agent in a child and end whatever is left, should the agent itself be killed.

    Returns 0, since the verdict travels in a file; 143 after SIGTERM; 1 if the agent failed.
    """
    os.umask(0o077)
    adopt_orphans()
    board = Board(Path(os.environ["RAPO_STATE"]), int(os.environ["SLURM_NODEID"]), os.environ["RAPO_HOSTS"].split())
    agent = os.fork()
    if agent == 0:
        os._exit(_run_agent(board))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent gets it, too
    _, status = os.waitpid(agent, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, TERMINATED):
        how = f"was killed by signal {-code}" if code < 0 else "failed: its traceback is in the job's output"
        board.judge(codes.NO_VERDICT, f"the agent of {board.host} {how}")
    end_descendants(GRACE)
    return max(code, 0)


def _run_agent(board: Board) -> int:
    adopt_orphans()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def terminated(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    node = Node(board, Facts.read(), sys.argv[1:])
    code = 0
    try:
        node.run()
    except JobEnds:
        pass
    except KeyboardInterrupt:
        code = TERMINATED
    finally:
        node.clean_up()
        sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
