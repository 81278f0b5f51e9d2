"""What a config may not ask of the head: of veRL's fused kernels, and of ours in their place."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from rapo_verl.method.config import FULL_VOCABULARY, RapoConfig

# What Hugging Face's configs call a change of the logits after the head's product (Gemma 2's, Cohere's, Granite's).
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def uses_lora(model: DictConfig) -> bool:
    """Whether veRL trains adapters (``actor_rollout_ref.model``)."""
    return bool(model.lora_rank > 0 or model.lora_adapter_path or model.lora.rank > 0)


def logit_changes(model: Mapping[str, Any]) -> list[str]:
    """Return the names of what changes a model's logits after its head's product; a factor of 1 is no change."""
    return [name for name in LOGIT_CHANGES if model.get(name) not in (None, 0, 1)]


def fast_head(nodes: DictConfig, rapo: RapoConfig) -> bool:
    """Whether our head makes the log-probs of every pass of a run (``actor_rollout_ref``, ``rapo.head``)."""
    return rapo.head == "fast" or (rapo.head == "auto" and rapo.enabled and not _only_verl_s(nodes))


def _only_verl_s(nodes: DictConfig) -> list[str]:
    """Return the settings that our head cannot follow.

    It has no need of ``entropy_from_logits_with_chunking``, ``entropy_checkpointing`` and ``use_torch_compile``, which
    make veRL's entropy smaller or faster: beside it they do nothing.
    """
    found = {
        "model.use_fused_kernels=true, which makes no logits": nodes.model.get("use_fused_kernels"),
        "actor.calculate_sum_pi_squared=true": nodes.actor.get("calculate_sum_pi_squared"),
    }
    for role in ("actor", "ref"):
        strategy = nodes[role].strategy
        found[f"{role}.strategy={strategy}"] = strategy not in ("fsdp", "fsdp2", "megatron")
    return [f"actor_rollout_ref.{setting}" for setting, is_set in found.items() if is_set]


def problems_of_head(config: DictConfig, rapo: RapoConfig) -> list[str]:
    """Return what the engines' heads cannot do of a resolved run config, one message each."""
    from rapo_verl.plan.model import config_of

    try:
        shape = config_of(config.actor_rollout_ref.model.path).to_dict()
    except ValueError:
        shape = {}  # no model: `rapo_verl.run.preflight` says so
    found = _check_fused(config, shape)
    if rapo.head == "fast":
        found += [f"rapo.head=fast cannot follow {setting}; unset it, or set rapo.head=verl"
                  for setting in _only_verl_s(config.actor_rollout_ref)]  # fmt: skip
    if rapo.exports_tokens:
        found += _check_tokens(config, rapo, shape)
    elif rapo.per_sample_temperature and config.actor_rollout_ref.model.get("use_fused_kernels"):
        found += _check_linear(config, shape)
    return found


def _check_fused(config: DictConfig, shape: dict) -> list[str]:
    nodes = config.actor_rollout_ref
    on_fsdp2 = "fsdp2" in (nodes.actor.strategy, nodes.ref.strategy)
    if not nodes.model.get("use_fused_kernels") or not on_fsdp2 or shape.get("tie_word_embeddings", True):
        return []
    # verl 0.9.1 models/transformers/dense_common.py:123 reads lm_head.weight, which utils/fsdp_utils.py:549 shards by
    # itself unless it is tied: outside its own forward it is a DTensor (verl pull request 7427).
    return [
        "actor_rollout_ref.model.use_fused_kernels=true fails in veRL 0.9.1 on fsdp2 for a model whose head is not tied"
        " to its embedding, as this one's; set it to false, or actor_rollout_ref.actor.strategy and ref.strategy to "
        "fsdp or megatron"
    ]


def _check_linear(config: DictConfig, shape: dict) -> list[str]:
    """Return what stands in the way of a reference pass without logits (rapo_verl/method/linear_head.py)."""
    model, strategy = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.strategy
    why = "rapo.reference.reading=token needs a temperature for each sample, which veRL's fused kernels do not take, "
    mend = "; set actor_rollout_ref.model.use_fused_kernels=false, or rapo.reference.phi_min=1"
    found = []
    if uses_lora(model):
        found.append(f"{why}and ours only in a reference of its own, which LoRA does not make{mend}")
    if strategy not in ("fsdp", "fsdp2", "megatron"):
        found.append(f"{why}and ours not on actor_rollout_ref.ref.strategy={strategy}{mend}")
    if names := logit_changes(shape):
        found.append(f"{why}and ours not with the model's {', '.join(names)}{mend}")
    return found


def _check_tokens(config: DictConfig, rapo: RapoConfig, shape: dict) -> list[str]:
    """Return what stands in the way of RAPO's own head (rapo_verl/training/engine.py)."""
    estimator, actor, model = rapo.forward_kl.estimator, config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    why = f"rapo.forward_kl.estimator={estimator}, rapo.reference.reading={rapo.reference.reading}"
    found = []
    for key, strategy in (("actor", actor.strategy), ("ref", config.actor_rollout_ref.ref.strategy)):
        if strategy not in ("fsdp", "fsdp2", "megatron"):
            found.append(f"actor_rollout_ref.{key}.strategy is {strategy}; with {why} allowed: fsdp, fsdp2, megatron")
    if model.get("use_fused_kernels"):
        found.append(f"{why} needs the logits, which veRL's fused kernels never make; set "
                     "actor_rollout_ref.model.use_fused_kernels=false")  # fmt: skip
    if actor.get("calculate_sum_pi_squared"):
        found.append(f"actor_rollout_ref.actor.calculate_sum_pi_squared is not computed with {why}; set it to false")
    vocabulary = shape.get("vocab_size")
    if vocabulary and estimator == "full" and vocabulary > FULL_VOCABULARY:
        found.append(f"rapo.forward_kl.estimator=full on a vocabulary of {vocabulary}; allowed: up to "
                     f"{FULL_VOCABULARY}, since each response token ships its whole distribution. "
                     "Use estimator=topk")  # fmt: skip
    elif vocabulary and estimator != "full" and rapo.reference.top_k > vocabulary:
        found.append(f"rapo.reference.top_k is {rapo.reference.top_k}, above the model's vocabulary of {vocabulary}")
    return found
