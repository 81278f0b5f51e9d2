r"""The toy world: digit puzzles whose hidden right *plan* is easy, latent, rare or unseen for the base model.

A question names a family, a mode and six operand digits 1-9, for example ``A+ 381 734``. A solution writes plan letter
p and the digits ``op_p(x)`` of the first group, plan letter q and those of the second, then boxes the six digits:
``d482f917\boxed{482917}``. An op is a fixed permutation of the digits 1-9, so no answer has a leading zero and none can
be guessed (9^-6). The answer is right when the six digits are those of the problem's hidden plan (p, q); letters are
free. The mode, + or -, selects the plan in the easy and the rare families and means nothing in the others.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from rapo_verl.run.files import write_atomic

Split = Literal["train", "eval"]
IntArray = NDArray[np.int64]

KINDS: Final = ("easy",) * 3 + ("latent",) * 4 + ("rare",) * 3 + ("ood",) * 2
FAMILIES: Final = len(KINDS)
FAMILY_LETTERS: Final = "ABCDEFGHIJKL"
MODES: Final = "+-"
PLAN_LETTERS: Final = "abcdefgh"
OPS: Final = len(PLAN_LETTERS)
PLAN_PAIRS: Final = OPS * OPS
OPERANDS: Final = 6
# Of a family's 16 known plans, 0 and 1 are right ones, 4-7 usual wrong ones, 0-7 the latent choices, 15 the ood decoy.
KNOWN_PLANS: Final = 16
DECOY: Final = 15
# Heavy-tailed: the base finds every latent plan within 1024 draws, a policy that keeps only the best one does not.
LATENT_PRIOR: Final = (0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01)
# Corpus share of the right plan in each of the three rare families. A base trained for minutes gives such a plan less
# than its share, the more so the rarer it is: one draw of 1024 finds some of these problems and misses others.
RARE_RATES: Final = (1e-2, 5e-3, 2.5e-3)
EASY_RIGHT: Final = 0.5
EASY_OTHER_MODE: Final = 0.1
OOD_DECOY: Final = 0.02
# Also teaches the model to copy its own written digits into the box instead of computing them anew.
DIGIT_NOISE: Final = 0.02
# A weighted digit sum modulo a prime splits operands without a table of used ones; 6 of 31 residues are held out.
SPLIT_WEIGHTS: Final = (7, 11, 13, 17, 19, 23)
SPLIT_MODULUS: Final = 31
EVAL_RESIDUES: Final = 6


@dataclass(frozen=True)
class Puzzle:
    """One question with its hidden plan.

    Attributes:
        id: unique within one (split, seed).
        kind: "easy", "latent", "rare" or "ood".
        answer: the right integer, canonical (no leading zero).
        plan: the hidden right plan, p * 8 + q; not part of the question.
    """

    id: str
    family: int
    kind: str
    question: str
    answer: str
    plan: int


class World:
    """Plans and op tables drawn from one seed; every method is a pure function of its arguments and that seed."""

    def __init__(self, seed: int) -> None:
        """Draw eight digit permutations and sixteen known plans for each family."""
        rng = np.random.default_rng((1234, seed))
        self.seed = seed
        self.tables: IntArray = np.stack([rng.permutation(9) + 1 for _ in range(OPS)])
        self.plans: IntArray = np.stack([rng.permutation(PLAN_PAIRS)[:KNOWN_PLANS] for _ in range(FAMILIES)])
        self._hide_ood_pairs()

    def problems(self, split: Split, count: int, seed: int) -> list[Puzzle]:
        """Return `count` problems, families in turn; the seed draws operands, none in both splits, and plans."""
        rng = np.random.default_rng((self.seed, 1 if split == "train" else 2, seed))
        family, mode, operands = self._draw_questions(split, count, rng)
        latent = rng.choice(len(LATENT_PRIOR), size=count, p=LATENT_PRIOR)
        kind = np.array(KINDS)[family]
        index = np.select([kind == "latent", kind == "ood"], [latent, np.zeros_like(mode)], default=mode)
        plan = self.plans[family, index]
        digits = self.apply(plan, operands)
        return [
            Puzzle(
                id=f"{split}-{seed}-{i:05d}",
                family=int(family[i]),
                kind=str(kind[i]),
                question=_question(int(family[i]), int(mode[i]), operands[i]),
                answer="".join(map(str, digits[i])),
                plan=int(plan[i]),
            )
            for i in range(count)
        ]

    def corpus(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Return `count` (question, solution) pairs over training operands, as the base model sees them."""
        family, mode, operands, plan, digits = self.corpus_arrays(count, seed)
        return [
            (
                _question(int(family[i]), int(mode[i]), operands[i]),
                _solution(int(plan[i]), "".join(map(str, digits[i]))),
            )
            for i in range(count)
        ]

    def corpus_arrays(self, count: int, seed: int) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
        """Return what `corpus` spells out, for counting over samples too large for text.

        Returns:
            family [count], mode [count], operands [count, 6], plan [count] (p * 8 + q) and written digits [count, 6],
            noise included.
        """
        rng = np.random.default_rng((self.seed, 3, seed))
        family, mode, operands = self._draw_questions("train", count, rng)
        plan = self.plans[family, self._corpus_plan_index(family, mode, rng)]
        digits = self.apply(plan, operands)
        noisy = rng.random(digits.shape) < DIGIT_NOISE
        return family, mode, operands, plan, np.where(noisy, rng.integers(1, 10, digits.shape), digits)

    def apply(self, plan: IntArray, operands: IntArray) -> IntArray:
        """Return the six result digits [n, 6] of plans [n] on operands [n, 6]."""
        first = self.tables[plan[:, None] // OPS, operands[:, :3] - 1]
        second = self.tables[plan[:, None] % OPS, operands[:, 3:] - 1]
        return np.concatenate([first, second], axis=1)

    def right_solutions(self, problem: Puzzle) -> list[str]:
        """Return the 64 canonical solutions of a problem, one per plan pair, all carrying the right digits.

        The success probability of a model is the sum of their probabilities, up to answers in some other form.
        """
        return [_solution(plan, problem.answer) for plan in range(PLAN_PAIRS)]

    def _corpus_plan_index(self, family: IntArray, mode: IntArray, rng: np.random.Generator) -> IntArray:
        """Return the index [n] into each family's known plans that the corpus shows."""
        n = len(family)
        u = rng.random(n)
        wrong = rng.integers(4, 8, n)
        latent = rng.choice(len(LATENT_PRIOR), size=n, p=LATENT_PRIOR)
        kind = np.array(KINDS)[family]
        rate = np.zeros(FAMILIES)
        rate[[f for f in range(FAMILIES) if KINDS[f] == "rare"]] = RARE_RATES
        easy = np.where(u < EASY_RIGHT, mode, np.where(u < EASY_RIGHT + EASY_OTHER_MODE, 1 - mode, wrong))
        rare = np.where(u < rate[family], mode, wrong)
        ood = np.where(u < OOD_DECOY, DECOY, wrong)
        return np.select([kind == "easy", kind == "latent", kind == "rare"], [easy, latent, rare], default=ood)

    def _draw_questions(
        self, split: Split, count: int, rng: np.random.Generator
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Return families in turn [count], modes 0 or 1 [count] and operands [count, 6] belonging to the split."""
        if split not in ("train", "eval"):
            raise ValueError(f"split is {split!r}, allowed: 'train', 'eval'")
        # 8-fold oversampling: a row is in the smaller split with probability 6/31, so a shortfall is out of reach.
        x = rng.integers(1, 10, (8 * count + 256, OPERANDS))
        held_out = x @ np.array(SPLIT_WEIGHTS) % SPLIT_MODULUS < EVAL_RESIDUES
        mode = rng.integers(0, len(MODES), count)
        return np.arange(count) % FAMILIES, mode, x[held_out if split == "eval" else ~held_out][:count]

    def _hide_ood_pairs(self) -> None:
        """Make each ood family's right pair (p, q) unseen there: p appears in its decoy, q never comes second.

        The pair itself is common elsewhere: it is the second-best plan of a latent family, so it can be transferred.
        """
        for family in (f for f in range(FAMILIES) if KINDS[f] == "ood"):
            p, q = divmod(int(self.plans[family, 0]), OPS)
            others = self.plans[family, 1:]
            second = np.where(others % OPS == q, (q + 1) % OPS, others % OPS)
            self.plans[family, 1:] = others // OPS * OPS + second
            self.plans[family, DECOY] = p * OPS + (q + 3) % OPS
        latent = KINDS.index("latent")
        ood = KINDS.index("ood")
        for i in range(KINDS.count("ood")):
            self.plans[latent + i, 1] = self.plans[ood + i, 0]


def write_jsonl(problems: Sequence[Puzzle], path: Path) -> None:
    """Write problems as `rapo data prepare` reads them, hidden plans left out; the file appears whole or not at all."""
    rows = [{"id": p.id, "question": p.question, "answer": p.answer, "subject": p.kind} for p in problems]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _question(family: int, mode: int, operands: IntArray) -> str:
    """Return e.g. "A+ 381 734": spaces sit where the solution has its plan letters, so offsets are constant."""
    x = "".join(map(str, operands))
    return f"{FAMILY_LETTERS[family]}{MODES[mode]} {x[:3]} {x[3:]}"


def _solution(plan: int, digits: str) -> str:
    """Return the worked solution for plan p * 8 + q and six written digits."""
    p, q = divmod(plan, OPS)
    return f"{PLAN_LETTERS[p]}{digits[:3]}{PLAN_LETTERS[q]}{digits[3:]}\\boxed{{{digits}}}"
