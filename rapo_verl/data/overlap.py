"""Finds a question again that was copied with another wrapper, spelling, typo or sentence: by runs of three words."""

import heapq
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

# Invisible characters, math delimiters, and commands that only set the size or the space.
_MEANINGLESS = re.compile(
    r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]|\\[()\[\]]|\$"
    r"|\\(?:left|right|displaystyle|quad|qquad|[,;!:]|text|mathrm|textrm|rm)(?![a-z])"
)
# "\\frac12", as TeX reads it.
_FRACTION = re.compile(r"\\[dt]?frac ?([0-9]) ?([0-9])")
# A dot or comma between digits is part of a number.
_POINTS = re.compile(r"(?<![0-9])[.,]|[.,](?![0-9])")
_PUNCTUATION = str.maketrans("", "", ";:?!~{}")
_WORDS = re.compile(r"\\?[a-z]+|[0-9]+(?:[.,][0-9]+)*|[^\s\w{}.,;:?!~]")
_NUMBERS = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
# Of a held-out question this many runs are kept, those of the smallest hashes, and this share must be in another one.
SKETCH, SHARE = 24, 0.6


def _plain(question: str) -> str:
    text = unicodedata.normalize("NFKC", question).lower().replace("{,}", ",")
    return _FRACTION.sub(r"\\frac{\1}{\2}", _MEANINGLESS.sub("", text)).replace("\\dfrac", "\\frac")


def normalized(question: str) -> str:
    """Return a question without what differs between copies of it: case, spaces, LaTeX spacing, punctuation."""
    return _squeezed(_plain(question))


def _squeezed(plain: str) -> str:
    return _POINTS.sub("", "".join(plain.split()).translate(_PUNCTUATION))


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


def runs(plain: str) -> set[int]:
    """Return the hashes of every three words (numbers, signs) that follow each other; the same on every machine."""
    words = [_word_hash(word) for word in _WORDS.findall(plain)]
    return {(a * 31 + b) * 31 + c for a, b, c in zip(words, words[1:], words[2:])}


class HeldOut:
    """Questions that must not be in another set."""

    def __init__(self) -> None:
        self._exact: dict[str, str] = {}
        self._holders: dict[int, list[int]] = {}
        # Of each question: where it is, how many runs its sketch has, its numbers.
        self._known: list[tuple[str, int, Counter[str]]] = []

    def __len__(self) -> int:
        return len(self._known)

    def add(self, question: str, where: str) -> None:
        """Remember a question and where it is."""
        plain = _plain(question)
        self._exact[_squeezed(plain)] = where
        self.add_sketch(heapq.nsmallest(SKETCH, runs(plain)), where, _NUMBERS.findall(plain))

    def add_sketch(self, sketch: Iterable[int], where: str, numbers: Iterable[str] = ()) -> None:
        """Remember a question by its sketch; in a copy, all these numbers are there."""
        sketch = list(sketch)
        for run in sketch:
            self._holders.setdefault(run, []).append(len(self._known))
        self._known.append((where, len(sketch), Counter(numbers)))

    def find(self, question: str) -> str | None:
        """Return where a question is, in these words or nearly, or None.

        Nearly: `SHARE` of its runs of three words are there, and all its numbers, for with another number it is another
        problem. A sentence more or a typo is seen through; a paraphrase or a translation is not.
        """
        plain = _plain(question)
        exact = self._exact.get(_squeezed(plain))
        if exact is not None:
            return exact
        shared = Counter(i for run in self._holders.keys() & runs(plain) for i in self._holders[run])
        numbers: Counter[str] | None = None
        for i, count in shared.most_common():
            where, size, wanted = self._known[i]
            if count >= SHARE * size:
                numbers = Counter(_NUMBERS.findall(plain)) if numbers is None else numbers
                if wanted <= numbers:
                    return where
        return None


@lru_cache(maxsize=1)
def aime_keys() -> tuple[HeldOut, dict[str, int]]:
    """Return the problems of AIME 2024 and 2025, known by their sketches ("2024-I-8"), and their right answers."""
    stored = json.loads((Path(__file__).parent / "aime_keys.json").read_text())
    problems = HeldOut()
    for name, (_, sketch) in stored.items():
        problems.add_sketch((int(run, 36) for run in sketch.split()), name)
    return problems, {name: answer for name, (answer, _) in stored.items()}
