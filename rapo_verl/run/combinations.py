"""What settings may not be asked for together: each combination that is refused, with its reason and what mends it.

The one list of them. What a single key may hold stands in `rapo_verl.run.values`; how world, model and batches must
divide, in `rapo_verl.plan.job`, which names the nearest legal number.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from rapo_verl.method.config import FULL_VOCABULARY, RapoConfig
from rapo_verl.plan.head import ENGINES, fast_head, only_verls

# veRL's own trainers (``trainer.v1.trainer_mode``); RAPO's have "rapo_" before the name.
MODES = ("sync", "colocate_async", "separate_async")
# What Hugging Face's configs call a change of the logits after the head's product (Gemma 2's, Cohere's, Granite's).
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Estimators whose advantage is a response's reward against those of its group.
GROUPED = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "gdpo",
    "rloo",
    "rloo_vectorized",
    "opo",
    "reinforce_plus_plus_baseline",
)
Checks = Iterator[tuple[bool, str]]


def is_async(mode: str) -> bool:
    """Whether a trainer goes on sampling while it updates, so that samples may be of older policies."""
    return mode.endswith("_async")


def uses_lora(model: DictConfig) -> bool:
    """Whether veRL trains adapters (``actor_rollout_ref.model``)."""
    return bool(model.lora_rank > 0 or model.lora_adapter_path or model.lora.rank > 0)


def logit_changes(model: Mapping[str, Any]) -> list[str]:
    """Return the names of what changes a model's logits after its head's product; a factor of 1 is no change."""
    return [name for name in LOGIT_CHANGES if model.get(name) not in (None, 0, 1)]


def refused_combinations(config: DictConfig, rapo: RapoConfig | None, shape: Mapping[str, Any]) -> list[str]:
    """Return every combination that is refused of a config whose single values are right (`rapo_verl.run.values`).

    Without ``rapo``, whose settings are wrong then, only what does not depend on them is looked at. ``shape`` is the
    model's config as Hugging Face has it; empty: not to be had.
    """
    checks = [_batches(config), _trainer(config), _cpu(config, shape), _verls_faults(config, rapo, shape)]
    if rapo is not None and rapo.head == "fast":
        checks.append(
            (False, f"rapo.head=fast cannot follow {setting}; unset it, or set rapo.head=verl")
            for setting in only_verls(config.actor_rollout_ref)
        )
    if rapo is not None and rapo.enabled:
        checks.append(_method(config, rapo))
        if rapo.exports_tokens:
            checks.append(_own_head(config, rapo, shape))
        elif rapo.per_sample_temperature and config.actor_rollout_ref.model.get("use_fused_kernels"):
            checks.append(_reference_without_logits(config, shape))
    return [message for check in checks for legal, message in check if not legal]


def _batches(config: DictConfig) -> Checks:
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    yield (
        mini <= batch,
        f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini}) is above data.train_batch_size ({batch}), both in "
        "prompts: the actor would never be updated; lower it",
    )
    estimator = config.algorithm.adv_estimator
    yield (
        estimator not in GROUPED or config.actor_rollout_ref.rollout.n > 1,
        f"actor_rollout_ref.rollout.n is 1, but algorithm.adv_estimator={estimator} compares the responses to one "
        "prompt, and of a single one the advantage would be its reward or nothing; allowed: 2 or more",
    )


def _method(config: DictConfig, rapo: RapoConfig) -> Checks:
    actor, mode = config.actor_rollout_ref.actor, config.trainer.v1.trainer_mode
    yield (
        mode.startswith("rapo_"),
        f"rapo.forward_kl.coef is {rapo.forward_kl.coef} but trainer.v1.trainer_mode is {mode!r}, which knows nothing "
        f"of it; set trainer.v1.trainer_mode=rapo_{mode}, or rapo.forward_kl.coef=0 rapo.reference.phi_min=1",
    )
    yield (
        actor.use_kl_loss,
        "the forward KL needs the reference, which veRL loads only with actor_rollout_ref.actor.use_kl_loss=true; set "
        "it, or rapo.forward_kl.coef=0",
    )
    yield (
        actor.kl_loss_coef == 0,
        f"actor_rollout_ref.actor.kl_loss_coef is {actor.kl_loss_coef}, but veRL's KL term is left out while RAPO's is "
        "on; set it to 0, or rapo.forward_kl.coef=0",
    )
    yield (
        not config.algorithm.use_kl_in_reward,
        "algorithm.use_kl_in_reward would penalise the distance to the reward-reweighted reference; set it to false",
    )


def _trainer(config: DictConfig) -> Checks:
    mode, sampler = config.trainer.v1.trainer_mode, config.trainer.v1.sampler.custom_sampler
    yield (
        mode.removeprefix("rapo_") in MODES,
        f"trainer.v1.trainer_mode is {mode!r}; allowed: {', '.join(MODES)} (veRL's own), or rapo_ and one of them",
    )
    wanted = "StrictReplayBufferAsync" if is_async(mode) else "StrictReplayBuffer"
    yield (
        sampler.path != "pkg://rapo_verl.training.rollout" or sampler.name == wanted,
        f"trainer.v1.sampler.custom_sampler.name is {sampler.name}; trainer_mode={mode} takes its samples through "
        f"{wanted}: set it",
    )
    if mode.endswith("separate_async"):
        yield from _separate(config)


def _separate(config: DictConfig) -> Checks:
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    if config.trainer.device == "cpu":
        yield (
            False,
            "trainer_mode=separate_async sends the weights by NCCL, NIXL, Mooncake or Kimi's engine; none of them runs "
            "on trainer.device=cpu; take colocate_async",
        )
        return
    # As verl 0.9.1 trainer/ppo/v1/trainer_separate_async.py:52 asserts.
    steps = config.trainer.v1.separate_async.parameter_sync_step
    yield (
        config.data.train_batch_size == steps * actor.ppo_mini_batch_size,
        f"data.train_batch_size is {config.data.train_batch_size}; trainer_mode=separate_async wants actor."
        f"ppo_mini_batch_size ({actor.ppo_mini_batch_size}) times trainer.v1.separate_async.parameter_sync_step "
        f"({steps})",
    )
    yield (
        rollout.nnodes >= 1 and rollout.n_gpus_per_node >= 1,
        f"actor_rollout_ref.rollout.nnodes is {rollout.nnodes} and n_gpus_per_node {rollout.n_gpus_per_node}; "
        "trainer_mode=separate_async samples on GPUs of its own: give their numbers, beside the trainer's",
    )
    yield (
        rollout.checkpoint_engine.backend != "naive",
        "actor_rollout_ref.rollout.checkpoint_engine.backend is naive, which knows one process only; "
        "trainer_mode=separate_async needs nccl, or another that sends the weights to other GPUs",
    )


def _cpu(config: DictConfig, shape: Mapping[str, Any]) -> Checks:
    if config.trainer.device != "cpu":
        return
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    for key, got, allowed in (
        ("actor.strategy", config.actor_rollout_ref.actor.strategy, "fsdp2"),
        ("ref.strategy", config.actor_rollout_ref.ref.strategy, "fsdp2"),
        ("rollout.name", rollout.name, "vllm"),
        ("rollout.free_cache_engine", rollout.free_cache_engine, False),
        ("rollout.enable_chunked_prefill", rollout.enable_chunked_prefill, False),
        # With LoRA: the merged weights are sent, since the CPU's vLLM worker takes no adapters.
        ("model.lora.merge", model.lora.merge or not uses_lora(model), True),
    ):
        yield (
            got == allowed,
            f"actor_rollout_ref.{key} is {got}; on trainer.device=cpu only {allowed} works (start from experiment=cpu)",
        )
    # verl 0.9.1 workers/rollout/vllm_rollout/bucketed_weight_transfer.py:141: through shared memory, a tensor is sent
    # whole. The embedding is the largest.
    largest = math.ceil(shape.get("vocab_size", 0) * shape.get("hidden_size", 0) * 4 / 2**20)
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes
    yield (
        largest <= bucket,
        f"actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes is {bucket}, and the embedding "
        f"has {largest} MiB in fp32, which trainer.device=cpu sends in one piece; allowed: {largest} or more",
    )


def _verls_faults(config: DictConfig, rapo: RapoConfig | None, shape: Mapping[str, Any]) -> Checks:
    nodes = config.actor_rollout_ref
    actor, on_fsdp2 = nodes.actor, "fsdp2" in (nodes.actor.strategy, nodes.ref.strategy)
    # verl 0.9.1 utils/megatron/tensor_parallel.py:136 changes each chunk's logits in place in its backward pass, and
    # the chunks are views of one tensor: autograd raises at the second one (tests/test_recipes.py).
    yield (
        actor.strategy != "megatron"
        or not actor.entropy_from_logits_with_chunking
        or actor.entropy_coeff == 0
        or (rapo is not None and fast_head(nodes, rapo)),
        "actor_rollout_ref.actor.entropy_from_logits_with_chunking=true cannot be differentiated on Megatron, and "
        f"entropy_coeff is {actor.entropy_coeff}; set it to false, or rapo.head=fast",
    )
    # verl 0.9.1 utils/checkpoint/megatron_checkpoint_manager.py:1164 writes on after the save has returned: nobody can
    # tell when the checkpoint is whole.
    yield (
        actor.strategy != "megatron" or not actor.checkpoint.async_save,
        "actor_rollout_ref.actor.checkpoint.async_save is true: a checkpoint would be taken for whole while veRL still "
        "writes it; set it to false",
    )
    # verl 0.9.1 models/transformers/dense_common.py:123 reads lm_head.weight, which utils/fsdp_utils.py:549 shards by
    # itself unless it is tied: outside its own forward it is a DTensor (verl pull request 7427).
    yield (
        not nodes.model.get("use_fused_kernels") or not on_fsdp2 or shape.get("tie_word_embeddings", True),
        "actor_rollout_ref.model.use_fused_kernels=true fails in veRL 0.9.1 on fsdp2 for a model whose head is not tied"
        " to its embedding, as this one's; set it to false, or actor_rollout_ref.actor.strategy and ref.strategy to "
        "fsdp or megatron",
    )


def _reference_without_logits(config: DictConfig, shape: Mapping[str, Any]) -> Checks:
    """What stands in the way of a reference pass without logits (rapo_verl/method/linear_head.py)."""
    model, strategy = config.actor_rollout_ref.model, config.actor_rollout_ref.ref.strategy
    why = "rapo.reference.reading=token needs a temperature for each sample, which veRL's fused kernels do not take, "
    mend = "; set actor_rollout_ref.model.use_fused_kernels=false, or rapo.reference.phi_min=1"
    names = logit_changes(shape)
    yield (
        not uses_lora(model),
        f"{why}and ours only in a reference of its own, which LoRA does not make{mend}",
    )
    yield strategy in ENGINES, f"{why}and ours not on actor_rollout_ref.ref.strategy={strategy}{mend}"
    yield not names, f"{why}and ours not with the model's {', '.join(names)}{mend}"


def _own_head(config: DictConfig, rapo: RapoConfig, shape: Mapping[str, Any]) -> Checks:
    """What stands in the way of RAPO's own head (rapo_verl/training/engine.py)."""
    estimator, actor, model = rapo.forward_kl.estimator, config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    why = f"rapo.forward_kl.estimator={estimator}, rapo.reference.reading={rapo.reference.reading}"
    for key, strategy in (("actor", actor.strategy), ("ref", config.actor_rollout_ref.ref.strategy)):
        yield (
            strategy in ENGINES,
            f"actor_rollout_ref.{key}.strategy is {strategy}; with {why} allowed: {', '.join(ENGINES)}",
        )
    yield (
        not model.get("use_fused_kernels"),
        f"{why} needs the logits, which veRL's fused kernels never make; set "
        "actor_rollout_ref.model.use_fused_kernels=false",
    )
    yield (
        not actor.get("calculate_sum_pi_squared"),
        f"actor_rollout_ref.actor.calculate_sum_pi_squared is not computed with {why}; set it to false",
    )
    vocabulary = shape.get("vocab_size") or 0
    yield (
        estimator != "full" or vocabulary <= FULL_VOCABULARY,
        f"rapo.forward_kl.estimator=full on a vocabulary of {vocabulary}; allowed: up to {FULL_VOCABULARY}, since each "
        "response token ships its whole distribution. Use estimator=topk",
    )
    yield (
        not vocabulary or estimator == "full" or rapo.reference.top_k <= vocabulary,
        f"rapo.reference.top_k is {rapo.reference.top_k}, above the model's vocabulary of {vocabulary}",
    )
