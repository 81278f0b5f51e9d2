"""The ladder's protocol, written before the reported runs: pairs, methods and the settings each may try.

Every method tries TRIES settings, each once on CALIBRATION; the highest sum of exact pass@1 and pass@1024 there is
what runs on PAIRS. A method with one setting is a fixed point of comparison and has no choice.

Sources: clip-cov and kl-cov arXiv 2505.22617, pass@k advantage 2508.10751, negative-sample reinforcement 2506.01347,
SimKO 2510.14807, DPH-RL 2509.07430, RAPO 2510.03865.
"""

from ladder_losses import Settings

TRIES = 4
CALIBRATION = (0, 0)
# Bases that no setting was ever chosen on, each with a world of its own: the pairs are independent.
PAIRS = tuple((base, 1) for base in range(2, 14))
# All methods run on the first COMMON of them, those of ON_ALL on all.
COMMON = 6
PROBLEMS = 240
LEASHES = (1e-2, 3e-2, 1e-1, 3e-1)


def answers(m: int, **more: float | str) -> list[Settings]:
    """Return the tries of RAPO with reference answers, m a prompt."""
    alone = [Settings(m=m, answers=a, **more) for a in (0.3, 1.0, 3.0)]
    return [*alone, Settings(m=m, answers=1.0, kl="low_var_kl", kl_coef=0.1, **more)]


# Method: its tries.
METHODS: dict[str, list[Settings]] = {
    "GRPO, low_var_kl 1e-2": [Settings(kl="low_var_kl", kl_coef=1e-2)],
    "GRPO, low_var_kl 3e-1": [Settings(kl="low_var_kl", kl_coef=0.3)],
    "answers m = 32, 1": [Settings(m=32, answers=1.0)],
    "bounded 0.3, phi_min 0.8": [Settings(alpha=0.3, phi_min=0.8)],
    "bounded 0.3, phi_min 1": [Settings(alpha=0.3)],
    "GRPO, low_var_kl": [Settings(kl="low_var_kl", kl_coef=c) for c in LEASHES],
    "RAPO, reference answers m = 32": answers(32),
    "RAPO (bounded)": [Settings(alpha=a, phi_min=phi) for a, phi in ((0.1, 0.8), (0.3, 0.8), (0.3, 0.6), (1.0, 0.8))],
    "RAPO, reference answers m = 8": answers(8),
    "GRPO, low_var_kl, n = 40": [Settings(n=40, kl="low_var_kl", kl_coef=c) for c in LEASHES],
    "answers m = 32, 1, low_var_kl 1e-1": [Settings(m=32, answers=1.0, kl="low_var_kl", kl_coef=0.1)],
    "rejection-sampling SFT, m = 32": [
        Settings(surrogate="none", m=32, answers=1.0, weights="sample", lr=lr) for lr in (1e-4, 2e-4, 5e-4, 1e-3)
    ],
    "pass@k advantage": [
        Settings(advantage="grpo_passk"),
        *[Settings(advantage="passk", passk=k) for k in (2, 3, 4)],
    ],
    "DPH-RL (forward KL), m = 8": [
        Settings(m=8, answers=a, omega_wrong=1.0, rehearse_from=r) for r in (0.375, 0.625) for a in (0.1, 1.0)
    ],
    "GRPO, no KL": [Settings(entropy=b) for b in (0.0, 1e-3, 3e-3, 1e-2)],
    "GRPO, reverse KL (k2)": [Settings(kl="k2", kl_coef=c) for c in LEASHES],
    "GRPO, reverse KL (ratio x k3)": [Settings(kl="ratio_k3", kl_coef=c) for c in LEASHES],
    "SimKO": [Settings(surrogate="simko", top_share=s) for s in (0.01, 0.03, 0.1, 0.3)],
    "negative-sample reinforcement": [Settings(advantage="negative", positive=p) for p in (0.0, 0.03, 0.1, 0.3)],
    "clip-cov": [Settings(surrogate="clip_cov", cov_ratio=r) for r in (2e-4, 2e-3, 2e-2, 1e-1)],
    "kl-cov": [Settings(surrogate="kl_cov", cov_ratio=r, cov_kl=c) for r in (2e-3, 2e-2) for c in (0.1, 1.0)],
    "answers m = 8, mixture estimator": answers(8, weights="mixture"),
    "answers m = 32, wrong ones too": [
        Settings(m=32, answers=a, omega_wrong=w) for a, w in ((1.0, 0.1), (1.0, 0.3), (0.3, 0.3), (0.3, 1.0))
    ],
    "bounded 0.3, phi_min 0.6": [Settings(alpha=0.3, phi_min=0.6)],
    "forward KL, phi = 1": [Settings(alpha=a) for a in (0.1, 0.2, 0.3, 1.0)],
    "RAPO (paper)": [
        Settings(estimator="paper", alpha=a, phi_min=p) for a, p in ((0.03, 0.8), (0.1, 0.8), (0.3, 0.8), (0.1, 0.6))
    ],
    "GRPO, reverse KL (k1 in the reward)": [Settings(kl="k1_reward", kl_coef=c) for c in LEASHES],
    "GRPO, low_var_kl, n = 16": [Settings(n=16, kl="low_var_kl", kl_coef=c) for c in LEASHES],
    "answers m = 32, weighted by sample": answers(32, weights="sample"),
    "RAPO, reference answers m = 128": answers(128),
    # Twice and five times a cell's cost: the coefficient that n = 8 chose, no tries of their own.
    "GRPO, low_var_kl 3e-1, n = 16": [Settings(n=16, kl="low_var_kl", kl_coef=0.3)],
    "GRPO, low_var_kl 3e-1, n = 40": [Settings(n=40, kl="low_var_kl", kl_coef=0.3)],
    # Added when all four tries above had collapsed at the learning rate of the others: four more, so eight in all.
    "negative-sample reinforcement, small steps": [
        Settings(lr=lr, advantage="negative", positive=p) for lr in (2e-5, 1e-4) for p in (0.0, 0.1)
    ],
}
# These run on all pairs, the others on the first COMMON.
ON_ALL = tuple(METHODS)[:8]
KS = (1, 16, 256, 1024)
MEASURES = (*(f"p@{k}" for k in KS), "Hard@1024")
GRPO = next(iter(METHODS))
# What each question of docs/ladder.md is answered by.
CONTRASTS = (
    ("answers m = 32, 1", "base"),
    ("answers m = 32, 1", "GRPO, low_var_kl 1e-2"),
    ("answers m = 32, 1", "GRPO, low_var_kl 3e-1"),
    ("answers m = 32, 1", "bounded 0.3, phi_min 0.8"),
    ("bounded 0.3, phi_min 0.8", "GRPO, low_var_kl 3e-1"),
    ("bounded 0.3, phi_min 0.8", "bounded 0.3, phi_min 1"),
    ("bounded 0.3, phi_min 0.6", "bounded 0.3, phi_min 1"),
    ("RAPO (bounded)", "RAPO (paper)"),
    ("bounded 0.3, phi_min 0.8", "RAPO (paper)"),
    ("GRPO, low_var_kl 3e-1, n = 16", "GRPO, low_var_kl 3e-1"),
    ("RAPO, reference answers m = 32", "base"),
    ("RAPO, reference answers m = 32", "GRPO, low_var_kl"),
    ("RAPO, reference answers m = 32", "RAPO (bounded)"),
    ("RAPO, reference answers m = 32", "RAPO, reference answers m = 8"),
    ("RAPO, reference answers m = 8", "GRPO, low_var_kl 3e-1, n = 16"),
    ("RAPO, reference answers m = 128", "RAPO, reference answers m = 32"),
    ("RAPO, reference answers m = 128", "base"),
    ("RAPO, reference answers m = 128", "GRPO, low_var_kl 1e-2"),
    ("RAPO, reference answers m = 128", "GRPO, low_var_kl"),
    ("RAPO, reference answers m = 128", "GRPO, low_var_kl 3e-1, n = 16"),
    ("RAPO, reference answers m = 128", "GRPO, reverse KL (k1 in the reward)"),
    ("RAPO, reference answers m = 32", "rejection-sampling SFT, m = 32"),
    ("answers m = 32, 1, low_var_kl 1e-1", "answers m = 32, 1"),
    ("answers m = 32, wrong ones too", "RAPO, reference answers m = 32"),
    ("answers m = 32, weighted by sample", "RAPO, reference answers m = 32"),
    ("answers m = 8, mixture estimator", "RAPO, reference answers m = 8"),
)
