"""A study: the results that one report compares, made only if they may stand in one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapo_verl import Refused
from rapo_verl.method.passk import default_ks
from rapo_verl.report.responses import Responses

HEADLINE_KS = (1, 16, 64)
ROLES = ("rapo", "grpo", "base")
# The enumerated curve goes on past n/2, where sampling stops being informative, for three more doublings.
EXACT_DOUBLINGS = 3


@dataclass(frozen=True, eq=False)
class EvalResult:
    """How often one model solved each of P problems.

    Attributes:
        correct: Right samples of each problem, of n.
        draw: Which draw of the model; two results with one draw may be the same samples.
        exact: Enumerated success probability of each problem, where it can be had.
        sources: The set that each problem comes from; empty where there is only one.
        asked: Question and right answer of each problem; empty where they are not known.
        role: "base", "grpo", "rapo" or "other"; empty: the first of these words in the name.
        protocol: What must be equal for a comparison of models: temperature, top-p, max tokens, system prompt.
        meta: What else is known of its making: model, its sha256, data, date.
    """

    name: str
    n: int
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    correct: tuple[int, ...]
    draw: int
    exact: tuple[float, ...] | None = None
    sources: tuple[str, ...] = ()
    asked: tuple[tuple[str, str], ...] = ()
    role: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)
    responses: Responses | None = None

    def __post_init__(self) -> None:
        """Tell the role from the name where none is given; what counts may be, `rapo_verl.method.passk` says."""
        role = role_in(self.name) if not self.role else self.role if self.role in ROLES else "other"
        object.__setattr__(self, "role", role)


def role_in(name: str) -> str:
    """Return the first of ROLES that stands in a name, or "other"."""
    return next((role for role in ROLES if role in name.casefold()), "other")


@dataclass(frozen=True, eq=False)
class Study:
    """What one report is about; Refused, with every fault at once, unless its results may stand in one table.

    Attributes:
        results: One a model, on the same problems with the same n. All are scored, the base too.
        hard_choice: Another draw of the base, by the base's name. It chooses Hard and scores nothing. None: no Hard.
        settings: What was run, in the order to show: configuration, commit, versions, seeds, commands.
        histories: Of each training run its metric dicts, one a step, with the key "step".
        samples: Of each problem "question", "gold" and "models": name to samples (`responses.samples_behind`).
        force_same_draw: Let a scored draw choose Hard; figure and page then say so.
        force: Compare models that were sampled differently; the page then says so.
        level: Content of bands and intervals, of `draws` draws each.
    """

    results: tuple[EvalResult, ...]
    hard_choice: EvalResult | None = None
    title: str = "pass@k"
    settings: Mapping[str, str] = field(default_factory=dict)
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    force_same_draw: bool = False
    force: bool = False
    level: float = 0.95
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise Refused unless the results may be compared."""
        if not self.results:
            raise Refused("a study needs at least one result; got none")
        faults = _different_problems([*self.results, *([self.hard_choice] if self.hard_choice else [])])
        if len(set(self.names)) < len(self.names):
            faults.append(f"names must differ; got {self.names}")
        made = [result.meta["manifest_sha256"] for result in self.results if "manifest_sha256" in result.meta]
        if len(set(made)) < len(made):
            faults.append(f"two of {self.names} are one evaluation: the same model, problems and draw; give it once")
        sizes = {result.name: result.n for result in self.results}
        if len(set(sizes.values())) > 1:
            faults.append(f"n must be the same; got {sizes}")
        if self.sampled_differently and not self.force:
            faults += [*self.sampled_differently, "sample them alike, or give --force, and the report says so"]
        faults += _hard_faults(self)
        for name, history in self.histories.items():
            if any("step" not in record for record in history):
                faults.append(f'training {name!r}: every record needs the key "step"')
        if faults:
            raise Refused(faults)

    @cached_property
    def sampled_differently(self) -> list[str]:
        """What differs in how the results, and the draw that chose Hard, were sampled: a line each."""
        said = [(result.name, result.protocol) for result in self.results if result.protocol]
        if self.hard_choice and self.hard_choice.protocol:
            said.append((f"{self.hard_choice.name}, Hard", self.hard_choice.protocol))
        keys = dict.fromkeys(key for _, protocol in said for key in protocol)
        return [
            f"{key} differs: " + ", ".join(f"{protocol.get(key)} for {name}" for name, protocol in said)
            for key in keys
            if len({str(protocol.get(key)) for _, protocol in said}) > 1
        ]

    @cached_property
    def names(self) -> list[str]:
        """Of the models."""
        return [result.name for result in self.results]

    @cached_property
    def n(self) -> int:
        """Samples a problem."""
        return self.results[0].n

    @cached_property
    def ks(self) -> list[int]:
        """The k at which pass@k is estimated."""
        return list(default_ks(self.n))

    @cached_property
    def exact_ks(self) -> list[int]:
        """The k of enumerated curves: `ks`, and three doublings more."""
        return [*self.ks, *(self.ks[-1] * 2**i for i in range(1, EXACT_DOUBLINGS + 1))]

    @cached_property
    def headline_ks(self) -> list[int]:
        """The few k of the tables."""
        return sorted({k for k in HEADLINE_KS if k < self.ks[-1]} | {self.ks[-1]})

    @cached_property
    def intervals(self) -> dict[str, Any]:
        """How every band and interval is drawn: the options of `rapo_verl.method.passk`."""
        return {"level": self.level, "draws": self.draws, "seed": self.seed}

    @cached_property
    def base(self) -> EvalResult:
        """The model that chose Hard, else the first of that role, else the first."""
        named = [r for r in self.results if self.hard_choice and r.name == self.hard_choice.name]
        return [*named, *(r for r in self.results if r.role == "base"), self.results[0]][0]

    @cached_property
    def hard(self) -> NDArray[np.bool_]:
        """Which problems are Hard (P,): the base got none right in the draw that chooses, and only chooses.

        On that draw the base would score 0 by construction, and a difference to it would be regression to the mean.
        """
        if self.hard_choice is None:
            return np.zeros(len(self.base.ids), dtype=bool)
        return np.asarray(self.hard_choice.correct) == 0

    @cached_property
    def hard_weights(self) -> NDArray[np.float64] | None:
        """(1 - p_base)^n (P,): the probability that the choosing draw puts each problem into Hard, if p is known."""
        if self.hard_choice is None:
            return None
        p = self.hard_choice.exact or self.base.exact
        return None if p is None else (1 - np.asarray(p, dtype=np.float64)) ** self.hard_choice.n

    @cached_property
    def same_draw(self) -> bool:
        """Whether Hard was chosen on a draw that is also scored."""
        return any(_shares_draw(result, self.hard_choice) for result in self.results if self.hard_choice)

    @cached_property
    def sets(self) -> dict[str, NDArray[np.bool_]]:
        """Each set of problems and which problems are in it: "all", and its parts if there are several."""
        labels = list(dict.fromkeys(self.base.sources))
        parts = {label: np.array(self.base.sources) == label for label in labels if len(labels) > 1}
        return {"all": np.ones(len(self.base.ids), dtype=bool), **parts}

    @cached_property
    def parts(self) -> dict[tuple[str, str], NDArray[np.bool_]]:
        """Which problems are in each (set, scope): of every set Full, and Hard where a draw chose it."""
        scopes = {"full": ~np.zeros_like(self.hard)} | ({"hard": self.hard} if self.hard_choice else {})
        return {(s, scope): members & mask for s, members in self.sets.items() for scope, mask in scopes.items()}

    def title_of(self, label: str, scope: str) -> str:
        """Return a part in words: its set, where there are several, its scope and its size."""
        place = "" if len(self.sets) == 1 else "All sets · " if label == "all" else f"{label} · "
        return f"{place}{scope.capitalize()} · {self.parts[label, scope].sum()} problems"

    @cached_property
    def pairs(self) -> list[tuple[EvalResult, EvalResult]]:
        """(a, b) for b the base and then each GRPO model: every other model against it, once a pair."""
        references = [self.base, *(r for r in self.results if r.role == "grpo" and r is not self.base)]
        return [
            (a, b) for i, b in enumerate(references) for a in self.results if a is not b and a not in references[:i]
        ]


def _different_problems(results: Sequence[EvalResult]) -> list[str]:
    """Return how the problems of results differ from the first one's, a line each."""
    faults, first = [], results[0]
    for other in results[1:]:
        where = f"problems must be the same, in the same order: {first.name!r} and {other.name!r}"
        if set(first.ids) != set(other.ids):
            shared = len(set(first.ids) & set(other.ids))
            faults.append(f"{where} have {len(first.ids)} and {len(other.ids)}, {shared} of them in common")
        elif (first.ids, first.groups) != (other.ids, other.groups):
            faults.append(f"{where} have them in another order or other groups")
        elif first.asked and other.asked and first.asked != other.asked:
            which = [i for i, a, b in zip(first.ids, first.asked, other.asked) if a != b]
            faults.append(f"{where} have other questions or right answers under {len(which)} ids, first {which[0]!r}")
    return faults


def _hard_faults(study: Study) -> list[str]:
    chosen, faults = study.hard_choice, []
    if chosen is None:
        return []
    if chosen.name not in study.names:
        faults.append(f"Hard is chosen on a draw of {chosen.name!r}, which must be among the results")
    for r in study.results:
        if _shares_draw(r, chosen) and not study.force_same_draw:
            faults.append(
                f"Hard must be chosen on a draw that scores no model; {r.name!r} (draw {r.draw}) and the one that "
                f"chooses (draw {chosen.draw}) share a draw: sample the base once more"
            )
    return faults


def _shares_draw(scored: EvalResult, chosen: EvalResult) -> bool:
    """Return whether a result may be the draw that chose Hard: by its number, or by eight counts that had room."""
    weights = [result.meta.get("model_sha256") for result in (scored, chosen)]
    if all(weights) and weights[0] != weights[1]:
        return False  # a seed is hashed from the weights, too: two models' draws of one number share nothing
    free = sum(0 < c < scored.n for c in scored.correct)
    same = (scored.name, scored.n, scored.correct) == (chosen.name, chosen.n, chosen.correct) and free >= 8
    return scored.draw == chosen.draw or same
