r"""The golden cases, one row each: what this verifier, math-verify and the scorers of three RL projects say.

    python benchmarks/verifier_cases.py > cases.md

math-verify and veRL are the installed packages. open-r1 and NeMo-RL are not installed: `open_r1` and `nemo_rl` call the
installed math-verify with the settings of open-r1's `accuracy_reward`, as circulating copies of its
src/open_r1/rewards.py have it, and of NeMo-RL's `HFVerifyWorker`
(nemo_rl/environments/math_environment.py, commit 00294d9b). Their own versions
of math-verify may say otherwise.
"""

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from golden_answers import PAIRS, RESPONSES

from rapo_verl.reward import Verifier, VerifierSettings


def math_verify_default(response: str, gold: str) -> bool:
    """Return math-verify's verdict, called as its README does, gold boxed."""
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response)))


def verl_scorer(response: str, gold: str) -> bool:
    """Return veRL's verdict, without its process pool (verl/utils/reward_score/math_verify.py:41)."""
    from verl.utils.reward_score.math_verify import _verify_in_subprocess

    return _verify_in_subprocess(f"\\boxed{{{gold}}}", response) > 0.5


def open_r1(response: str, gold: str) -> bool | None:
    """Return open-r1's verdict; None: it leaves the sample out, since the gold did not parse (golds go in unboxed)."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    wanted = parse(gold, extraction_mode="first_match")
    if not wanted:
        return None
    strict = NormalizationConfig(
        nits=False, malformed_operators=False, basic_latex=True, equations=True, boxed="all", units=True
    )
    config = LatexExtractionConfig(
        normalization_config=strict, boxed_match_priority=0, try_extract_without_anchor=False
    )
    return bool(verify(wanted, parse(response, extraction_config=[config], extraction_mode="first_match")))


def nemo_rl(response: str, gold: str) -> bool:
    """Return NeMo-RL's verdict (``hf_math_verify``); it counts whatever raises as wrong."""
    from math_verify.errors import TimeoutException
    from math_verify.metric import math_metric
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    metric = math_metric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
    )
    try:
        return metric([f"\\boxed{{{gold}}}"], [response])[0] > 0.5
    except (Exception, TimeoutException):  # as they do
        return False


SCORERS: dict[str, Callable[[str, str], bool | None]] = {
    "math-verify": math_verify_default,
    "veRL": verl_scorer,
    "open-r1": open_r1,
    "NeMo-RL": nemo_rl,
}


def said(scorer: Callable[[str, str], bool | None], response: str, gold: str) -> str:
    """Return "correct", "wrong", "left out", "hangs" (20 s) or the exception's name."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        verdict = scorer(response, gold)
        return "left out" if verdict is None else "correct" if verdict else "wrong"
    except TimeoutError:
        return "hangs"
    except Exception as error:  # what a scorer raises is its verdict here
        return type(error).__name__
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def visible(text: str) -> str:
    """Return text for a markdown table."""
    text = text if len(text) < 60 else text[:40] + "…"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return f"`{shown}`".replace("|", "\\|")


def main() -> None:
    """Print the table and how often each agrees with the wanted verdict."""
    logging.disable()
    cases = [(pair.gold, f"\\boxed{{{pair.box}}}", pair.verdict, pair.why) for pair in PAIRS]
    cases += [(gold, response, verdict, why) for response, gold, verdict, _, why in RESPONSES]
    verifier = Verifier(VerifierSettings(deadline_s=30))
    ours = [str(verdict) for verdict, _ in verifier.verify_many([c[1] for c in cases], [c[0] for c in cases])]
    verifier.close()
    rows, agree, taken, lost = [], dict.fromkeys(SCORERS, 0), dict.fromkeys(SCORERS, 0), dict.fromkeys(SCORERS, 0)
    for (gold, response, wanted, why), own in zip(cases, ours):
        cells = []
        for name, scorer in SCORERS.items():
            got = said(scorer, response, gold)
            right = (got == "correct") == (wanted == "correct")
            agree[name] += right
            taken[name] += got == "correct" and not right
            lost[name] += got != "correct" and not right
            cells.append(got if right else f"**{got}**")
        rows.append(f"| {visible(gold)} | {visible(response)} | {wanted} | {own} | {' | '.join(cells)} | {why} |")
    names = " | ".join(SCORERS)
    print(f"| right answer | response | wanted | this verifier | {names} | why |\n|{'---|' * (5 + len(SCORERS))}")
    print("\n".join(rows))
    print("\n| | " + names + " | this verifier |\n|---|" + "---|" * (len(SCORERS) + 1))
    own_right = sum(own == case[2] for own, case in zip(ours, cases))
    for title, counts, own in (
        ("as wanted", agree, own_right),
        ("wrongly correct", taken, sum(o == "correct" != c[2] for o, c in zip(ours, cases))),
        ("wrongly not correct", lost, sum(o != "correct" == c[2] for o, c in zip(ours, cases))),
    ):
        print(f"| {title} of {len(cases)} | " + " | ".join(str(counts[name]) for name in SCORERS) + f" | {own} |")


if __name__ == "__main__":
    main()
