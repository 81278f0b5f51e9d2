r"""What an answer is worth: the last ``\boxed{}`` against the right one, in processes that may die. No veRL in here.

`answer` finds and cleans text, `reading` takes it apart, `formula` and `equality` compare, `nursery` does so in a
process that may be killed, `pool` keeps such processes, `verify` ties them, `function` is the reward that veRL calls.
"""

from rapo_verl.reward.answer import MAX_BOX, last_boxed, parse_integer, verify_integer
from rapo_verl.reward.verdict import Verdict, VerifierSettings
from rapo_verl.reward.verify import Verifier, shared_verifier

__all__ = [
    "MAX_BOX",
    "Verdict",
    "Verifier",
    "VerifierSettings",
    "last_boxed",
    "parse_integer",
    "shared_verifier",
    "verify_integer",
]
