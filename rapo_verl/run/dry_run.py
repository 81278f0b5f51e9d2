"""``rapo train --dry-run``: what the start of a run would load, loaded, on any machine; no Ray, no weights."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import AutoTokenizer

from rapo_verl.plan.report import show_plan
from rapo_verl.run.checkpoints import read_checkpoints


def show_dry_run(config: DictConfig) -> bool:
    """Load tokenizer and data as veRL does, build the model on the meta device, print the plan.

    Args:
        config: resolved config that passed `rapo_verl.run.preflight`.

    Returns:
        Whether every prompt fits its limit and the plan fits its GPUs (on ``trainer.device=cpu`` there is no plan).
    """
    from verl.trainer.ppo.utils import create_rl_dataset

    tokenizer = AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path)
    fits, limit = True, config.data.max_prompt_length
    for key in ("train_files", "val_files"):
        data = create_rl_dataset(config.data[key], config.data, tokenizer, None, is_train=key == "train_files")
        longest = max((_prompt_tokens(row, tokenizer) for row in data.dataframe), default=0)
        fits = fits and longest <= limit
        print(f"data.{key}: {len(data)} rows, longest prompt {longest} tokens of {limit}")
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    whole = [found.step for found in read_checkpoints(Path(trainer.default_local_dir)) if found.complete]
    print(f"a step: {config.data.train_batch_size} prompts x {rollout.n} responses")
    last = trainer.total_training_steps or f"the last of {trainer.total_epochs} epoch(s)"
    print(f"steps: {max(whole, default=0)} to {last}, saved every {trainer.save_freq}, in {config.run_dir}")
    if config.trainer.device == "cpu":
        return fits
    return show_plan(config) and fits


def _prompt_tokens(row: dict[str, Any], tokenizer: Any) -> int:
    return len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
