"""What a check can say, and the settings under which it says it."""

from dataclasses import dataclass
from enum import Enum

from rapo_verl.method.settings import one_of, out_of_bounds, setting

STRICTNESS = ("integer", "symmetric", "math_verify", "last_integer")


class Verdict(str, Enum):
    """The outcome of one check; only `correct` earns a reward, only `correct` and `wrong` are about mathematics."""

    # Names equal values: Enum hashes the name, so that counters can be asked by either.
    correct = "correct"
    wrong = "wrong"
    no_box = "no_box"
    # The comparison ran into its deadline.
    timeout = "timeout"
    # The comparison ran out of memory or its process died, twice.
    error = "error"

    __str__ = str.__str__


@dataclass(frozen=True)
class VerifierSettings:
    """How answers are compared (``reward.custom_reward_function.reward_kwargs.verifier``)."""

    # Seconds that one comparison may take before its process is killed. Over 8,000 MATH answers the slowest honest one
    # takes about a second on an idle core.
    deadline_s: float = setting(5.0, "a finite number > 0", lambda x: x > 0)
    # RLIMIT_AS of one process, MiB.
    memory_mb: int = setting(1024, "a whole number >= 256; sympy alone takes 150", lambda x: x >= 256)
    # Processes, started on the first answer that is no integer. With R reward workers a run has R times as many.
    workers: int = setting(2, "a whole number >= 1", lambda x: x >= 1)
    # integer: only ASCII integers are ever right, no process is started. symmetric: part by part (`equality`), the same
    # in both directions. math_verify: as math-verify compares, for published numbers. last_integer: as integer, but of
    # the last number in the text, boxed or not: for models that do not know the box.
    strictness: str = one_of("symmetric", STRICTNESS)
    # Verdicts remembered, keyed by (right answer, box).
    cache_size: int = setting(16384, "a whole number >= 0", lambda x: x >= 0)

    def problems(self) -> list[str]:
        """Return every problem of the settings as one line each (empty: none)."""
        return out_of_bounds(self, "verifier")
