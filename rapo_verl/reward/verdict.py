"""What a check can say, and the settings under which it says it."""

import math
from dataclasses import dataclass, fields
from enum import Enum

STRICTNESS = ("integer", "symmetric", "math_verify")


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
    deadline_s: float = 5.0
    # RLIMIT_AS of one process, MiB; the idle process has about 150.
    memory_mb: int = 1024
    # Processes, started on the first answer that is no integer. With R reward workers a run has R times as many.
    workers: int = 2
    # integer: only ASCII integers are ever right, no process is started. symmetric: math-verify in both directions,
    # plus what `answer.conflict` knows to differ. math_verify: as math-verify compares, for published numbers.
    strictness: str = "symmetric"
    # Verdicts remembered, keyed by (right answer, box).
    cache_size: int = 16384

    def problems(self) -> list[str]:
        """Return every problem of the settings as one line each (empty: none)."""
        checks = [
            (math.isfinite(self.deadline_s) and self.deadline_s > 0, "deadline_s", "a finite number > 0"),
            (self.memory_mb >= 256, "memory_mb", ">= 256; sympy alone takes 150"),
            (self.workers >= 1, "workers", ">= 1"),
            (self.strictness in STRICTNESS, "strictness", ", ".join(STRICTNESS)),
            (self.cache_size >= 0, "cache_size", ">= 0"),
        ]
        return [
            f"verifier.{name} is {getattr(self, name)!r}; allowed: {allowed}" for ok, name, allowed in checks if not ok
        ]


def build_settings(cls: type, node: object, path: str) -> tuple[object | None, list[str]]:
    """Return ``cls(**node)`` and the problems that it has; None where it cannot be built.

    Args:
        cls: a frozen dataclass of plain numbers and strings with ``problems()``.
        node: mapping of its fields, or None for the defaults.
        path: of the node, for messages.
    """
    values = dict(node or {})  # type: ignore[call-overload]
    kinds = {f.name: f.type for f in fields(cls)}
    wrong = [f"unknown key {path}.{key}; allowed: {', '.join(kinds)}" for key in values if key not in kinds]
    for key, value in values.items():
        want = (int, float) if kinds.get(key) is float else kinds.get(key)
        if key in kinds and (not isinstance(value, want) or isinstance(value, bool)):  # type: ignore[arg-type]
            wrong.append(f"{path}.{key} is {value!r}; allowed: {getattr(kinds[key], '__name__', kinds[key])}")
    if wrong:
        return None, wrong
    settings = cls(**values)
    return settings, settings.problems()
