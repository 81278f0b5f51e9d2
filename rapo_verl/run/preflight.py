"""Everything that would go wrong in a run, found before Ray starts: all problems at once, each with how to mend it."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import traceback
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from rapo_verl import Refused
from rapo_verl.method.config import RapoConfig, rapo_config_from
from rapo_verl.plan.job import job_of, violations
from rapo_verl.plan.model import config_of, shape_of
from rapo_verl.reward.function import reward_settings
from rapo_verl.run import inputs
from rapo_verl.run.checkpoints import resume_point
from rapo_verl.run.combinations import refused_combinations
from rapo_verl.run.compose import CONFIG_ERRORS, compose_config
from rapo_verl.run.doctor import PADDED_ATTENTION, has_gpu
from rapo_verl.run.folder import changes_of
from rapo_verl.run.reference_answers import problems_of_answers
from rapo_verl.run.values import RESUME_MODES, ignored_keys, wrong_names, wrong_values

# Free disk below which a run is not started, in bytes.
MIN_FREE_DISK = 1 << 30


def problems_of(config: DictConfig) -> list[str]:
    """Return every problem of a resolved run config, one message each.

    Costs an ``import verl`` (seconds), but no Ray, no accelerator and no model weights.
    """
    if config.trainer.device == "cpu":
        os.environ.setdefault("VERL_PLATFORM", "cpu")
    defaults = _parent()
    wrong = wrong_values(config, defaults)
    if not any(key.startswith("trainer.logger") for key in wrong):
        wrong |= wrong_names(config)
    # What is wrong by itself is looked at no further: with another value in its place, the rest can be told, too.
    mended = config.copy()
    for key in wrong:
        if "[" not in key:
            default = OmegaConf.select(defaults, key)
            OmegaConf.update(mended, key, 1 if default is None else default)
    path = config.actor_rollout_ref.model.path
    model, data = inputs.problems_of_model(config.actor_rollout_ref.model), inputs.problems_of_data(mended)
    rapo, ours = _settings_of_ours(config)
    together = data + refused_combinations(mended, rapo, _model_config(path)) + ([] if model else _layout(mended))
    if not model and not data:
        together += inputs.too_few_that_fit(mended)
    words = re.compile("|".join(rf"\b{re.escape(key.rpartition('.')[2])}\b" for key in wrong) or "(?!)")
    found = [*wrong.values(), *ignored_keys(config), *ours, *model, *inputs.problems_of_code(config)]
    found += [problem for problem in together if not words.search(problem)]
    found += problems_of_answers(config) if rapo is not None else []
    found += _run_dir(config) + _secrets(config)
    found += _going_on(config, whole=not model and not data)
    return found + ([] if wrong else _verls_own(config))


@lru_cache
def _parent() -> DictConfig:
    return compose_config([])


def _model_config(path: str) -> dict[str, Any]:
    try:
        return config_of(path).to_dict()
    except ValueError:
        return {}


def _settings_of_ours(config: DictConfig) -> tuple[RapoConfig | None, list[str]]:
    """Return RAPO's settings, None if they are wrong, and what their and the reward function's dataclasses refuse."""
    found: list[str] = []
    rapo = None
    try:
        rapo = rapo_config_from(OmegaConf.to_container(config.rapo))
    except ValueError as error:
        found += str(error).splitlines()
    reward = config.reward.custom_reward_function
    if reward.path == inputs.OUR_REWARD:
        try:
            reward_settings(**{str(key): value for key, value in (reward.get("reward_kwargs") or {}).items()})
        except ValueError as error:
            found += str(error).splitlines()
    return rapo, found


def _run_dir(config: DictConfig) -> list[str]:
    folder = Path(config.run_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"run_dir {folder}: cannot write to {existing}; give a folder of yours"]
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_DISK:
        return [f"run_dir {folder}: {free >> 20} MiB free on its disk; at least {MIN_FREE_DISK >> 20} MiB are needed"]
    return []


def _going_on(config: DictConfig, *, whole: bool) -> list[str]:
    """Return why the run may not go on from what its folder holds; compared only with model and data that are there."""
    path = config.trainer.resume_from_path
    if config.trainer.resume_mode == "resume_path" and not (path and "global_step_" in path and Path(path).is_dir()):
        return [f"trainer.resume_from_path is {path}; resume_mode=resume_path wants a folder .../global_step_N"]
    try:
        changes_of(config)
        if whole and config.trainer.resume_mode in RESUME_MODES:
            resume_point(config, mend=False)
    except Refused as error:
        return list(error.problems)
    return []


def _layout(config: DictConfig) -> list[str]:
    """Return where world, model and batches do not divide; veRL looks only without dynamic batches."""
    try:
        shape = shape_of(config.actor_rollout_ref.model.path)
    except ValueError:
        return []  # no dense decoder: `rapo plan` does not know its layout
    return violations(job_of(config), shape)


def _secrets(config: DictConfig) -> list[str]:
    """Return the config keys that hold a secret of the environment: the config is saved and printed."""
    named = ("TOKEN", "API_KEY", "SECRET", "PASSWORD")
    values = {os.environ[name]: name for name in os.environ if any(part in name.upper() for part in named)}
    text = OmegaConf.to_yaml(config)
    return [
        f"the config holds the value of ${name}, and is saved and printed; leave it to the environment"
        for value, name in values.items()
        if len(value) >= 8 and value in text
    ]


def _verls_own(config: DictConfig) -> list[str]:
    """Return what veRL's own validation says, which it would say only after Ray has started."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    copy: Any = OmegaConf.create(OmegaConf.to_container(config))
    found: list[str] = []
    asked = {
        "the config": lambda: validate_config(
            copy, use_reference_policy=need_reference_policy(copy), use_critic=need_critic(copy)
        ),
        "actor_rollout_ref.rollout": lambda: omega_conf_to_dataclass(copy.actor_rollout_ref.rollout),
        "algorithm": lambda: omega_conf_to_dataclass(copy.algorithm),
    }
    # veRL prints and warns of what it finds in order, too.
    with open_dict(copy), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for what, ask in asked.items():
            try:
                ask()
            except (AssertionError, ValueError, TypeError, NotImplementedError, *CONFIG_ERRORS) as error:
                cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
                # An assertion of veRL's without a message is told by its line.
                said = str(cause) or traceback.extract_tb(cause.__traceback__)[-1].line or ""
                found.append(f"veRL refuses {what}: {' '.join(said.split())[:500]}")
    return found


def cpus_needed(config: DictConfig) -> int:
    """Return the CPUs that Ray must count on the first node, or it waits for ever for an actor it cannot place.

    Each storage unit of TransferQueue, its controller and the task runner take one, and each rank of a worker group a
    bundle of three (verl 0.9.1 single_controller/ray/base.py:192). Seen on the toy: 6 are enough, with 5 it hangs.
    """
    units = config.transfer_queue.backend.SimpleStorage.num_data_storage_units or 1
    return units + 2 + 3 * config.trainer.n_gpus_per_node


def without_flash_attention(config: DictConfig) -> list[str]:
    """Return whether this machine trains on GPUs with FSDP and lacks the attention that veRL takes by default."""
    model = config.actor_rollout_ref.model
    # verl 0.9.1 workers/config/model.py:185: the default.
    attention = (model.override_config or {}).get("attn_implementation", "flash_attention_2")
    wanted = attention == "flash_attention_2" or model.use_remove_padding
    fsdp = str(config.actor_rollout_ref.actor.strategy).startswith("fsdp") and config.trainer.device != "cpu"
    if not (wanted and fsdp and has_gpu()) or importlib.util.find_spec("flash_attn") is not None:
        return []
    return [f"flash-attn is not installed here (no wheel exists for this torch); add {' '.join(PADDED_ATTENTION)}"]


def too_few_cpus(config: DictConfig) -> list[str]:
    """Return whether this machine has too few CPUs for a run on it alone; a cluster's Ray has counted its own."""
    if os.environ.get("RAY_ADDRESS"):
        return []
    there = config.ray_kwargs.ray_init.num_cpus or os.cpu_count() or 1
    needed = cpus_needed(config)
    if there >= needed:
        return []
    return [
        f"veRL's actors want {needed} CPUs of Ray, which counts {there} here, and would wait for ever; lower "
        "transfer_queue.backend.SimpleStorage.num_data_storage_units (down to 1), or set "
        f"ray_kwargs.ray_init.num_cpus={needed}, which names actors and not cores"
    ]
