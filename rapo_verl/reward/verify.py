"""Verdicts for responses, one by one or many at once: nothing is compared twice, and no caller is held up."""

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache

from rapo_verl.reward.answer import MAX_BOX, last_boxed, normalize, parse_integer, quick_verdict
from rapo_verl.reward.pool import TaskDiedError, TaskTimeoutError, WorkerPool
from rapo_verl.reward.verdict import Verdict, VerifierSettings

Key = tuple[str, str]


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
        self._known: OrderedDict[Key, Verdict] = OrderedDict()
        self._running: dict[Key, Future] = {}
        self.pool = WorkerPool(self.settings)

    def verify(self, response: str, ground_truth: str) -> tuple[Verdict, str | None]:
        """Return the verdict on a response and the text of its last box (None: it has none).

        Raises:
            ValueError: ``ground_truth`` is empty, or no integer where only integers are to be right.
        """
        box = last_boxed(response)
        verdict = self._at_once(ground_truth, box)
        if verdict is None and box is not None:
            verdict = self._compare((ground_truth, box)).result()
        return verdict, box  # type: ignore[return-value]

    async def verify_async(self, response: str, ground_truth: str) -> tuple[Verdict, str | None]:
        """Return what `verify` does; a slow comparison holds up neither the event loop nor its executor."""
        box = last_boxed(response)
        verdict = self._at_once(ground_truth, box)
        if verdict is None and box is not None:
            # Shielded: the comparison may serve others, whose task was not cancelled.
            verdict = await asyncio.shield(asyncio.wrap_future(self._compare((ground_truth, box))))
        return verdict, box  # type: ignore[return-value]

    def verify_many(
        self, responses: Sequence[str], ground_truths: Sequence[str], *, retry: bool = True
    ) -> list[tuple[Verdict, str | None]]:
        """Return the verdict and the box of each response.

        Args:
            responses: the model's texts.
            ground_truths: the right answer of each.
            retry: compare what ran into its deadline once more, alone, before that is final. For evaluation, where
                a verdict must not depend on what else the machine had to do.

        Raises:
            ValueError: as `verify`, or the lengths differ.
        """
        if len(responses) != len(ground_truths):
            raise ValueError(f"{len(responses)} responses but {len(ground_truths)} right answers")
        boxes = [last_boxed(response) for response in responses]
        found: dict[tuple[str, str | None], Verdict | None] = {}
        waiting: dict[Key, Future] = {}
        for gold, box in zip(ground_truths, boxes):
            if (gold, box) not in found:
                found[gold, box] = verdict = self._at_once(gold, box)
                if verdict is None and box is not None:
                    waiting[gold, box] = self._compare((gold, box))
        for key, future in waiting.items():
            found[key] = future.result()
        if retry:
            for key in [key for key in waiting if found[key] is Verdict.timeout]:
                with self._lock:
                    self._known.pop(key, None)
                found[key] = self._compare(key).result()
        return [(found[gold, box], box) for gold, box in zip(ground_truths, boxes)]  # type: ignore[misc]

    def kinds_of(self, ground_truths: Sequence[str]) -> list[str]:
        """Return what each right answer is read as.

        Returns:
            "integer", "expression", "string" (right only in the same words), "nothing" or "unreadable" (reading it ran
            into the limits).
        """
        kinds = {gold: "integer" if len(gold) <= MAX_BOX else "unreadable" for gold in ground_truths}
        waiting: dict[str, Future] = {}
        for gold in kinds:
            if kinds[gold] == "integer" and parse_integer(normalize(gold)) is None:
                waiting[gold] = self.pool.submit("kind_of", gold)
        for gold, future in waiting.items():
            try:
                kinds[gold] = future.result()
            except (TaskTimeoutError, TaskDiedError):
                kinds[gold] = "unreadable"
        return [kinds[gold] for gold in ground_truths]

    def close(self) -> None:
        """End the worker processes; waiting checks are cancelled."""
        self.pool.close()

    def _at_once(self, gold: str, box: str | None) -> Verdict | None:
        """Return the verdict where no process is needed for it, else None."""
        if self.settings.strictness == "integer":
            want = parse_integer(gold)
            if want is None:
                raise ValueError(f"ground truth {gold[:80]!r} is not an integer")
            if box is None:
                return Verdict.no_box
            return Verdict.correct if parse_integer(box) == want else Verdict.wrong
        if len(gold) > MAX_BOX:
            raise ValueError(f"ground truth {gold[:80]!r}... has {len(gold)} characters; allowed: {MAX_BOX}")
        wanted = normalize(gold)
        if not wanted:
            raise ValueError(f"ground truth {gold!r} is empty")
        if box is None:
            return Verdict.no_box
        return quick_verdict(wanted, normalize(box))

    def _compare(self, key: Key) -> Future:
        """Return the future of a verdict: a known one, one under way, or a new one."""
        if self._owner != os.getpid():
            # In a fork, the threads are gone and the connections are the parent's.
            self._reset()
        future: Future = Future()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                future.set_result(self._known[key])
                return future
            if key in self._running:
                return self._running[key]
            self._running[key] = future
        task = self.pool.submit("compare", *key, self.settings.strictness)
        task.add_done_callback(lambda done: self._finish(key, done, future))
        return future

    def _finish(self, key: Key, done: Future, future: Future) -> None:
        if done.cancelled():
            with self._lock:
                del self._running[key]
            future.cancel()
            return
        error = done.exception()
        verdict = None
        if error is None:
            verdict = Verdict.correct if done.result() else Verdict.wrong
        elif isinstance(error, TaskTimeoutError):
            verdict = Verdict.timeout
        elif isinstance(error, TaskDiedError):
            verdict = Verdict.error
        with self._lock:
            del self._running[key]
            if verdict is not None:
                self._known[key] = verdict
                while len(self._known) > self.settings.cache_size:
                    self._known.popitem(last=False)
        if verdict is None:
            future.set_exception(error)
        else:
            future.set_result(verdict)


@lru_cache(maxsize=8)
def shared_verifier(settings: VerifierSettings) -> Verifier:
    """Return this process's verifier of these settings."""
    return Verifier(settings)
