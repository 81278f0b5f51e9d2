"""Tokens, FLOPs, expected seconds and checkpoint bytes of a step; nobody has measured the seconds."""

from dataclasses import dataclass
from math import nan

from rapo_verl.plan.card import Gpu
from rapo_verl.plan.job import Job
from rapo_verl.plan.memory import OPTIMIZER_BYTES, kv_bytes, trained_parameters
from rapo_verl.plan.model import ModelShape

# Seconds of a head beside the product that makes the logits, in units of one read and one write of the logits in bf16:
# (a pass without gradient, forward and backward). As benchmarks/head.py measured them on an H200 (docs/benchmarks.md),
# where veRL's had a KL of 64 tokens in them: what a processor's share of that is, is taken off Megatron's. FSDP's is
# without flash-attn and torch.compile; its steps took twice as long. Of the fused kernels the backward is assumed.
HEAD_TIME = {"fast": (1.0, 2.4), "megatron": (25.0, 45.0), "fsdp2": (300.0, 650.0), "fused": (25.0, 60.0)}
COPY_SHARE = 0.87  # of the data sheet's bandwidth, that copying reached there


@dataclass(frozen=True)
class Assumed:
    """What the seconds rest on."""

    # Mean tokens of prompt and response. Base models answer MATH in several hundred tokens and grow under RL.
    prompt: int = 200
    response: int = 1000
    # Share of the peak FLOP/s in training and log-prob passes, and of the memory's bandwidth in decoding.
    mfu: float = 0.35
    bandwidth_share: float = 0.6


@dataclass(frozen=True)
class Cost:
    """One step: tokens, FLOPs by pass, seconds by stage, those of the heads within them; checkpoints in bytes."""

    responses: int
    tokens: float
    forward_flops: float
    update_flops: float
    generation: float
    old_log_prob: float
    reference: float
    update: float
    heads: float
    validation: float  # seconds of one; nan: its problems are not here to be counted
    checkpoint: float
    disk: float

    @property
    def step(self) -> float:
        """Seconds of a step, without weight sync, rewards and saving."""
        return self.generation + self.old_log_prob + self.reference + self.update


def forward_flops(shape: ModelShape, tokens: float, length: float) -> float:
    """Return the FLOPs of a forward pass over ``tokens`` in sequences of mean ``length``.

    Two per parameter and token (the embedding is a look-up, the head is not), and 2 L h per token for causal attention
    over on average half of ``length``: Chowdhery et al. (arXiv 2204.02311, appendix B).
    """
    matrices = shape.layers * (shape.layer_parameters - shape.layer_replicated) + shape.embedding
    attention = 2 * shape.layers * shape.heads * shape.head_dim * length
    return tokens * (2 * matrices + attention)


def cost(shape: ModelShape, job: Job, gpu: Gpu, assumed: Assumed, *, kv_tokens: int) -> Cost:
    """Return what a step costs; ``kv_tokens`` is the capacity of one rollout replica's cache."""
    responses = job.prompts * job.responses
    length = assumed.prompt + min(assumed.response, job.response_tokens)
    tokens = float(responses * length)
    forward = forward_flops(shape, tokens, length)
    # Backward is twice the forward pass, once where nothing but adapters has a gradient; recomputation adds one.
    update = forward * ((3 if job.lora is None else 2) + (job.recompute_layers is not None))
    speed = job.gpus * gpu.tflops * 1e12 * assumed.mfu
    forward_head, update_head = head_seconds(shape, job, gpu, tokens)
    passes = 2 if job.reference else 1
    # Megatron: the HF tree holds the weights (megatron_checkpoint_manager.py:118 of veRL 0.9.1), model and hf_model
    # being one; FSDP writes its shards with two moments, and bf16 beside them.
    trained = trained_parameters(shape, job)
    if job.backend == "megatron":
        checkpoint = 2 * shape.parameters + OPTIMIZER_BYTES * trained
    else:
        checkpoint = (job.held_bytes + 2 * job.hf_model) * shape.parameters + 2 * job.held_bytes * trained
    return Cost(
        responses=responses,
        tokens=tokens,
        forward_flops=forward,
        update_flops=update,
        generation=_generation(shape, job, gpu, assumed, kv_tokens, responses),
        old_log_prob=forward / speed + forward_head,
        reference=forward / speed + forward_head if job.reference else 0.0,
        update=update / speed + update_head,
        heads=passes * forward_head + update_head,
        validation=nan if job.validation is None else _generation(shape, job, gpu, assumed, kv_tokens, job.validation),
        checkpoint=checkpoint,
        disk=checkpoint * job.checkpoints,
    )


def head_seconds(shape: ModelShape, job: Job, gpu: Gpu, tokens: float) -> tuple[float, float]:
    """Return the seconds of the head beside its product: (of a pass without gradient, of an update).

    The ranks of a pipeline's last stage share the logits, the others wait for them.
    """
    kind = job.head if job.head in HEAD_TIME else "megatron" if job.backend == "megatron" else "fsdp2"
    logits = 2 * tokens * shape.vocab / (job.gpus / job.pipeline)
    copy = 2 * logits / (gpu.bandwidth * 1e12 * COPY_SHARE)
    forward, update = HEAD_TIME[kind]
    return forward * copy, update * copy


def _generation(shape: ModelShape, job: Job, gpu: Gpu, assumed: Assumed, kv_tokens: int, responses: int) -> float:
    """Return seconds of decoding by the memory's bandwidth: weights once and every cached token once per step.

    At least as long as one response of the limit takes at batch size 1, since some always run to it.
    """
    bandwidth = gpu.bandwidth * 1e12 * assumed.bandwidth_share
    replicas = max(job.gpus // job.rollout_tensor, 1)
    mean = min(assumed.response, job.response_tokens)
    sequences = responses / replicas
    held = assumed.prompt + mean / 2
    batch = max(min(job.max_num_seqs, sequences, kv_tokens / (assumed.prompt + mean)), 1)
    weights = 2 * shape.parameters / job.rollout_tensor
    decode = (weights + batch * held * kv_bytes(shape, job)) / bandwidth
    return max(sequences * mean / batch * decode, job.response_tokens * weights / bandwidth)
