"""What a node of a Slurm job checks, claims and tells the others; tests/slurm has it on a real Slurm."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rapo_verl import Refused
from rapo_verl.cluster import board
from rapo_verl.cluster.board import Board
from rapo_verl.cluster.checks import check_node, disagreements
from rapo_verl.cluster.facts import Facts
from rapo_verl.cluster.ray_node import BLOCK, FIRST_PORT, SLOTS, RayNodeError, claim_ports, node_ip, ray_folder
from rapo_verl.plan import card
from rapo_verl.run import names as codes


def boards(folder, count=2):
    return [Board(folder, node, [f"n{i + 1}" for i in range(count)]) for node in range(count)]


def test_first_verdict_stands(tmp_path):
    first, second = boards(tmp_path)
    assert first.verdict() is None
    second.judge(codes.RAYLET_DIED, "raylet", Path("/log"))
    first.judge(1, "the trainer, for want of it")
    assert first.verdict() == second.verdict() == codes.RAYLET_DIED
    assert "node: n2\nreason: raylet\nlog: /log" in (tmp_path / "verdict").read_text()


def test_silent_node_is_noticed_by_its_unchanged_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(board, "NODES_A_SECOND", 100)
    first, second = boards(tmp_path)
    second.beat()
    assert first.silent(0.2) == []
    time.sleep(0.3)
    second.beat()
    assert first.silent(0.2) == []
    time.sleep(0.3)
    assert first.silent(0.2) == [1]


def test_ports_of_a_job_pass_over_what_is_taken(tmp_path):
    base, lock = claim_ports(7, tmp_path)
    other, other_lock = claim_ports(7, tmp_path)  # the lock holds it although nothing listens yet
    assert other != base
    lock.close(), other_lock.close()
    with socket.create_server(("", base + 3)):
        assert claim_ports(7, tmp_path)[0] != base
    assert FIRST_PORT + BLOCK * SLOTS <= 32768


def test_long_folder_and_loopback_address_are_refused(monkeypatch):
    with pytest.raises(RayNodeError, match="RAPO_NODE_TMP"):
        ray_folder(Path("/a/very/long/path/for/the/local/scratch/of/a/node"), "123456-0")
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    with pytest.raises(RayNodeError, match="RAPO_INTERFACE"):
        node_ip(None)
    with pytest.raises(RayNodeError, match=r"no IPv4 address here; interfaces: .*lo"):
        node_ip("nope0")


def test_nodes_that_disagree_are_named():
    rows = [{"what": "vllm", "found": "1", "ok": True, "mend": ""}]
    other = [
        {"what": "vllm", "found": "2", "ok": True, "mend": ""},
        {"what": "x", "found": "y", "ok": False, "mend": "z"},
    ]
    found = {(f.what, f.found, f.mend) for f in disagreements({"n1": rows, "n2": rows, "n3": other})}
    assert found == {("n3: vllm", "2", "the other nodes have 1"), ("n3: x", "y", "z")}
    assert disagreements({"n1": rows, "n2": rows}) == []


def test_node_check_is_fast_and_sees_a_folder_it_cannot_write(monkeypatch, tmp_path):
    monkeypatch.setenv("RAPO_INTERFACE", "lo")
    start = time.monotonic()
    names = {finding.what for finding in check_node(Facts.read(), tmp_path)}
    assert {"python", "verl", "ray", "address", "open files", "run folder: free disk"} <= names
    # It runs on every node before anything else: no torch, no verl, no Ray. Generous for a busy machine.
    assert time.monotonic() - start < 20
    bad = [finding for finding in check_node(Facts.read(), tmp_path / "gone") if finding.what == "run folder"]
    assert len(bad) == 1 and not bad[0].ok


def test_node_check_imports_nothing_heavy():
    code = "import sys, rapo_verl.cluster.node; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'verl')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_hundred_nodes_leave_the_shared_folder_alone(tmp_path, monkeypatch):
    clock, reads = [1000.0], []
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(board, "write_atomic", lambda path, text: path.write_text(text))
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: reads.append(path) or read(path))
    nodes, seconds = boards(tmp_path, 100), 60
    for _ in range(seconds):
        clock[0] += 1
        for node in nodes:
            if node.beat():
                node.verdict()
                assert node.silent(120) == []
    # A beat of each and the verdict, once in 6.25 s; the first node reads all beats: 47 a second, where 3,333 were.
    assert len(reads) / seconds < 60


def test_what_is_told_once_is_read_once(tmp_path, monkeypatch):
    first, second = boards(tmp_path)
    second.write("joined.1", 8)
    assert first.told("joined") == {1: 8}
    monkeypatch.setattr(Path, "read_text", lambda path: pytest.fail(f"{path} is read again"))
    assert first.told("joined") == {1: 8}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("sleep 60", "nvidia-smi hangs (1 s)"),
        ("trap '' TERM; while :; do sleep 1; done", "nvidia-smi hangs (1 s)"),
        ("exit 0", "nvidia-smi ended with 0"),
        ("echo 'No devices were found'", "No devices were found"),
        ("echo Failed to initialize NVML; exit 18", "Failed to initialize NVML"),
        ("echo '580.65, NVIDIA H100, [N/A]'", None),
        ("echo '580.65, NVIDIA H100, 3'", None),
    ],
)
def test_whatever_nvidia_smi_does_is_a_line_of_the_table(tmp_path, monkeypatch, script, said):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/bash\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setattr(card, "SMI_SECONDS", 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("RAPO_GPUS_PER_NODE", "1")
    wrong = {f.what: f.found for f in check_node(Facts.read()) if not f.ok and f.what.startswith(("driver", "GPU"))}
    assert wrong == ({} if said is None else {"driver": said})


def test_setting_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("RAPO_OBJECT_STORE_BYTES", "8G")
    with pytest.raises(Refused, match="RAPO_OBJECT_STORE_BYTES is '8G'; allowed: a number"):
        Facts.read()


def test_check_that_fails_itself_is_what_it_found(monkeypatch):
    monkeypatch.setenv("RAPO_INTERFACE", "nope0")
    (wrong,) = (f for f in check_node(Facts.read()) if f.what == "address")
    assert not wrong.ok and "no IPv4 address" in wrong.found
