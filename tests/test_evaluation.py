"""The store, its resume, and the work queue: what a kill, a lost engine or a damaged file may not change."""

import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from stub_evaluation import PROBLEMS, SHARD, N, StubEngine, answer, draw, plan, run, work

from rapo_verl import Failed, Refused
from rapo_verl.evaluation import engines
from rapo_verl.evaluation.spec import Sampling, SamplingPlan
from rapo_verl.evaluation.store import ShardError, Store, read_stated

SHARDS = PROBLEMS * -(-N // SHARD)


def assert_complete(folder):
    """Exactly n samples of each problem, none twice, each the one that its seed gives, and nothing else on disk."""
    store = Store.open(folder)
    seeds = {(shard.problem, shard.first): shard.seed for shard in plan().shards}
    seen = set()
    for problem in range(PROBLEMS):
        rows = [row for path in store.shards_of(problem) for row in store.read(path).to_pylist()]
        assert [row["sample"] for row in rows] == list(range(N))
        for row in rows:
            first = row["sample"] // SHARD * SHARD
            assert row["text"] == answer(seeds[problem, first] + row["sample"] - first, problem)
        seen |= {row["text"] for row in rows}
    assert len(seen) == N * PROBLEMS
    assert sorted(folder.rglob("*.parquet")) == sorted(p for i in range(PROBLEMS) for p in store.shards_of(i))
    assert not list(folder.rglob("*.tmp"))


def count(folder):
    return len(list(folder.rglob("*.parquet")))


def test_twenty_kills_at_random_moments_end_with_exact_counts(tmp_path):
    rng, left = random.Random(5), 0
    # Forked from a process that has imported what takes a second.
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(["rapo_verl.evaluation.generate", "rapo_verl.evaluation.store"])
    for _ in range(20):
        before = count(tmp_path)
        process = warm.Process(target=work, args=(tmp_path,))
        process.start()
        while count(tmp_path) == before and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was at work
        left += len(list(tmp_path.rglob("*.tmp")))
    assert 20 <= count(tmp_path) < SHARDS
    # One more kill as it could have been: half a file under its temporary name.
    (tmp_path / "shards" / "00000" / ".00000.parquet.1.tmp").write_bytes(b"PAR1 half")
    last = warm.Process(target=work, args=(tmp_path,))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert_complete(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    started, _ = run(draw(tmp_path))
    assert started == [(0, N * PROBLEMS)]
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}


def test_two_engines_on_one_queue_share_the_work_and_repeat_none(tmp_path):
    first, second, made = StubEngine(0.002), StubEngine(0.002), []
    run(draw(tmp_path), first, second, done=lambda samples, tokens: made.append(samples))
    assert first.made + second.made == SHARDS == len(made)
    assert min(first.made, second.made) > 0
    assert sum(made) == N * PROBLEMS
    assert first.closed and second.closed
    assert_complete(tmp_path)


def test_lost_engine_costs_only_what_it_had_in_flight(tmp_path):
    dying, other = StubEngine(0.002, lost_after=15), StubEngine(0.002)
    run(draw(tmp_path), dying, other)
    assert dying.made == 15
    assert other.made == SHARDS - 15
    assert dying.closed
    assert_complete(tmp_path)


def test_last_engine_lost_is_replaced_by_the_fleet(tmp_path):
    made = []

    def fleet(alive):
        if not alive:
            made.append(StubEngine(lost_after=100))
        return [] if alive else made[-1:]

    run(draw(tmp_path), fleet=fleet)
    assert [engine.made for engine in made] == [100, 100, SHARDS - 200]
    assert_complete(tmp_path)


def test_engines_that_never_finish_a_shard_end_the_run(tmp_path):
    made = []

    def fleet(alive):
        made.append(StubEngine(lost_after=0))
        return made[-1:] if not alive else []

    with pytest.raises(Failed, match="lost without a shard finished"):
        run(draw(tmp_path), fleet=fleet)
    assert len(made) <= 5


def test_engine_that_joins_later_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("rapo_verl.evaluation.generate.POLL_S", 0.02)
    first, late = StubEngine(0.01), StubEngine(0.01)

    def fleet(alive):
        return [] if late in alive else [first] if first not in alive else [late]

    run(draw(tmp_path), fleet=fleet)
    assert late.made > 0
    assert_complete(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "swapped"])
def test_damaged_shard_is_found_kept_aside_and_made_again(tmp_path, damage):
    drawn = draw(tmp_path)
    run(drawn, StubEngine())
    path, other = drawn.store.shard_path(3, 1), drawn.store.shard_path(4, 1)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        # A byte of the text column's page: its checksum tells.
        place = data.find(b"\x28\xb5\x2f\xfd", len(data) // 4) + 12  # a zstd frame
        data[place] ^= 0xFF
    changed = {"truncated": data[: len(data) // 2], "flipped": data, "emptied": b"", "swapped": other.read_bytes()}
    path.write_bytes(bytes(changed[damage]))
    with pytest.raises(ShardError):
        drawn.store.read(path)
    started, damaged = run(draw(tmp_path), StubEngine())
    assert started == [(SHARD, N * PROBLEMS - SHARD)]
    assert len(damaged) == 1 and str(path) in damaged[0]
    assert path.with_suffix(".damaged").exists()
    assert_complete(tmp_path)


def test_every_changed_manifest_key_is_refused(tmp_path):
    made = plan()
    draw(tmp_path)
    changes = {
        "model": "2" * 64,
        "data": {"set.parquet": "2"},
        "prompts": tuple((i, 9) for i in range(PROBLEMS)),
        "n": N + 1,
        "draw": 2,
        "sampling": replace(made.sampling, temperature=0.6),
        "shard": SHARD + 1,
        "versions": {"vllm": "0"},
    }
    for key, value in changes.items():
        with pytest.raises(Refused, match=f"another evaluation(.|\n)*{key}.*there.*here"):
            draw(tmp_path, **{key: value})
    draw(tmp_path)  # the same one goes on
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"temperature": 1.0', '"temperature": 0.6'))
    with pytest.raises(Refused, match=r"manifest\.json was changed"):  # after it was written
        Store.open(tmp_path)


def test_second_process_on_one_folder_is_refused(tmp_path):
    drawn = draw(tmp_path)
    with drawn.store.locked(), pytest.raises(Refused, match="another process generates"), drawn.store.locked():
        pass


def test_parts_run_side_by_side_and_make_every_shard_once(tmp_path):
    drawn = [replace(draw(tmp_path), part=(i, 3)) for i in range(3)]
    with drawn[0].store.locked((0, 3)), drawn[1].store.locked((1, 3)):
        for part in ((0, 1), (1, 3)):  # the whole folder, and a part that is taken
            with pytest.raises(Refused, match="another process generates"), drawn[0].store.locked(part):
                pass
    made = []
    for one in drawn:
        engine = StubEngine()
        run(one, engine)
        made.append(engine.made)
        assert {shard.problem for shard in one.shards} == set(range(PROBLEMS))
    assert sum(made) == SHARDS and max(made) - min(made) <= 1
    assert draw(tmp_path).store.missing(plan().shards) == ([], [])


def test_no_two_samples_of_any_draws_share_a_seed():
    seeds = sorted(shard.seed for number in (1, 2, 3) for shard in plan(draw=number).shards)
    assert len(seeds) == 3 * SHARDS
    assert min(b - a for a, b in pairwise(seeds)) >= SHARD
    assert {shard.seed for shard in plan().shards}.isdisjoint(shard.seed for shard in plan(model="3" * 64).shards)


def test_seeds_too_close_are_refused(monkeypatch):
    monkeypatch.setattr(
        SamplingPlan, "_seed", lambda self, problem, first: problem * 10_000 + first // SHARD * (SHARD - 1)
    )
    with pytest.raises(Refused, match="would share seeds"):
        plan()


def test_impossible_plans_are_refused_with_every_fault():
    with pytest.raises(Refused) as refused:
        plan(n=0, sampling=Sampling(temperature=-1, top_p=0))
    assert [line.split()[0] for line in str(refused.value).splitlines()] == ["temperature", "top_p", "n"]
    twice = plan().problems
    with pytest.raises(Refused, match="one id"):
        plan(problems=(twice[0], *twice[:-1]))


def test_engine_that_returns_too_few_samples_is_caught(tmp_path):
    class Short(StubEngine):
        async def sample(self, request):
            found = await super().sample(request)
            return type(found)(*(column and column[:-1] for column in found))

    with pytest.raises(ShardError, match="asked for 6 samples"):
        run(draw(tmp_path), Short())


def test_footer_states_what_the_shard_holds(tmp_path):
    drawn = draw(tmp_path)
    run(drawn, StubEngine())
    path = drawn.store.shard_path(2, 19)
    stated, table = read_stated(path), drawn.store.read(path)
    assert stated["count"] == table.num_rows == N - 19 * SHARD == 3
    assert stated["tokens"] == sum(table["tokens"].to_pylist())


def test_a_gpu_is_found_without_making_forks_useless_and_vllm_forks_none(monkeypatch):
    # Seen on an H200: is_available poisons forks, vLLM forks its core, and that dies at its first call of CUDA.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("forks are useless now"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "x")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    made = []
    vllm, async_llm = ModuleType("vllm"), ModuleType("vllm.v1.engine.async_llm")
    vllm.AsyncEngineArgs = lambda **arguments: made.append(arguments) or arguments
    async_llm.AsyncLLM = SimpleNamespace(from_engine_args=lambda arguments: arguments)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.async_llm", async_llm)
    monkeypatch.setattr(engines, "guard", lambda processes: None)
    engines.VllmEngine(engines.EngineSpec("model", 8))
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and "dtype" not in made[0]
