"""The settings of RAPO: one frozen dataclass, the only place where their defaults stand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

SAMPLE_ESTIMATORS = ("paper", "unbiased", "bounded")
PER_TOKEN_ESTIMATORS = ("topk", "full")
ESTIMATORS = (*SAMPLE_ESTIMATORS, *PER_TOKEN_ESTIMATORS)
# Largest vocabulary of `full`: each response token ships 8 bytes for each of its tokens.
FULL_VOCABULARY = 4096
READINGS = ("token", "nucleus", "unnormalized")
PHI_SHAPES = ("linear", "step", "power")
HEADS = ("auto", "fast", "verl")


@dataclass(frozen=True)
class ForwardKLConfig:
    """Forward KL(reference ‖ policy), the term that keeps the policy exploring."""

    # alpha of the paper. 0 switches RAPO off: the loss is verl's own, bit for bit.
    coef: float = 0.3
    # One of ESTIMATORS: of the sampled token (forward_kl.py says what each one's gradient really descends),
    # or of the whole next-token distribution, without sampling noise (head.py): `topk` names top_k tokens
    # and puts the rest in one outcome, `full` names the vocabulary, if it is small.
    estimator: str = "bounded"
    # `bounded` only: rho = reference/policy beyond which the gradient stops growing. Its gradient lies in
    # ratio * [1 - rho_max, 1]; 6 keeps the trace-variance below 1 where the unbiased one has 150.
    rho_max: float = 6.0
    # alpha_s: the forward KL from the reference's own answers to the training problems (reference_answers.py), beside
    # the term above or without it. 0 switches it off. An extension of ours.
    samples_coef: float = 0.0
    # Folder of `rapo reference-answers`, drawn from the base that the run starts from.
    samples: str = ""
    # Answers of a prompt in one step, at most; which ones is drawn anew each step.
    samples_per_prompt: int = 8
    # Weight of an answer that is not right beside 1 for a right one: 0 keeps right ones only, 1 is the plain KL.
    samples_weight_of_wrong: float = 0.0


@dataclass(frozen=True)
class ReferenceConfig:
    """The reward-reweighted reference pi_ref^phi(r)."""

    # One of READINGS: what "pi_ref^phi / Z" means; see reweighting.py.
    reading: str = "token"
    # Tokens of the reference that `topk` names, and the largest nucleus. Each token of a response ships them: 8 bytes
    # apiece.
    top_k: int = 64
    # `nucleus` only: mass of the set of most likely tokens that is tempered.
    top_p: float = 0.95
    # One of PHI_SHAPES: the monotone map from reward to phi in [phi_min, 1].
    phi: str = "linear"
    # phi of the lowest reward. 1 means: no reweighting, plain pi_ref.
    phi_min: float = 0.8
    # Rewards at which phi reaches phi_min and 1; rewards outside are clamped.
    reward_min: float = 0.0
    reward_max: float = 1.0
    # `step` only: phi is 1 from this reward on.
    step_at: float = 0.5
    # `power` only: exponent of the normalised reward; above 1 keeps phi low for longer.
    exponent: float = 2.0


@dataclass(frozen=True)
class RapoConfig:
    """Everything that RAPO adds to a veRL config (node ``rapo``); beta is verl's ``actor.entropy_coeff``."""

    forward_kl: ForwardKLConfig = field(default_factory=ForwardKLConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    # One of HEADS: what makes log-probs and entropy of logits in the update, the old log-prob and the reference pass.
    # `fast` is head.py, with plain GRPO too; `verl` is veRL's wherever it can serve; `auto` is fast while RAPO is on,
    # unless something is set that only veRL's has.
    head: str = "auto"

    @property
    def enabled(self) -> bool:
        """Whether the forward KL is part of the loss."""
        return self.forward_kl.coef > 0

    @property
    def reweights(self) -> bool:
        """Whether any reward gives phi < 1."""
        return self.reference.phi_min < 1

    @property
    def exports_tokens(self) -> bool:
        """Whether the reference pass must tell more than the log-prob of the sampled token."""
        per_token = self.forward_kl.estimator in PER_TOKEN_ESTIMATORS
        return self.enabled and (per_token or (self.reweights and self.reference.reading == "nucleus"))

    @property
    def per_sample_temperature(self) -> bool:
        """Whether the reference pass runs at a temperature for each sample."""
        return self.enabled and self.reweights and self.reference.reading == "token" and not self.exports_tokens

    def problems(self) -> list[str]:
        """Return every problem of the settings as one line each (empty: none)."""
        kl, ref = self.forward_kl, self.reference
        checks = [
            (self.head in HEADS, f"rapo.head is {self.head!r}; allowed: {', '.join(HEADS)}"),
            *_forward_kl_checks(kl),
            (
                ref.reading in READINGS,
                f"rapo.reference.reading is {ref.reading!r}; allowed: {', '.join(READINGS)}",
            ),
            (
                ref.top_k >= 1,
                f"rapo.reference.top_k is {ref.top_k}; allowed: a whole number >= 1, at most the vocabulary",
            ),
            (
                0 < ref.top_p <= 1,
                f"rapo.reference.top_p is {ref.top_p}; allowed: (0, 1]",
            ),
            (ref.phi in PHI_SHAPES, f"rapo.reference.phi is {ref.phi!r}; allowed: {', '.join(PHI_SHAPES)}"),
            (
                0 < ref.phi_min <= 1,
                f"rapo.reference.phi_min is {ref.phi_min}; allowed: (0, 1]. 0 would make the reference uniform over "
                "the padded vocabulary",
            ),
            (
                math.isfinite(ref.reward_min) and math.isfinite(ref.reward_max) and ref.reward_min < ref.reward_max,
                f"rapo.reference.reward_min, reward_max are {ref.reward_min}, {ref.reward_max}; allowed: finite, "
                "reward_min < reward_max",
            ),
            (
                ref.phi != "step" or ref.reward_min < ref.step_at <= ref.reward_max,
                f"rapo.reference.step_at is {ref.step_at}; allowed for phi=step: above reward_min ({ref.reward_min}), "
                f"at most reward_max ({ref.reward_max})",
            ),
            (
                math.isfinite(ref.exponent) and ref.exponent > 0,
                f"rapo.reference.exponent is {ref.exponent}; allowed: a finite number > 0",
            ),
            (
                self.enabled or not self.reweights or not math.isfinite(kl.coef) or kl.coef < 0,
                f"rapo.forward_kl.coef is 0 but rapo.reference.phi_min is {ref.phi_min}: a reweighted reference "
                "without the forward KL would silently change verl's own KL. Set rapo.reference.phi_min=1 to switch "
                "RAPO off, or rapo.forward_kl.coef > 0 to switch it on",
            ),
        ]
        return [message for ok, message in checks if not ok]


def _forward_kl_checks(kl: ForwardKLConfig) -> list[tuple[bool, str]]:
    return [
        (
            math.isfinite(kl.coef) and kl.coef >= 0,
            f"rapo.forward_kl.coef (alpha) is {kl.coef}; allowed: a finite number >= 0 (0 switches RAPO off)",
        ),
        (
            kl.estimator in ESTIMATORS,
            f"rapo.forward_kl.estimator is {kl.estimator!r}; allowed: {', '.join(ESTIMATORS)}",
        ),
        (
            math.isfinite(kl.rho_max) and kl.rho_max > 1,
            f"rapo.forward_kl.rho_max is {kl.rho_max}; allowed: a finite number > 1, since at rho = 1 the "
            "gradient is zero and a bound below it would reverse it",
        ),
        (
            math.isfinite(kl.samples_coef) and kl.samples_coef >= 0,
            f"rapo.forward_kl.samples_coef is {kl.samples_coef}; allowed: a finite number >= 0",
        ),
        (
            kl.samples_coef == 0 or bool(kl.samples),
            "rapo.forward_kl.samples_coef > 0 needs rapo.forward_kl.samples, a folder of `rapo reference-answers`",
        ),
        (
            kl.samples_per_prompt >= 1 and 0 <= kl.samples_weight_of_wrong <= 1,
            f"rapo.forward_kl.samples_per_prompt, samples_weight_of_wrong are {kl.samples_per_prompt}, "
            f"{kl.samples_weight_of_wrong}; allowed: a whole number >= 1, and [0, 1]",
        ),
    ]


def rapo_config_from(node: Any) -> RapoConfig:
    """Return a validated `RapoConfig` from a mapping (a resolved OmegaConf node or a plain dict).

    Args:
        node: nested mapping with the fields of `RapoConfig`; missing fields take their defaults.

    Raises:
        ValueError: every unknown key and wrong type, or else every problem of the values, a line each.
    """
    problems: list[str] = []
    config = _build(RapoConfig(), {} if node is None else node, "rapo", problems)
    problems = problems or config.problems()
    if problems:
        raise ValueError("\n".join(problems))
    return config


def _build(default: Any, node: Any, path: str, problems: list[str]) -> Any:
    """Return ``default`` (a config dataclass) with the values of ``node``, adding what is wrong to ``problems``."""
    known = [f.name for f in fields(default)]
    if not isinstance(node, Mapping):
        problems.append(f"{path} is {node!r}; allowed: a mapping with {', '.join(known)}")
        return default
    values: dict[str, Any] = {}
    for key, value in node.items():
        if key not in known:
            problems.append(f"unknown key {path}.{key}; allowed: {', '.join(known)}")
            continue
        was = getattr(default, key)
        if is_dataclass(was):
            values[key] = _build(was, value, f"{path}.{key}", problems)
        elif isinstance(was, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"{path}.{key} is {value!r}; allowed: a number")
        elif isinstance(was, int) and (isinstance(value, bool) or not isinstance(value, int)):
            problems.append(f"{path}.{key} is {value!r}; allowed: a whole number")
        elif isinstance(was, str) and not isinstance(value, str):
            problems.append(f"{path}.{key} is {value!r}; allowed: a string")
        else:
            values[key] = value
    return replace(default, **values)
