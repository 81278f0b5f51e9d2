"""Everything that would go wrong in a run, found before Ray starts: all problems at once, each with how to mend it."""

import contextlib
import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from rapo_verl.method.config import RapoConfig, rapo_config_from
from rapo_verl.reward.function import reward_settings
from rapo_verl.run.head_config import fast_head, problems_of_head, uses_lora
from rapo_verl.run.modes import problems_of_mode
from rapo_verl.run.reference_answers import problems_of_answers

# Columns that veRL's data set and reward loop read.
COLUMNS = ("prompt", "data_source", "reward_model")
# Free disk below which a run is not started, in bytes.
MIN_FREE_DISK = 1 << 30


def problems_of(config: DictConfig) -> list[str]:
    """Return every problem of a resolved run config, one message each; veRL's own checks come last.

    Costs an ``import verl`` (seconds), but no Ray, no accelerator and no model weights.
    """
    found: list[str] = []
    beta = config.actor_rollout_ref.actor.entropy_coeff
    if not 0 <= beta < float("inf"):
        found.append(f"actor_rollout_ref.actor.entropy_coeff (beta) is {beta}; allowed: a finite number >= 0")
    rapo = None
    try:
        rapo = rapo_config_from(OmegaConf.to_container(config.rapo))
    except ValueError as error:
        found += str(error).splitlines()
    if rapo is not None:
        found += _check_method(config, rapo) + problems_of_head(config, rapo)
        found += problems_of_answers(config)
    model = _check_model(config)
    found += problems_of_mode(config) + _check_cpu(config) + _check_megatron(config, rapo) + model + _check_data(config)
    found += _check_reward(config) + _check_run_dir(config) + _check_survival(config) + _check_secrets(config)
    if not model:
        found += _check_layout(config)
    return found + _check_with_verl(config)


def _check_method(config: DictConfig, rapo: RapoConfig) -> list[str]:
    found: list[str] = []
    actor, mode = config.actor_rollout_ref.actor, config.trainer.v1.trainer_mode
    if not rapo.enabled:
        return found
    if not mode.startswith("rapo_"):
        found.append(
            f"rapo.forward_kl.coef is {rapo.forward_kl.coef} but trainer.v1.trainer_mode is {mode!r}, which "
            f"knows nothing of it; set trainer.v1.trainer_mode=rapo_{mode}, or rapo.forward_kl.coef=0 "
            "rapo.reference.phi_min=1"
        )
    if not actor.use_kl_loss:
        found.append(
            "the forward KL needs the reference, which veRL loads only with actor_rollout_ref.actor.use_kl_loss=true; "
            "set it, or rapo.forward_kl.coef=0"
        )
    if actor.kl_loss_coef != 0:
        found.append(
            f"actor_rollout_ref.actor.kl_loss_coef is {actor.kl_loss_coef}, but veRL's KL term is left out while RAPO's"
            " is on; set it to 0, or rapo.forward_kl.coef=0"
        )
    if config.algorithm.use_kl_in_reward:
        found.append(
            "algorithm.use_kl_in_reward would penalise the distance to the reward-reweighted reference; set it to false"
        )
    return found


def _check_cpu(config: DictConfig) -> list[str]:
    if config.trainer.device != "cpu":
        return []
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    wanted = {
        "actor_rollout_ref.actor.strategy": (config.actor_rollout_ref.actor.strategy, "fsdp2"),
        "actor_rollout_ref.ref.strategy": (config.actor_rollout_ref.ref.strategy, "fsdp2"),
        "actor_rollout_ref.rollout.name": (rollout.name, "vllm"),
        "actor_rollout_ref.rollout.free_cache_engine": (rollout.free_cache_engine, False),
        "actor_rollout_ref.rollout.enable_chunked_prefill": (rollout.enable_chunked_prefill, False),
        # With LoRA: the merged weights are sent, since the CPU's vLLM worker takes no adapters.
        "actor_rollout_ref.model.lora.merge": (model.lora.merge or not uses_lora(model), True),
    }
    return [
        f"{key} is {got}; on trainer.device=cpu only {allowed} works (start from experiment=cpu)"
        for key, (got, allowed) in wanted.items()
        if got != allowed
    ]


def _check_megatron(config: DictConfig, rapo: RapoConfig | None) -> list[str]:
    actor = config.actor_rollout_ref.actor
    if rapo is not None and fast_head(config.actor_rollout_ref, rapo):
        return []  # has no need of it
    if actor.strategy != "megatron" or not actor.entropy_from_logits_with_chunking or actor.entropy_coeff == 0:
        return []
    # verl 0.9.1 utils/megatron/tensor_parallel.py:136 changes each chunk's logits in place in its backward pass, and
    # the chunks are views of one tensor: autograd raises at the second one (tests/test_recipes.py).
    return [
        "actor_rollout_ref.actor.entropy_from_logits_with_chunking=true cannot be differentiated on Megatron, and "
        f"entropy_coeff is {actor.entropy_coeff}; set it to false, or rapo.head=fast"
    ]


def _check_model(config: DictConfig) -> list[str]:
    path = config.actor_rollout_ref.model.path
    if Path(path).exists():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (Path(path) / name).is_file()]
        if missing:
            return [
                f"actor_rollout_ref.model.path {path} is no Hugging Face checkpoint: it lacks {', '.join(missing)}; "
                "give a folder with model, config and tokenizer, or a hub id"
            ]
        return []
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return [
            f"actor_rollout_ref.model.path {path} does not exist; give a checkpoint folder or a hub id (owner/name). "
            "The toy's is made by `rapo toy make`"
        ]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(path, "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return [
            f"actor_rollout_ref.model.path {path} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); check the name, your token and the network, or download it first"
        ]
    return []


def _check_data(config: DictConfig) -> list[str]:
    found = []
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if mini > batch:
        found.append(
            f"actor_rollout_ref.actor.ppo_mini_batch_size ({mini}) is above data.train_batch_size ({batch}), both "
            "in prompts: the actor would never be updated; lower it"
        )
    for key in ("train_files", "val_files"):
        files = config.data[key]
        rows = 0
        for file in files if isinstance(files, list | ListConfig) else [files]:
            problem, count = _check_parquet(f"data.{key}", str(file))
            found += problem
            rows += count
        if key == "train_files" and 0 < rows < batch:
            found.append(
                f"data.train_files has {rows} rows, fewer than data.train_batch_size ({batch}): "
                "no batch would ever be full; lower the batch size or add data"
            )
    return found


def _check_parquet(key: str, file: str) -> tuple[list[str], int]:
    if not Path(file).is_file():
        return [f"{key}: {file} does not exist; made by `rapo data prepare`, the toy's by `rapo toy make`"], 0
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        return [f"{key}: {file} is not a parquet file ({error})"], 0
    missing = [name for name in COLUMNS if name not in parquet.schema_arrow.names]
    if missing:
        return [
            f"{key}: {file} lacks the column(s) {', '.join(missing)} that veRL reads; it has "
            f"{', '.join(parquet.schema_arrow.names)}"
        ], 0
    return [], parquet.metadata.num_rows


def _check_reward(config: DictConfig) -> list[str]:
    reward = config.reward.custom_reward_function
    found = []
    if reward.path == "pkg://rapo_verl.reward.function":
        try:
            reward_settings(**{str(key): value for key, value in (reward.get("reward_kwargs") or {}).items()})
        except ValueError as error:
            found += str(error).splitlines()
    share = (config.trainer.v1.sampler.get("sampler_kwargs") or {}).get("max_failed_share", 0.1)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        found.append(f"trainer.v1.sampler.sampler_kwargs.max_failed_share is {share}; allowed: [0, 1]")
    return found


def _check_run_dir(config: DictConfig) -> list[str]:
    folder = Path(config.run_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"run_dir {folder}: cannot write to {existing}; give a folder of yours"]
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_DISK:
        return [f"run_dir {folder}: {free >> 20} MiB free on its disk; at least {MIN_FREE_DISK >> 20} MiB are needed"]
    return []


def _check_survival(config: DictConfig) -> list[str]:
    return [
        f"survival.{key} is {value}; allowed: a number > 0, or null"
        for key, value in config.survival.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0)
    ]


def _check_layout(config: DictConfig) -> list[str]:
    """Return where world, model and batches do not divide; veRL looks only without dynamic batches."""
    from rapo_verl.plan.job import job_of, violations
    from rapo_verl.plan.model import shape_of

    try:
        shape = shape_of(config.actor_rollout_ref.model.path)
    except ValueError:
        return []  # no dense decoder: `rapo plan` does not know its layout
    return violations(job_of(config), shape)


def _check_secrets(config: DictConfig) -> list[str]:
    """Return the config keys that hold a secret of the environment: the config is saved and printed."""
    named = ("TOKEN", "API_KEY", "SECRET", "PASSWORD")
    values = {os.environ[name]: name for name in os.environ if any(part in name.upper() for part in named)}
    text = OmegaConf.to_yaml(config)
    return [
        f"the config holds the value of ${name}, and is saved and printed; leave it to the environment"
        for value, name in values.items()
        if len(value) >= 8 and value in text
    ]


def _check_with_verl(config: DictConfig) -> list[str]:
    """Return what veRL's own validation says, which it would say only after Ray has started."""
    if config.trainer.device == "cpu":
        os.environ.setdefault("VERL_PLATFORM", "cpu")
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    copy: Any = OmegaConf.create(OmegaConf.to_container(config))
    # veRL prints and warns of what it finds in order, too.
    with open_dict(copy), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            validate_config(copy, use_reference_policy=need_reference_policy(copy), use_critic=need_critic(copy))
        except (AssertionError, ValueError, TypeError) as error:
            return [f"veRL refuses the config: {error}"]
    return []
