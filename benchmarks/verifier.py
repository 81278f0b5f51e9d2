"""Speed of the verifier beside math-verify called directly and veRL's math_verify scorer, all in one run.

    python benchmarks/verifier.py [--processes 2] [--pairs 3000] [--data FILE.jsonl] [--verl-pairs 600]

Pairs are (right answer of one row, boxed answer of the same or of another row, half and half) of ``--data``, rows with
``answer``; without it, of the golden table with numbers changed. Prints markdown.
"""

import argparse
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

from rapo_verl.reward import Verifier, VerifierSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

Pair = tuple[str, str]
TEXT = "Let us compute step by step, and check the result once more. "


def aime_responses(problems: int = 30, n: int = 2048) -> list[Pair]:
    """Return (gold, response of 4 kB); the boxes are those of a policy: mostly integers, some with decoration."""
    rng = random.Random(0)
    pairs = []
    for _ in range(problems):
        gold = rng.randrange(1000)
        wrong = [str(rng.randrange(1000)) for _ in range(20)]
        boxes = [str(gold), f"0{gold}", f"{gold}^\\circ", f"{gold}.", "\\frac{1}{2}", f"m+n={gold}", *wrong]
        for _ in range(n):
            text = (TEXT * 80)[: 4096 - 40] + f" so the answer is \\boxed{{{rng.choice(boxes)}}}."
            pairs.append((str(gold), text if rng.random() > 0.1 else text[:-30]))
    rng.shuffle(pairs)
    return pairs


def math_pairs(count: int, data: Path | None) -> list[Pair]:
    """Return distinct (gold, boxed answer) pairs, half of them equal rows' answers."""
    rng = random.Random(0)
    if data is None:
        from golden_answers import PAIRS

        pool = [pair.gold for pair in PAIRS] + [pair.box for pair in PAIRS if pair.box.isascii()]
        answers = [f"{answer}+{i}" for i in range(1, 1 + count // len(pool) + 1) for answer in pool]
    else:
        answers = [json.loads(line)["answer"] for line in data.read_text().split("\n") if line]
        answers = list(dict.fromkeys(answer for answer in answers if answer.strip()))
    pairs: dict[Pair, None] = {}
    while len(pairs) < min(count, len(answers) ** 2):
        gold = rng.choice(answers)
        # The space keeps an equal answer from being the same text.
        box = f" {gold} " if rng.random() < 0.5 else rng.choice(answers)
        pairs[gold, f"\\boxed{{{box}}}"] = None
    return list(pairs)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process's children and theirs have used; other load does not count."""
    total = 0.0
    for process in psutil.Process(pid).children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def start_math_verify() -> None:
    """Load math-verify in a process of the pool; not part of what is measured."""
    logging.disable()
    import math_verify  # noqa: F401


def math_verify_directly(chunk: list[Pair]) -> list[bool]:
    """Return math-verify's verdicts, called as its README does, golds boxed."""
    from math_verify import parse, verify

    return [bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response))) for gold, response in chunk]


def time_math_verify(pairs: list[Pair], processes: int) -> tuple[float, int, float]:
    """Return seconds, the number found right and processor seconds of math-verify, start of its processes excluded."""
    with ProcessPoolExecutor(processes, get_context("spawn"), start_math_verify) as pool:
        list(pool.map(math_verify_directly, [[("1", "\\boxed{1}")]] * processes * 4))
        chunks = [pairs[i : i + 25] for i in range(0, len(pairs), 25)]
        before, start = cpu_seconds(os.getpid()), time.perf_counter()
        right = sum(sum(found) for found in pool.map(math_verify_directly, chunks))
        return time.perf_counter() - start, right, cpu_seconds(os.getpid()) - before


def time_verifier(pairs: list[Pair], processes: int) -> tuple[float, Counter, float, float]:
    """Return seconds, verdicts, seconds of starting the processes (not in the first), and processor seconds."""
    verifier = Verifier(VerifierSettings(workers=processes))
    start = time.perf_counter()
    verifier.verify_many(["\\boxed{1+1}"], ["2"])
    started = time.perf_counter() - start
    before, start = cpu_seconds(os.getpid()) + time.process_time(), time.perf_counter()
    verdicts = verifier.verify_many([response for _, response in pairs], [gold for gold, _ in pairs])
    seconds = time.perf_counter() - start
    used = cpu_seconds(os.getpid()) + time.process_time() - before
    verifier.close()
    return seconds, Counter(str(verdict) for verdict, _ in verdicts), started, used


def time_verl(pairs: list[Pair]) -> tuple[float, int]:
    """Return seconds and the number found right by veRL's scorer (4 processes of its own, their start excluded)."""
    from concurrent.futures import ThreadPoolExecutor

    from verl.utils.reward_score.math_verify import compute_score

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: compute_score("\\boxed{1}", "1", timeout=120), range(16)))
        start = time.perf_counter()
        right = sum(threads.map(lambda pair: compute_score(pair[1], pair[0]) > 0.5, pairs))
        return time.perf_counter() - start, right


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--verl-pairs", type=int, default=600)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    print(f"{args.processes} processes; load average at start {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    aime = aime_responses()
    seconds, verdicts, _, _ = time_verifier(aime, args.processes)
    print(f"{len(aime)} AIME-style responses of 4 kB: {seconds:.2f} s, {dict(verdicts)}\n")
    pairs = math_pairs(args.pairs, args.data)
    direct, direct_right, direct_cpu = time_math_verify(pairs, args.processes)
    ours, verdicts, started, ours_cpu = time_verifier(pairs, args.processes)
    few = pairs[: args.verl_pairs]
    few_direct, _, few_cpu = time_math_verify(few, args.processes)
    verl, verl_right = time_verl(few)
    few_ours, few_verdicts, _, few_ours_cpu = time_verifier(few, args.processes)
    print("| distinct MATH pairs | seconds | ratio | processor seconds | ratio | right |\n|---|---|---|---|---|---|")
    print(f"| {len(pairs)}: math-verify | {direct:.1f} | 1 | {direct_cpu:.1f} | 1 | {direct_right} |")
    ratios = f"{ours:.1f} | {ours / direct:.2f} | {ours_cpu:.1f} | {ours_cpu / direct_cpu:.2f}"
    print(f"| {len(pairs)}: this verifier (start {started:.1f} s more) | {ratios} | {verdicts['correct']} |")
    print(f"| {len(few)}: math-verify | {few_direct:.1f} | 1 | {few_cpu:.1f} | 1 | |")
    print(f"| {len(few)}: veRL's scorer, 4 processes | {verl:.1f} | {verl / few_direct:.2f} | | | {verl_right} |")
    ratios = f"{few_ours:.1f} | {few_ours / few_direct:.2f} | {few_ours_cpu:.1f} | {few_ours_cpu / few_cpu:.2f}"
    print(f"| {len(few)}: this verifier | {ratios} | {few_verdicts['correct']} |")


if __name__ == "__main__":
    main()
