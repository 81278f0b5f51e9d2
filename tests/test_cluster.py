"""What a node of a Slurm job checks, claims and tells the others; tests/slurm has it on a real Slurm."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rapo_verl.cluster import board
from rapo_verl.cluster.board import Board
from rapo_verl.cluster.checks import check_node, disagreements
from rapo_verl.cluster.ray_node import BLOCK, FIRST_PORT, SLOTS, RayNodeError, claim_ports, node_ip, ray_folder
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
    monkeypatch.setattr(board, "BEAT_SECONDS", 0.1)
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
        ray_folder("/a/very/long/path/for/the/local/scratch/of/a/node", "123456-0")
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
    found = {(f.host, f.what, f.found, f.mend) for f in disagreements({"n1": rows, "n2": rows, "n3": other})}
    assert found == {("n3", "vllm", "2", "the other nodes have 1"), ("n3", "x", "y", "z")}
    assert disagreements({"n1": rows, "n2": rows}) == []


def test_node_check_is_fast_and_sees_a_folder_it_cannot_write(monkeypatch, tmp_path):
    monkeypatch.setenv("RAPO_INTERFACE", "lo")
    start = time.monotonic()
    names = {finding.what for finding in check_node(tmp_path)}
    assert {"python", "verl", "ray", "address", "open files", "run folder: free disk"} <= names
    # It runs on every node before anything else: no torch, no verl, no Ray. Generous for a busy machine.
    assert time.monotonic() - start < 20
    bad = [finding for finding in check_node(tmp_path / "gone") if finding.what == "run folder"]
    assert len(bad) == 1 and not bad[0].ok


def test_node_check_imports_nothing_heavy():
    code = "import sys, rapo_verl.cluster.node; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'verl')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
