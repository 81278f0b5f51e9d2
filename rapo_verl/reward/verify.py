"""Verdicts for responses, one by one or many at once: nothing is compared twice, and no caller is held up."""

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache

from rapo_verl.reward.answer import (
    MAX_BOX,
    integer_verdict,
    last_boxed,
    last_number,
    normalize,
    parse_integer,
    quick_verdict,
)
from rapo_verl.reward.pool import WorkerPool
from rapo_verl.reward.verdict import Verdict, VerifierSettings

Key = tuple[str, str | None]


class Verifier:
    """Checks responses against right answers; safe in any thread, process or Ray actor, forks of it included."""

    def __init__(self, settings: VerifierSettings | None = None):
        self.settings = settings or VerifierSettings()
        if self.settings.problems():
            raise ValueError("\n".join(self.settings.problems()))
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        # Comparisons done and under way, the least recently asked for first.
        self._compared: OrderedDict[Key, Future] = OrderedDict()
        self.pool = WorkerPool(self.settings)

    def verify(self, response: str, ground_truth: str) -> tuple[Verdict, str | None]:
        """Return the verdict on a response and the answer that it gives (None: none), as the strictness reads it.

        ValueError: ``ground_truth`` is empty, or no integer where only integers are to be right.
        """
        box = self._answer(response)
        return Verdict(self._check(ground_truth, box).result()), box

    async def verify_async(self, response: str, ground_truth: str) -> tuple[Verdict, str | None]:
        """Return what `verify` does; a slow comparison holds up neither the event loop nor its executor."""
        box = self._answer(response)
        # Shielded: the comparison may serve others, whose task was not cancelled.
        return Verdict(await asyncio.shield(asyncio.wrap_future(self._check(ground_truth, box)))), box

    def verify_many(
        self, responses: Sequence[str], ground_truths: Sequence[str], *, retry: bool = True
    ) -> list[tuple[Verdict, str | None]]:
        """Return the verdict and the box of each response.

        With ``retry``, what ran into its deadline is compared once more, alone, before that is final: in an evaluation,
        a verdict must not depend on what else the machine had to do.
        """
        if len(responses) != len(ground_truths):
            raise ValueError(f"{len(responses)} responses but {len(ground_truths)} right answers")
        keys = [(gold, self._answer(response)) for gold, response in zip(ground_truths, responses)]
        futures = {key: self._check(*key) for key in dict.fromkeys(keys)}
        found = {key: Verdict(future.result()) for key, future in futures.items()}
        for key in [key for key, verdict in found.items() if verdict is Verdict.timeout and retry]:
            with self._lock:
                self._compared.pop(key, None)
            found[key] = Verdict(self._check(*key).result())
        return [(found[key], key[1]) for key in keys]

    def kinds_of(self, ground_truths: Sequence[str]) -> list[str]:
        """Return what each right answer is read as.

        "integer", "expression", "string" (right only in the same words), "nothing", "unreadable" (beyond the limits).
        """
        kinds = {gold: "integer" if len(gold) <= MAX_BOX else "unreadable" for gold in ground_truths}
        asked = {
            gold: self.pool.submit("kind_of", gold)
            for gold, kind in kinds.items()
            if kind == "integer" and parse_integer(normalize(gold)) is None
        }
        for gold, future in asked.items():
            kind = future.result()
            kinds[gold] = "unreadable" if kind in (Verdict.timeout, Verdict.error) else kind
        return [kinds[gold] for gold in ground_truths]

    def close(self) -> None:
        """End the worker processes; waiting checks are cancelled."""
        self.pool.close()

    def _answer(self, response: str) -> str | None:
        return last_number(response) if self.settings.strictness == "last_integer" else last_boxed(response)

    def _check(self, gold: str, box: str | None) -> Future:
        """Return the future of a verdict: one that needs no process, a known one, one under way, or a new one."""
        verdict = self._at_once(gold, box)
        if verdict is not None:
            future: Future = Future()
            future.set_result(verdict)
            return future
        if self._owner != os.getpid():
            # In a fork, the threads are gone and the connections are the parent's.
            self._reset()
        with self._lock:
            known = self._compared.pop((gold, box), None)
            if known is None or (known.done() and (known.cancelled() or known.exception() is not None)):
                known = self.pool.submit("compare", gold, str(box), self.settings.strictness)
            self._compared[gold, box] = known
            while len(self._compared) > self.settings.cache_size:
                self._compared.popitem(last=False)
        return known

    def _at_once(self, gold: str, box: str | None) -> Verdict | None:
        """Return the verdict where no process is needed for it, else None."""
        if self.settings.strictness in ("integer", "last_integer"):
            return integer_verdict(gold, box)
        if len(gold) > MAX_BOX:
            raise ValueError(f"ground truth {gold[:80]!r}... has {len(gold)} characters; allowed: {MAX_BOX}")
        wanted = normalize(gold)
        if not wanted:
            raise ValueError(f"ground truth {gold!r} is empty")
        return Verdict.no_box if box is None else quick_verdict(wanted, normalize(box))


@lru_cache(maxsize=8)
def shared_verifier(settings: VerifierSettings) -> Verifier:
    """Return this process's verifier of these settings."""
    return Verifier(settings)
