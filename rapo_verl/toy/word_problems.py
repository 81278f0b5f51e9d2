"""Arithmetic and word problems for a small language model, drawn from a seed, in three levels.

A family is a sentence with numbers in it. Which numbers it asks for decides whether a problem is a training or an
evaluation one: the two share no family with the same numbers, in any order.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Split = Literal["train", "eval"]

NAMES: Final = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Jack", "Emma")
THINGS: Final = ("apples", "pens", "coins", "books", "cards", "shells", "stamps", "cups")
# Every fourth set of numbers of a family is an evaluation problem.
EVAL_SHARE: Final = 4


@dataclass(frozen=True)
class Family:
    """Problems of one kind.

    Attributes:
        level: 1 to 3.
        text: with {name}, {other}, {things} and the numbers {0}, {1}, ...
        ranges: of each number, both ends included.
        solve: from the numbers to the right answer.
    """

    level: int
    text: str
    ranges: tuple[tuple[int, int], ...]
    solve: Callable[..., int]


FAMILIES: Final = {
    "add": Family(1, "What is {0} + {1}?", ((5, 30), (2, 9)), lambda a, b: a + b),
    "gift": Family(
        1,
        "{name} has {0} {things}. {other} gives {name} {1} more. How many {things} does {name} have now?",
        ((5, 30), (2, 9)),
        lambda a, b: a + b,
    ),
    "times": Family(1, "What is {0} * {1}?", ((2, 15), (2, 9)), lambda a, b: a * b),
    "add tens": Family(2, "What is {0} + {1}?", ((11, 59), (11, 39)), lambda a, b: a + b),
    "subtract": Family(2, "What is {0} - {1}?", ((20, 60), (3, 19)), lambda a, b: a - b),
    "spend": Family(
        2,
        "{name} has {0} {things}. {name} buys {1} more and then gives {2} to {other}. "
        "How many {things} does {name} have left?",
        ((5, 20), (2, 9), (2, 6)),
        lambda a, b, c: a + b - c,
    ),
    "boxes": Family(
        3,
        "{name} has {0} boxes with {1} {things} in each box, and {2} more {things}. "
        "How many {things} does {name} have?",
        ((2, 9), (2, 9), (2, 9)),
        lambda a, b, c: a * b + c,
    ),
    "times tens": Family(3, "What is {0} * {1}?", ((16, 59), (3, 9)), lambda a, b: a * b),
    "shop": Family(
        3,
        "A pen costs {0} dollars and a book costs {1} dollars. {name} buys {2} pens and {3} books. "
        "How many dollars does {name} pay?",
        ((2, 6), (2, 9), (2, 6), (2, 6)),
        lambda a, b, c, d: a * c + b * d,
    ),
}


@dataclass(frozen=True)
class WordProblem:
    """One problem: its id, family, level, question, and right answer, an integer as text."""

    id: str
    family: str
    level: int
    question: str
    answer: str


def split_of(family: str, numbers: list[int]) -> Split:
    """Return the split of a family's problem; the order of its numbers does not matter."""
    key = f"{family} {sorted(numbers)}"
    return "eval" if zlib.crc32(key.encode()) % EVAL_SHARE == 0 else "train"


def word_problems(split: Split, count: int, *, seed: int) -> list[WordProblem]:
    """Return problems, families in turn, no question twice.

    The smallest family has about 80 training and 20 evaluation problems: more than there are is a ValueError.
    """
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    return [_fresh(rng, i, split, seen) for i in range(count)]


def _fresh(rng: random.Random, number: int, split: Split, seen: set[str]) -> WordProblem:
    """Return a problem of the split whose question is not among those seen, and add it to them."""
    name = list(FAMILIES)[number % len(FAMILIES)]
    family = FAMILIES[name]
    for _ in range(10_000):
        numbers = [rng.randint(*span) for span in family.ranges]
        person, other = rng.sample(NAMES, 2)
        question = family.text.format(*numbers, name=person, other=other, things=rng.choice(THINGS))
        if question not in seen and split_of(name, numbers) == split:
            seen.add(question)
            identity = f"{split}-{number:05d}"
            return WordProblem(identity, name, family.level, question, str(family.solve(*numbers)))
    raise ValueError(f"family {name!r} has no more {split} problems; ask for fewer")
