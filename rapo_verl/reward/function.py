r"""The reward function that veRL calls, and what a trainer makes of its verdicts.

1 for a right answer in the last ``\boxed{}``, else 0. Settings:
``reward.custom_reward_function.reward_kwargs.verifier={...}``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from rapo_verl.method.settings import read_settings
from rapo_verl.reward import Verdict, VerifierSettings, shared_verifier

# Field of veRL's extra_info that `rapo_verl.training.rollout.SeededAgentLoopWorker` adds to every response.
TRUNCATED = "truncated"
# Failed checks below which a share of them says nothing: one in a batch of eight is 12 %.
_MIN_FAILED = 8


def reward_settings(verifier: Mapping[str, Any] | None = None, **unknown: Any) -> VerifierSettings:
    """Return the settings in ``reward_kwargs``; a ValueError with a line for each problem, an unknown key is one."""
    problems = [f"unknown key {key}; allowed: verifier" for key in unknown]
    settings = read_settings(VerifierSettings, verifier or {}, "verifier", problems)
    problems += settings.problems()
    if problems:
        raise ValueError("\n".join(f"reward.custom_reward_function.reward_kwargs: {problem}" for problem in problems))
    return settings


@lru_cache(maxsize=8)
def _settings(verifier: tuple) -> VerifierSettings:
    return reward_settings(dict(verifier))


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    verifier: Mapping[str, Any] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Return veRL's reward record of one response (set by ``reward.custom_reward_function``).

    veRL's reward loop (0.9.1 experimental/reward_loop/reward_manager/naive.py:66) awaits it for each response by
    itself, so a slow comparison holds up no other response.

    Args:
        data_source: unused; no name of a data set changes how its answers are checked.
        solution_str: the response, special tokens removed.
        ground_truth: the right answer.
        extra_info: of the row, and from our rollout whether the response was cut off at its limit.
        verifier: settings of `VerifierSettings` that differ from their defaults.

    Returns:
        ``score`` and ``acc``, 1.0 or 0.0; ``verdict``; ``answer``, what the box held, or ""; ``truncated``.

    Raises:
        ValueError: the ground truth is empty, or no integer where only integers can be right; the run stops and names
            the sample.
    """
    settings = _settings(tuple((verifier or {}).items()))
    verdict, answer = await shared_verifier(settings).verify_async(solution_str, ground_truth)
    right = float(verdict is Verdict.correct)
    return {
        "score": right,
        "acc": right,
        "verdict": verdict.value,
        "answer": answer or "",
        "truncated": bool((extra_info or {}).get(TRUNCATED, False)),
    }


async def compute_integer_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> dict[str, Any]:
    """Return `compute_score` where every answer is an integer: no process is started, no other box is ever right."""
    return await compute_score(data_source, solution_str, ground_truth, extra_info, verifier={"strictness": "integer"})


class VerifierFailingError(RuntimeError):
    """So many checks ran into their limits that rewards would no longer say what is right."""


def verdict_metrics(records: Iterable[Mapping[str, Any]], *, max_failed_share: float) -> dict[str, float]:
    """Return the counts of a batch's verdicts as metrics ``rapo/verifier/*``, and ``rapo/truncated``, a share.

    Empty if another function rewarded the batch.

    VerifierFailingError: `_MIN_FAILED` or more of them, and above that share, are timeouts and errors.
    """
    records = [record for record in records if "verdict" in record]
    if not records:
        return {}
    counts = Counter(record["verdict"] for record in records)
    failed = counts[Verdict.timeout.value] + counts[Verdict.error.value]
    if failed >= _MIN_FAILED and failed > max_failed_share * len(records):
        examples = [r["answer"][:80] for r in records if r["verdict"] in (Verdict.timeout, Verdict.error)]
        raise VerifierFailingError(
            f"{counts[Verdict.timeout.value]} of {len(records)} answers ran into the verifier's deadline and "
            f"{counts[Verdict.error.value]} into its memory limit or a dead process, more than the allowed share of "
            f"{max_failed_share}; each would be rewarded 0. First ones: {examples[:3]!r}. If the machine is "
            "overloaded, raise +reward.custom_reward_function.reward_kwargs.verifier.deadline_s (or .memory_mb); if "
            "the policy writes such answers, raise +trainer.v1.sampler.sampler_kwargs.max_failed_share"
        )
    metrics = {f"rapo/verifier/{verdict.value}": float(counts[verdict.value]) for verdict in Verdict}
    truncated = float(sum(record["truncated"] for record in records))
    # veRL's response_length/clip_ratio is not the share: it counts what is as long as the longest of the batch.
    metrics |= {"rapo/verifier/truncated": truncated, "rapo/truncated": truncated / len(records)}
    return metrics
