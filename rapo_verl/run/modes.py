"""The trainers that a run may have (``trainer.v1.trainer_mode``), and what each needs of the rest of the config."""

from omegaconf import DictConfig

# veRL's own; RAPO's have "rapo_" before the name.
MODES = ("sync", "colocate_async", "separate_async")


def is_async(mode: str) -> bool:
    """Whether a trainer goes on sampling while it updates, so that samples may be of older policies."""
    return mode.endswith("_async")


def problems_of_mode(config: DictConfig) -> list[str]:
    """Return what the trainer of this run lacks; veRL would say it after Ray and the models have started."""
    mode = config.trainer.v1.trainer_mode
    if mode.removeprefix("rapo_") not in MODES:
        return [
            f"trainer.v1.trainer_mode is {mode!r}; allowed: {', '.join(MODES)} (veRL's own), or rapo_ and one of them"
        ]
    found, sampler = [], config.trainer.v1.sampler.custom_sampler
    wanted = "StrictReplayBufferAsync" if is_async(mode) else "StrictReplayBuffer"
    if sampler.path == "pkg://rapo_verl.training.rollout" and sampler.name != wanted:
        found.append(
            f"trainer.v1.sampler.custom_sampler.name is {sampler.name}; trainer_mode={mode} takes its samples through "
            f"{wanted}: set it"
        )
    return found + (_problems_of_separate(config) if mode.endswith("separate_async") else [])


def _problems_of_separate(config: DictConfig) -> list[str]:
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    if config.trainer.device == "cpu":
        return [
            "trainer_mode=separate_async sends the weights by NCCL, NIXL, Mooncake or Kimi's engine; none of them runs "
            "on trainer.device=cpu; take colocate_async"
        ]
    # As verl 0.9.1 trainer/ppo/v1/trainer_separate_async.py:52 asserts.
    found = []
    steps = config.trainer.v1.separate_async.parameter_sync_step
    if config.data.train_batch_size != steps * actor.ppo_mini_batch_size:
        found.append(
            f"data.train_batch_size is {config.data.train_batch_size}; trainer_mode=separate_async wants actor."
            f"ppo_mini_batch_size ({actor.ppo_mini_batch_size}) times trainer.v1.separate_async.parameter_sync_step "
            f"({steps})"
        )
    if rollout.nnodes < 1 or rollout.n_gpus_per_node < 1:
        found.append(
            f"actor_rollout_ref.rollout.nnodes is {rollout.nnodes} and n_gpus_per_node {rollout.n_gpus_per_node}; "
            "trainer_mode=separate_async samples on GPUs of its own: give their numbers, beside the trainer's"
        )
    if rollout.checkpoint_engine.backend == "naive":
        found.append(
            "actor_rollout_ref.rollout.checkpoint_engine.backend is naive, which knows one process only; "
            "trainer_mode=separate_async needs nccl, or another that sends the weights to other GPUs"
        )
    return found
