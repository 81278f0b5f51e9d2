"""A run as the plan sees it: the numbers of a resolved config that decide on memory and time, and what is illegal."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from pyarrow import parquet

from rapo_verl.plan.head import head_of
from rapo_verl.plan.model import ModelShape


@dataclass(frozen=True)
class Lora:
    """Adapters: their rank, and the linear maps of a layer that have one (empty: all)."""

    rank: int
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """Layout, batch and rollout of a run. Sizes in GPUs, tokens, prompts or bytes as named."""

    backend: str  # "megatron", or "fsdp2"
    gpus: int
    gpus_per_node: int
    tensor: int
    pipeline: int
    context: int  # Megatron's context parallel; FSDP: Ulysses
    sequence_parallel: bool
    distributed_optimizer: bool
    recompute_layers: int | None  # layers recomputed as one block; None: every activation is kept
    weight_bytes: int  # of a parameter as the forward pass reads it
    held_bytes: int  # of a parameter as a rank keeps it
    lora: Lora | None  # None: every parameter is trained
    micro_tokens: int  # of a micro-batch on one rank, in the pass of those with and without gradient that has most
    least_tokens: int  # in the one that has fewest
    by_tokens: bool  # whether a micro-batch is cut by its tokens, and not by its sequences
    padded: bool  # whether its sequences are then padded to the longest of them
    head: str  # as `head_of` says
    entropy: bool  # whether the update differentiates the entropy
    reference: bool
    param_offload: bool
    optimizer_offload: bool
    reference_offload: bool
    prompts: int  # per step
    responses: int  # per prompt
    mini_batch: int  # prompts
    prompt_tokens: int  # limits
    response_tokens: int
    rollout_tensor: int
    utilization: float
    max_num_seqs: int
    max_model_len: int
    steps: int
    checkpoints: int  # on disk at once, at most
    hf_model: bool
    validations: int  # in the whole run
    validation: int | None  # responses of one; None: its problems are not here to be counted

    @property
    def data(self) -> int:
        """Data-parallel ranks (at least 1, so that an illegal layout can still be described)."""
        return max(self.gpus // (self.tensor * self.pipeline * self.context), 1)

    @property
    def sequence(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.prompt_tokens + self.response_tokens


def job_of(config: DictConfig, *, gpus: int | None = None) -> Job:
    """Return the job of a resolved run config, on ``gpus`` GPUs instead of its own number if given."""
    group, trainer = config.actor_rollout_ref, config.trainer
    actor, rollout = group.actor, group.rollout
    megatron = actor.strategy == "megatron"
    engine = actor.megatron if megatron else actor.fsdp_config
    reference_engine = group.ref.megatron if megatron else group.ref.fsdp_config
    mixed = OmegaConf.select(engine, "mixed_precision.param_dtype")
    total = gpus or trainer.nnodes * trainer.n_gpus_per_node
    return Job(
        backend=actor.strategy,
        gpus=total,
        gpus_per_node=trainer.n_gpus_per_node,
        tensor=engine.tensor_model_parallel_size if megatron else 1,
        pipeline=engine.pipeline_model_parallel_size if megatron else 1,
        context=engine.context_parallel_size if megatron else actor.ulysses_sequence_parallel_size,
        sequence_parallel=bool(megatron and engine.sequence_parallel),
        distributed_optimizer=not megatron or engine.use_distributed_optimizer,
        recompute_layers=_recompute(config, engine, megatron),
        weight_bytes=4 if mixed == "fp32" else 2,
        held_bytes=2 if megatron or engine.model_dtype in ("bf16", "bfloat16") else 4,
        lora=_lora(group.model, megatron),
        micro_tokens=max(_micro_tokens(config)),
        least_tokens=min(_micro_tokens(config)),
        by_tokens=actor.use_dynamic_bsz,
        padded=not group.model.use_remove_padding,
        head=head_of(config),
        entropy=actor.entropy_coeff != 0 or actor.calculate_entropy,
        reference=actor.use_kl_loss,
        param_offload=engine.param_offload,
        optimizer_offload=engine.optimizer_offload,
        # FSDP: transformer_impl.py:459 of veRL 0.9.1 keeps every forward-only model in host memory.
        reference_offload=reference_engine.param_offload if megatron else True,
        prompts=config.data.train_batch_size,
        responses=rollout.n,
        mini_batch=actor.ppo_mini_batch_size,
        prompt_tokens=config.data.max_prompt_length,
        response_tokens=config.data.max_response_length,
        rollout_tensor=rollout.tensor_model_parallel_size,
        utilization=rollout.gpu_memory_utilization,
        max_num_seqs=rollout.max_num_seqs,
        max_model_len=rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length,
        steps=trainer.total_training_steps or 0,
        checkpoints=_checkpoints(trainer),
        hf_model="hf_model" in actor.checkpoint.save_contents,
        validations=_validations(trainer),
        validation=_validation(config),
    )


def _checkpoints(trainer: DictConfig) -> int:
    steps, every, keep = trainer.total_training_steps, trainer.save_freq, trainer.max_actor_ckpt_to_keep
    saved = [-(-steps // every)] if steps and every > 0 else []
    # Without a number all are kept; else the new one is written before the oldest goes.
    return min(saved + ([keep + 1] if keep else []), default=1)


def _validations(trainer: DictConfig) -> int:
    steps, every = trainer.total_training_steps or 0, trainer.test_freq
    # Also after the last step, wherever it falls.
    return bool(trainer.val_before_train) + (-(-steps // every) if every > 0 else 0)


def files_of(config: DictConfig, key: str) -> list[Path]:
    """Return the files of ``data.train_files`` or ``val_files``, of which veRL takes one or a list."""
    files = config.data[key]
    return [Path(str(file)).expanduser() for file in (files if isinstance(files, list | ListConfig) else [files])]


def _validation(config: DictConfig) -> int | None:
    paths = files_of(config, "val_files") if config.data.val_files else []
    if not all(path.suffix == ".parquet" and path.is_file() for path in paths):
        return None
    return config.actor_rollout_ref.rollout.val_kwargs.n * sum(parquet.read_metadata(path).num_rows for path in paths)


def _lora(model: DictConfig, megatron: bool) -> Lora | None:
    # Megatron's adapters have a node of their own, and its fused maps their own names.
    adapter = Path(model.lora_adapter_path or "") / "adapter_config.json"
    if not megatron and model.lora_adapter_path and adapter.is_file():
        stated = json.loads(adapter.read_text())
        rank, targets = stated["r"], stated["target_modules"]
    else:
        rank = model.lora.rank if megatron else model.lora_rank
        targets = model.lora.target_modules if megatron else model.target_modules
    everywhere = isinstance(targets, str) or megatron
    return Lora(rank, () if everywhere else tuple(targets)) if rank else None


def _recompute(config: DictConfig, engine: Any, megatron: bool) -> int | None:
    if not megatron:
        return 1 if config.actor_rollout_ref.model.enable_gradient_checkpointing else None
    transformer = engine.override_transformer_config
    return (transformer.recompute_num_layers or 1) if transformer.recompute_granularity == "full" else None


def _micro_tokens(config: DictConfig) -> list[int]:
    """Return the tokens of a micro-batch in the update, and in the log-prob passes of actor and reference."""
    group = config.actor_rollout_ref
    nodes = ((group.actor, "ppo"), (group.rollout, "log_prob"), (group.ref, "log_prob"))
    if group.actor.use_dynamic_bsz:
        return [node[f"{name}_max_token_len_per_gpu"] for node, name in nodes]
    sequence = config.data.max_prompt_length + config.data.max_response_length
    return [(node[f"{name}_micro_batch_size_per_gpu"] or 1) * sequence for node, name in nodes]


def violations(job: Job, shape: ModelShape) -> list[str]:
    """Return every way in which the layout cannot run, each with the nearest legal value.

    Sources: megatron-core 0.16 transformer_config.py (heads, KV heads, layers), veRL 0.9.1 engine_workers.py:268
    (mini-batch by data parallel) and :666 (GPUs by rollout TP), seqlen_balancing.py:384 (a micro-batch holds a
    sequence), workers/rollout/vllm_rollout/vllm_async_server.py:1107 (positions, without any stretching of them).
    """
    tokens = min(job.micro_tokens, job.least_tokens) * job.context
    longest = max(job.max_model_len, job.sequence)
    checks = [
        (
            tokens >= job.sequence,
            f"a micro-batch holds {tokens} tokens, fewer than one prompt and response ({job.sequence}); "
            f"nearest legal: *_max_token_len_per_gpu={-(-job.sequence // job.context)}",
        ),
        (
            job.max_model_len >= job.sequence,
            f"rollout.max_model_len {job.max_model_len} is below prompt and response; nearest legal: {job.sequence}",
        ),
        (
            0 < job.utilization < 1,
            f"rollout.gpu_memory_utilization is {job.utilization}; allowed: between 0 and 1",
        ),
        (
            shape.positions is None or longest <= shape.positions,
            f"prompt and response, or rollout.max_model_len, take {longest} tokens; the model has {shape.positions} "
            "positions: lower data.max_response_length, data.max_prompt_length or rollout.max_model_len",
        ),
    ]
    return _indivisible(job, shape) + [message for legal, message in checks if not legal]


def _indivisible(job: Job, shape: ModelShape) -> list[str]:
    size, mini = job.tensor * job.pipeline * job.context, job.mini_batch * job.responses

    def splits_layer(n: int) -> bool:
        kv = shape.kv_heads % n == 0 or n % shape.kv_heads == 0
        return kv and shape.heads % n == 0 and shape.ffn % n == 0 and shape.vocab % n == 0

    # What must hold of a number, the number, the largest that is tried as the nearest legal one, and what is wrong.
    checks: list[tuple[Callable[[int], bool], int, int, str]] = [
        (lambda n: n % size == 0, job.gpus, job.gpus + size,
         f"{job.gpus} GPUs do not divide by TP x PP x CP = {size}"),
        (splits_layer, job.tensor, shape.heads,
         f"tensor_model_parallel_size {job.tensor} does not divide heads ({shape.heads}), KV heads ({shape.kv_heads}; "
         f"or is no multiple of them), feed-forward ({shape.ffn}) and vocabulary ({shape.vocab})"),
        (lambda n: shape.layers % n == 0, job.pipeline, shape.layers,
         f"pipeline_model_parallel_size {job.pipeline} does not divide {shape.layers} layers"),
        (lambda n: job.backend == "megatron" or shape.heads % n == 0, job.context, shape.heads,
         f"ulysses_sequence_parallel_size {job.context} does not divide {shape.heads} heads"),
        (lambda n: job.gpus % n == 0 and shape.heads % n == 0, job.rollout_tensor, job.gpus,
         f"rollout.tensor_model_parallel_size {job.rollout_tensor} does not divide {job.gpus} GPUs and {shape.heads} "
         "heads"),
        (lambda n: n * job.responses % job.data == 0, job.mini_batch, job.mini_batch + job.data,
         f"ppo_mini_batch_size {job.mini_batch} x n {job.responses} = {mini} does not divide by {job.data} data-"
         "parallel ranks"),
        (lambda n: job.prompts % n == 0, job.mini_batch, job.prompts,
         f"train_batch_size {job.prompts} does not divide by ppo_mini_batch_size {job.mini_batch}: the rest of each "
         "batch is left out"),
    ]  # fmt: skip
    return [f"{wrong}; {_nearest(value, legal, most)}" for legal, value, most, wrong in checks if not legal(value)]


def _nearest(value: int, legal: Callable[[int], bool], most: int) -> str:
    """Return the legal number of 1..most nearest to ``value`` as a hint; of two equally near ones the smaller."""
    outwards = (n for off in range(max(value, most)) for n in (value - off, value + off) if 1 <= n <= most)
    found = next(filter(legal, outwards), None)
    return "none is legal" if found is None else f"nearest legal: {found}"
