"""The settings of RAPO: one frozen dataclass, the only place where their defaults and bounds stand."""

from dataclasses import dataclass, field
from typing import Any

from rapo_verl.method.settings import one_of, out_of_bounds, read_settings, setting

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
    coef: float = setting(0.3, "a finite number >= 0 (0 switches RAPO off)", lambda x: x >= 0)
    # Of the sampled token (forward_kl.py says what each one's gradient really descends), or of the whole next-token
    # distribution, without sampling noise (head.py): `topk` names top_k tokens and puts the rest in one outcome,
    # `full` names the vocabulary, if it is small.
    estimator: str = one_of("bounded", ESTIMATORS)
    # `bounded` only: rho = reference/policy beyond which the gradient stops growing. Its gradient lies in
    # ratio * [1 - rho_max, 1]; 6 keeps the trace-variance below 1 where the unbiased one has 150. At rho = 1 the
    # gradient is zero; a bound below it would reverse it.
    rho_max: float = setting(6.0, "a finite number > 1", lambda x: x > 1)
    # alpha_s: the forward KL from the reference's own answers to the training problems (reference_answers.py), beside
    # the term above or without it. 0 switches it off. An extension of ours.
    samples_coef: float = setting(0.0, "a finite number >= 0", lambda x: x >= 0)
    # Drawn from the base that the run starts from.
    samples: str = setting("", "a folder of `rapo reference-answers`", lambda _: True)
    # Answers of a prompt in one step, at most; which ones is drawn anew each step.
    samples_per_prompt: int = setting(8, "a whole number >= 1", lambda x: x >= 1)
    # Weight of an answer that is not right beside 1 for a right one: 0 keeps right ones only, 1 is the plain KL.
    samples_weight_of_wrong: float = setting(0.0, "[0, 1]", lambda x: 0 <= x <= 1)


@dataclass(frozen=True)
class ReferenceConfig:
    """The reward-reweighted reference pi_ref^phi(r)."""

    # What "pi_ref^phi / Z" means; see reweighting.py.
    reading: str = one_of("token", READINGS)
    # Tokens of the reference that `topk` names, and the largest nucleus. Each token of a response ships them: 8 bytes
    # apiece.
    top_k: int = setting(64, "a whole number >= 1, at most the vocabulary", lambda x: x >= 1)
    # `nucleus` only: mass of the set of most likely tokens that is tempered.
    top_p: float = setting(0.95, "(0, 1]", lambda x: 0 < x <= 1)
    # The monotone map from reward to phi in [phi_min, 1].
    phi: str = one_of("linear", PHI_SHAPES)
    # phi of the lowest reward. 1 means: no reweighting, plain pi_ref.
    phi_min: float = setting(
        0.8, "(0, 1]. 0 would make the reference uniform over the padded vocabulary", lambda x: 0 < x <= 1
    )
    # Rewards at which phi reaches phi_min and 1; rewards outside are clamped.
    reward_min: float = setting(0.0, "a finite number", lambda _: True)
    reward_max: float = setting(1.0, "a finite number", lambda _: True)
    # `step` only: phi is 1 from this reward on.
    step_at: float = setting(0.5, "a finite number, above reward_min and at most reward_max", lambda _: True)
    # `power` only: exponent of the normalised reward; above 1 keeps phi low for longer.
    exponent: float = setting(2.0, "a finite number > 0", lambda x: x > 0)


@dataclass(frozen=True)
class RapoConfig:
    """Everything that RAPO adds to a veRL config (node ``rapo``); beta is verl's ``actor.entropy_coeff``."""

    forward_kl: ForwardKLConfig = field(default_factory=ForwardKLConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    # What makes log-probs and entropy of logits in the update, the old log-prob and the reference pass. `fast` is
    # head.py, with plain GRPO too; `verl` is veRL's wherever it can serve; `auto` is fast while RAPO is `on`, unless
    # something is set that only veRL's has.
    head: str = one_of("auto", HEADS)

    @property
    def enabled(self) -> bool:
        """Whether the forward KL is part of the loss."""
        return self.forward_kl.coef > 0

    @property
    def on(self) -> bool:
        """Whether the loss has a term of ours: the forward KL, or the one on reference answers."""
        return self.enabled or self.forward_kl.samples_coef > 0

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
        found = out_of_bounds(self, "rapo")
        if ref.reward_min >= ref.reward_max:
            found.append(
                f"rapo.reference.reward_min, reward_max are {ref.reward_min}, {ref.reward_max}; allowed: reward_min < "
                "reward_max"
            )
        elif ref.phi == "step" and (ref.step_at <= ref.reward_min or ref.step_at > ref.reward_max):
            found.append(
                f"rapo.reference.step_at is {ref.step_at}; allowed for phi=step: above reward_min ({ref.reward_min}), "
                f"at most reward_max ({ref.reward_max})"
            )
        if kl.samples_coef > 0 and not kl.samples:
            found.append(
                "rapo.forward_kl.samples_coef > 0 needs rapo.forward_kl.samples, a folder of `rapo reference-answers`"
            )
        if kl.coef == 0 and self.reweights:
            found.append(
                f"rapo.forward_kl.coef is 0 but rapo.reference.phi_min is {ref.phi_min}: a reweighted reference "
                "without the forward KL would silently change verl's own KL. Set rapo.reference.phi_min=1 to switch "
                "RAPO off, or rapo.forward_kl.coef > 0 to switch it on"
            )
        return found


def rapo_config_from(node: Any) -> RapoConfig:
    """Return a validated `RapoConfig` from a mapping (a resolved OmegaConf node or a plain dict).

    Args:
        node: nested mapping with the fields of `RapoConfig`; missing fields take their defaults.

    Raises:
        ValueError: every unknown key, wrong type and problem of the values, a line each.
    """
    problems: list[str] = []
    config = read_settings(RapoConfig, {} if node is None else node, "rapo", problems)
    problems += config.problems()
    if problems:
        raise ValueError("\n".join(problems))
    return config
