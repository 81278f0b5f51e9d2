"""KL settings as terms: of a veRL config, with RAPO's node or without it, and of other frameworks by name."""

from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rapo_verl import Refused
from rapo_verl.method.config import rapo_config_from
from rapo_verl.theory import estimator_table as exact

# veRL's other names for its estimators; all that end in + have k2's gradient (verl 0.9.1, core_algos.py:2203).
SAME = {"kl": "k1", "mse": "k2", "k3": "low_var_kl"}


class Term(NamedTuple):
    """One KL term: its place ("loss" or "reward"), coefficient, name in `estimator_table`, and where it was set."""

    place: str
    coef: float
    estimator: str
    words: str


class Setting(NamedTuple):
    """What a config makes of its KL: the terms, what else to know, and how many updates old the oldest sample is."""

    title: str
    terms: tuple[Term, ...]
    notes: tuple[str, ...] = ()
    updates: int = 4


def _one(title: str, place: str, estimator: str, words: str) -> Setting:
    return Setting(title, (Term(place, 1.0, estimator, words),))


# By framework and option, as their sources read in 2026: NeMo-RL at 006907a, TRL at 00313f2, OpenRLHF clamping. The
# estimators are written down here anew (`estimator_table.OTHERS`), the frameworks are not called.
SETTINGS = {
    "trl-grpo": _one("TRL GRPO, beta > 0", "loss", "k3", "k3, not clamped"),
    "trl-grpo-corrected": _one("TRL GRPO, use_bias_correction_kl", "loss", "w k3", "k3 times pi / pi_old"),
    "trl-rloo": _one("TRL RLOO, beta > 0", "reward", "k1 in the reward", "k1, of the policy that sampled"),
    "trl-ppo-k3": _one("TRL PPO, kl_estimator=k3", "reward", "k3 in the reward", "k3, of the policy that sampled"),
    "nemo-rl": _one("NeMo-RL, reference_policy_kl_type=k3", "loss", "score k3, clamped", "k3 and its score function"),
    "nemo-rl-on-policy-approximation": _one(
        "NeMo-RL, use_on_policy_kl_approximation", "loss", "w k3, clamped", "k3 times pi / pi_generation"
    ),
    "openrlhf": _one("OpenRLHF, init_kl_coef > 0", "reward", "k1 in the reward", "k1, clamped at 10 nats"),
    "openrlhf-k2-loss": _one("OpenRLHF, use_kl_loss, kl_estimator=k2", "loss", "k2, clamped", "k2, clamped at 10"),
    "openrlhf-k3-loss": _one("OpenRLHF, use_kl_loss, kl_estimator=k3", "loss", "low_var_kl", "k3, clamped at 10"),
    "verl-low_var_kl": _one("veRL, kl_loss_type=low_var_kl", "loss", "low_var_kl", "k3, clamped at 10"),
    "verl-k1": _one("veRL, kl_loss_type=kl", "loss", "k1", "k1"),
    "verl-k2": _one("veRL, kl_loss_type=mse", "loss", "k2", "k2"),
    "verl-k3+": _one("veRL, kl_loss_type=low_var_kl+", "loss", "k3+", "k3's value, k2's gradient"),
    "verl-abs": _one("veRL, kl_loss_type=abs", "loss", "abs", "|k1|"),
    "verl-reward": _one("veRL, use_kl_in_reward", "reward", "k1 in the reward", "k1, of the policy that sampled"),
    "verl-reward-k3": _one(
        "veRL, use_kl_in_reward, kl_penalty=low_var_kl", "reward", "low_var_kl in the reward", "k3, clamped at 10"
    ),
}


def read_setting(config: DictConfig, title: str) -> Setting:
    """Return what a veRL config, with or without RAPO's node, makes of its KL."""

    def get(key: str, default: Any) -> Any:
        value = OmegaConf.select(config, key, default=default)
        return default if value is None else value

    try:
        rapo = rapo_config_from(OmegaConf.to_container(get("rapo", OmegaConf.create()), resolve=True))
    except ValueError as error:
        raise Refused(str(error).splitlines()) from error
    actor, kl, terms, notes = "actor_rollout_ref.actor.", rapo.forward_kl, [], []
    # A plain veRL config has no node `rapo`, whose default is on.
    if rapo.enabled and "rapo" in config:
        bounded = kl.estimator == "bounded" and kl.rho_max != exact.RHO_MAX
        name = f"bounded rho<={kl.rho_max:g}" if bounded else kl.estimator
        terms.append(Term("loss", kl.coef, name, f"rapo.forward_kl.estimator={kl.estimator}"))
    elif get(actor + "use_kl_loss", False) and (coef := get(actor + "kl_loss_coef", 0.001)):
        kind = get(actor + "kl_loss_type", "low_var_kl")
        terms.append(Term("loss", coef, _verl(kind), f"actor.kl_loss_type={kind}"))
    if kl.samples_coef > 0:
        terms.append(Term("loss", kl.samples_coef, exact.ANSWERS, "rapo.forward_kl.samples"))
        notes.append(
            f"Reference answers: a wrong one counts {kl.samples_weight_of_wrong:g} of a right one, so that ref means "
            "the base's answers weighted so; sentences on the second mode hold where that mode is right."
        )
    if get("algorithm.use_kl_in_reward", False):
        kind, coef = get("algorithm.kl_penalty", "kl"), get("algorithm.kl_ctrl.kl_coef", 0.001)
        # The value is the forward's: k3+ and k3 are one in the reward.
        name = _verl(kind.removesuffix("+")) + exact.IN_REWARD
        terms.append(Term("reward", coef, name, f"algorithm.kl_penalty={kind}"))
        notes.append("In the reward the term passes through the advantage: GRPO divides it by the group's spread.")
    if rapo.reweights and rapo.enabled and "rapo" in config:
        notes.append(
            f"ref is the reweighted reference pi_ref^phi(r), phi from {rapo.reference.phi_min:g} at the lowest reward "
            "to 1: flatter where the reward is low."
        )
    if beta := get(actor + "entropy_coeff", 0.0):
        notes.append(f"Beside it an entropy bonus of {beta:g}, which is no KL to the reference.")
    batch, mini = get("data.train_batch_size", 1024), get(actor + "ppo_mini_batch_size", 256)
    return Setting(title, tuple(terms), tuple(notes), max(0, batch // mini * get(actor + "ppo_epochs", 1) - 1))


def _verl(kind: str) -> str:
    name = "k3+" if kind.endswith("+") else SAME.get(kind, kind)
    if name not in exact.VERL:
        raise Refused(f"veRL has no KL {kind!r}; allowed: {', '.join((*SAME, *exact.VERL))}")
    return name


def read_file(path: Path, overrides: list[str]) -> DictConfig:
    """Return a YAML file of veRL's settings, a run's config.yaml for one; what it does not say is veRL's default."""
    try:
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise Refused(f"{path} is no config: {error}") from error
    if not isinstance(config, DictConfig):
        raise Refused(f"{path} holds {type(config).__name__}, not settings")
    return config
