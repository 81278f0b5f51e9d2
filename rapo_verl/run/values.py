"""What a single key of a run's config may hold: its type, its bounds, its names.

What keys may not hold together stands in `rapo_verl.run.combinations`.
"""

import contextlib
import importlib
import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
PositiveShare = Annotated[float, Field(gt=0, le=1, strict=True)]

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
# What single keys allow. veRL divides by these, counts with them or hands them to torch and vLLM; each would fail, or
# mean nothing, later.
_ALLOWED: list[tuple[Any, str]] = [
    (
        Count,
        """
        data.train_batch_size data.max_prompt_length data.max_response_length actor.ppo_mini_batch_size actor.ppo_epochs
        rollout.n rollout.val_kwargs.n rollout.tensor_model_parallel_size rollout.data_parallel_size
        rollout.max_num_seqs rollout.max_num_batched_tokens rollout.agent.num_workers actor_rollout_ref.nccl_timeout
        reward.num_workers trainer.nnodes trainer.n_gpus_per_node trainer.total_epochs
        trainer.v1.separate_async.parameter_sync_step actor.megatron.tensor_model_parallel_size
        actor.megatron.pipeline_model_parallel_size actor.megatron.context_parallel_size
        actor.ulysses_sequence_parallel_size""",
    ),
    (
        Count | None,
        """
        trainer.total_training_steps data.gen_batch_size data.val_batch_size rollout.max_model_len
        actor.ppo_micro_batch_size_per_gpu transfer_queue.backend.SimpleStorage.num_data_storage_units
        ray_kwargs.ray_init.num_cpus""",
    ),
    # -1 switches off, as does any number below 1; of rollout.seed each response's own is made.
    (Whole, "trainer.save_freq trainer.test_freq rollout.top_k rollout.seed"),
    (Whole | None, "trainer.max_actor_ckpt_to_keep data.seed"),
    (Natural, "data.dataloader_num_workers actor_rollout_ref.model.lora_rank"),
    (
        NotNegative,
        """
        actor.optim.lr actor.optim.weight_decay actor.entropy_coeff actor.kl_loss_coef actor.clip_ratio
        actor.clip_ratio_low actor.clip_ratio_high rollout.val_kwargs.temperature""",
    ),
    (Positive, "rollout.temperature"),
    (Positive | None, "survival.max_minutes survival.stall_minutes"),
    (PositiveShare, "rollout.top_p"),
    (Share, "algorithm.gamma algorithm.lam trainer.v1.sampler.sampler_kwargs.max_failed_share"),
]
# By key; actor and rollout stand in actor_rollout_ref.
BOUNDS: dict[str, Any] = {
    re.sub(r"^(?=actor\.|rollout\.)", "actor_rollout_ref.", key): allowed
    for allowed, keys in _ALLOWED
    for key in keys.split()
}
# veRL 0.9.1 trainer/ppo/v1/trainer_base.py:853 logs another one and goes on with a name that it has not got.
RESUME_MODES = ("auto", "disable", "resume_path")
# Where veRL has no registry: its code compares with these and takes anything else for a default, or fails late.
_PRECISIONS = ("bfloat16", "bf16", "float16", "fp16", "float32", "fp32")
NAMES = {
    "trainer.resume_mode": RESUME_MODES,
    "trainer.device": ("cuda", "npu", "cpu"),
    "data.truncation": ("error", "left", "right", "middle"),
    "algorithm.rollout_correction.rollout_is": ("token", "sequence", None),
    f"{_ROLLOUT}.mode": ("async",),
    f"{_ROLLOUT}.dtype": (*_PRECISIONS[::2], "auto", "half", "float"),
    f"{_ACTOR}.fsdp_config.model_dtype": _PRECISIONS,
    f"{_ACTOR}.fsdp_config.dtype": _PRECISIONS,
}
# What a key of veRL's config before 0.9 is called now; it still composes, and its trainer never reads it.
RENAMED = {
    "custom_reward_function": "reward.custom_reward_function",
    "sandbox_fusion": "reward.sandbox_fusion",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_loop_source": "reward.reward_manager.source",
    "reward_model.reward_loop_module_path": "reward.reward_manager.module.path",
    "reward_model.reward_loop_class_name": "reward.reward_manager.module.name",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model": "reward.reward_model",
}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in a plain config that is no mapping."""
    if not isinstance(node, dict):
        yield prefix[:-1], node
        return
    for name, child in node.items():
        yield from leaves(child, f"{prefix}{name}.")


def wrong_values(config: DictConfig, defaults: DictConfig) -> dict[str, str]:
    """Return what is wrong with single values of a resolved config, by key; what is a number by default stays one."""
    plain: Any = OmegaConf.to_container(config)
    known: Any = dict(leaves(OmegaConf.to_container(defaults)))
    found = {}
    for key, value in leaves(plain):
        allowed = BOUNDS.get(key) or _type_of(key, known.get(key))
        if allowed is not None:
            try:
                TypeAdapter(allowed).validate_python(value)
            except ValidationError as error:
                said = dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors())
                found[key] = f"{key} is {value!r}; allowed: {', or '.join(said).replace('None', 'null')}"
    return found


def _type_of(key: str, default: Any) -> Any:
    # `rollout_is_threshold` and its like may be "0.5_2.0"; RAPO's own settings are checked by their dataclass.
    if default is None or key.startswith(("algorithm.rollout_correction.", "rapo.", "actor_rollout_ref.rapo.")):
        return None
    if isinstance(default, bool):
        return Annotated[bool, Field(strict=True)] | None
    return Annotated[float, Field(strict=True)] | None if isinstance(default, int | float) else None


def wrong_names(config: DictConfig) -> dict[str, str]:
    """Return the names that veRL does not know, by key. Costs an ``import verl``; veRL's own registries are asked."""
    import torch
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER
    from verl.trainer.ppo import core_algos
    from verl.utils.tracking import Tracking
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    allowed: dict[str, Collection[Any]] = {
        **NAMES,
        "algorithm.adv_estimator": core_algos.ADV_ESTIMATOR_REGISTRY,
        f"{_ACTOR}.policy_loss.loss_mode": core_algos.POLICY_LOSS_REGISTRY,
        f"{_ROLLOUT}.name": dict.fromkeys(name for name, _ in _ROLLOUT_REGISTRY),
    }
    if config.reward.reward_manager.source == "register":
        allowed["reward.reward_manager.name"] = REWARD_MANAGER
    if not config.actor_rollout_ref.rollout.agent.agent_loop_config_path:
        allowed[f"{_ROLLOUT}.agent.default_agent_loop"] = _agent_loop_registry
    if implementation := actor.optim.get("optimizer_impl"):
        with contextlib.suppress(ImportError):  # of a package that is not here, nothing can be said
            module = vars(importlib.import_module(implementation))
            allowed[f"{_ACTOR}.optim.optimizer"] = [name for name, it in module.items() if isinstance(it, type)]
    names = {key: (OmegaConf.select(config, key), among) for key, among in allowed.items()}
    loggers = [*Tracking.supported_backend, "tracking"]
    names |= {f"trainer.logger[{i}]": (name, loggers) for i, name in enumerate(config.trainer.logger)}
    if "fsdp_config" not in actor:
        names = {key: value for key, value in names.items() if ".fsdp_config." not in key}
    found = {
        key: f"{key} is {got!r}; allowed: {', '.join('null' if name is None else name for name in among)}"
        for key, (got, among) in names.items()
        if got not in among
    }
    penalties = [(f"{_ACTOR}.kl_loss_type", actor.kl_loss_type)] * bool(actor.use_kl_loss)
    penalties += [("algorithm.kl_penalty", algorithm.kl_penalty)] * bool(algorithm.use_kl_in_reward)
    for key, name in penalties:
        try:
            core_algos.kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), name)
        except (NotImplementedError, AttributeError, TypeError):
            found[key] = f"{key} is {name!r}, which veRL does not know: k1, k2, k3, abs, low_var_kl, ..."
    return found


def ignored_keys(config: DictConfig) -> list[str]:
    """Return the settings that compose and are never read, each with what would be."""
    found = []
    for old in ("custom_reward_function", "reward_model", "sandbox_fusion"):
        for key, value in leaves(OmegaConf.to_container(config.get(old) or {}), f"{old}."):
            if value is None or value == {}:
                continue
            stem = max((name for name in RENAMED if f"{key}.".startswith(f"{name}.")), key=len)
            found.append(f"{key} is set, but veRL 0.9.1 does not read it; set {RENAMED[stem]}{key[len(stem) :]}")
    actor = config.actor_rollout_ref.actor
    if actor.kl_loss_coef and not actor.use_kl_loss:
        found.append(
            f"actor_rollout_ref.actor.kl_loss_coef is {actor.kl_loss_coef}, but veRL reads it only with "
            "use_kl_loss=true beside it; set that, or kl_loss_coef=0"
        )
    if not config.trainer.use_v1:
        found.append("trainer.use_v1 is false, but there is RAPO only in veRL's v1 trainers; leave it true")
    return found
