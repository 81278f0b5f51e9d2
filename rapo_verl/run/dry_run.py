"""``rapo train --dry-run``: what the start of a run would load, loaded, on any machine; no Ray, no weights."""

from pathlib import Path

from omegaconf import DictConfig

from rapo_verl import Refused
from rapo_verl.plan.report import show_plan
from rapo_verl.run.checkpoints import whole_ones
from rapo_verl.run.inputs import prompt_tokens, tokenizer_of, too_few_epochs
from rapo_verl.run.preflight import cpus_needed


def show_dry_run(config: DictConfig) -> None:
    """Load tokenizer and data as veRL does and print what a run would do, with the plan as advice.

    Refused: the data that veRL makes of the files cannot be trained on.
    """
    from verl.trainer.ppo.utils import create_rl_dataset

    tokenizer = tokenizer_of(config.actor_rollout_ref.model)
    limit, batch, problems = config.data.max_prompt_length, config.data.train_batch_size, []
    for key in ("train_files", "val_files"):
        train = key == "train_files"
        most = config.data.train_max_samples if train else config.data.val_max_samples
        data = create_rl_dataset(config.data[key], config.data, tokenizer, None, is_train=train, max_samples=most)
        if config.data.custom_cls.path:
            print(f"data.{key}: {len(data)} rows, read by data.custom_cls")
            continue
        longest = max((prompt_tokens(row, config, tokenizer) for row in data.dataframe), default=0)
        print(f"data.{key}: {len(data)} rows, longest prompt {longest} tokens of {limit}")
        if longest > limit and config.data.truncation == "error":
            problems.append(
                f"data.{key}: the longest prompt has {longest} tokens, data.max_prompt_length is {limit}, and "
                "data.truncation=error ends the run there; raise the limit, or data.filter_overlong_prompts=true"
            )
        if len(data) < (batch if train else 1):
            problems.append(f"data.{key}: {len(data)} rows are left; {batch if train else 1} are needed")
        elif train:
            problems += too_few_epochs(config, len(data))
    if problems:
        raise Refused(problems)
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    done = [0, *(checkpoint.step for checkpoint in whole_ones(Path(trainer.default_local_dir)))]
    print(f"a step: {batch} prompts x {rollout.n} responses")
    last = trainer.total_training_steps or f"the last of {trainer.total_epochs} epoch(s)"
    print(f"steps: {done[-1]} to {last}, saved every {trainer.save_freq}, in {config.run_dir}")
    print(f"Ray must count {cpus_needed(config)} CPUs on a node for veRL's actors")
    if trainer.device != "cpu":
        try:
            show_plan(config)
        except Refused as error:
            print(f"no plan: {error}")
