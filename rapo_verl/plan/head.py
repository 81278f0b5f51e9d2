"""Which head makes the log-probs of a run's passes (``rapo.head``), and what stands in our head's way."""

from omegaconf import DictConfig, OmegaConf

from rapo_verl.method.config import RapoConfig, rapo_config_from

ENGINES = ("fsdp", "fsdp2", "megatron")


def fast_head(nodes: DictConfig, rapo: RapoConfig) -> bool:
    """Whether our head makes the log-probs of every pass of a run (``actor_rollout_ref``, ``rapo.head``)."""
    return rapo.head == "fast" or (rapo.head == "auto" and rapo.on and not only_verls(nodes))


def only_verls(nodes: DictConfig) -> list[str]:
    """Return the settings that our head cannot follow.

    It has no need of ``entropy_from_logits_with_chunking``, ``entropy_checkpointing`` and ``use_torch_compile``, which
    make veRL's entropy smaller or faster: beside it they do nothing.
    """
    found = {
        "model.use_fused_kernels=true, which makes no logits": nodes.model.get("use_fused_kernels"),
        "actor.calculate_sum_pi_squared=true": nodes.actor.get("calculate_sum_pi_squared"),
    }
    for role in ("actor", "ref"):
        found[f"{role}.strategy={nodes[role].strategy}"] = nodes[role].strategy not in ENGINES
    return [f"actor_rollout_ref.{setting}" for setting, is_set in found.items() if is_set]


def head_of(config: DictConfig) -> str:
    """Return "fast" (ours), "verl" (logits and veRL's functions) or "fused" (veRL's kernels, which make no logits)."""
    nodes = config.actor_rollout_ref
    if nodes.model.get("use_fused_kernels"):
        return "fused"
    try:
        return "fast" if fast_head(nodes, rapo_config_from(OmegaConf.to_container(config.rapo))) else "verl"
    except ValueError:  # wrong settings, of which `run.preflight` tells; veRL's is the larger head
        return "verl"
