"""What each rank holds on its GPU in each phase of a step, in bytes.

Sources: weights and optimizer states by counting; Megatron's fp32 gradient buffer from veRL 0.9.1
megatron/transformer_impl.py:434 (grad_reduce_in_fp32); activations of a layer by listing what its backward pass
needs, after Korthikanti et al. (arXiv 2205.05198, section 4) redone for SwiGLU, grouped queries, flash attention and
no dropout; logits from the functions named at HEAD, measured on a CPU in tests/test_plan.py. The rest is assumed and
named so.
"""

from dataclasses import dataclass

from rapo_verl.method.linear_head import CHUNKS
from rapo_verl.plan.job import Job
from rapo_verl.plan.model import ModelShape

GIB = 1 << 30
# Assumed, never measured: CUDA context, NCCL buffers and cuBLAS workspaces of a trainer process.
CONTEXT = 2 * GIB
# Assumed, never measured: what vLLM keeps while it sleeps at level 2 (context, CUDA graphs), and beside weights and
# KV cache while it is awake.
VLLM_ASLEEP = 2 * GIB
VLLM_WORKSPACE = 2 * GIB
# Assumed: share of the allocator's peak lost to fragmentation.
FRAGMENTATION = 0.05
# Adam in mixed precision: fp32 master weight and two moments.
OPTIMIZER_BYTES = 12
GRADIENT_BYTES = 4
# Peak of veRL's head in units of one fp32 [tokens, vocabulary / TP] tensor: (update with entropy, update without,
# forward only). Megatron: fp32 logits, a copy, the entropy's softmax and one more where torch.compile does not fuse its
# sum (verl/utils/megatron/tensor_parallel.py:93). FSDP: bf16 logits and their gradient, and the entropy recomputed in
# fp32 (verl/utils/torch_functional.py:248).
HEAD = {"megatron": (4.0, 2.0, 4.0), "fsdp2": (4.5, 1.0, 1.5)}
# The same of veRL's fused kernels, but of FUSED_TOKENS at a time (verl/utils/experimental/torch_functional.py:36).
FUSED, FUSED_TOKENS = (7.0, 5.0, 3.0), 512


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: what stays, the peak of each phase, and what lies in a node's host memory instead."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    gathered: float
    activations: float
    head: float
    update: float
    log_prob: float
    rollout: float
    kv_cache: float
    kv_tokens: int
    host_per_node: float

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that needs most, and how much."""
        return max(
            (("update", self.update), ("log_prob", self.log_prob), ("rollout", self.rollout)), key=lambda p: p[1]
        )


def rank_parameters(shape: ModelShape, *, tensor: int = 1, pipeline: int = 1, stage: int = 0) -> int:
    """Return the exact number of parameters on a rank of a pipeline stage.

    Matrices and biases are split over ``tensor``, norms are not; KV heads are repeated where there are fewer than
    ``tensor``. A shared head is a second copy on the last stage of a pipeline.
    """
    split = shape.layer_parameters - shape.layer_replicated
    if tensor > shape.kv_heads:
        split += 2 * (tensor - shape.kv_heads) * shape.head_dim * (shape.hidden + 1)  # k and v, with bias
    layers = shape.layers // pipeline * (split // tensor + shape.layer_replicated)
    first, last = stage == 0, stage == pipeline - 1
    embedding = shape.embedding // tensor
    head = embedding if last and not (shape.tied and first) else 0
    return layers + (embedding if first else 0) + head + (shape.hidden if last else 0)


def layer_activation(shape: ModelShape, job: Job) -> float:
    """Return the bytes that a layer keeps of one token for its backward pass, on one rank, nothing recomputed.

    Kept: input, norm, q, k, v, attention output, residual, norm (2 h each or their width), gate and up, their product;
    and the log-sum-exp of each head in fp32. With sequence parallel all is split, without it not what is h wide.
    """
    width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    whole = 4 * shape.hidden * job.weight_bytes
    split = (2 * width + 2 * kv + 3 * shape.ffn) * job.weight_bytes + 4 * shape.heads
    return whole / (job.tensor if job.sequence_parallel else 1) + split / job.tensor


def activations(shape: ModelShape, job: Job, *, stage: int) -> float:
    """Return the bytes of activations of the micro-batches in flight, without the head.

    Recomputed in blocks: the input of every block, and one block in full, twice for the gradients beside it (assumed).
    1F1B keeps ``pipeline - stage`` micro-batches in flight.
    """
    layers, flight = shape.layers // job.pipeline, job.pipeline - stage
    layer = layer_activation(shape, job) * job.micro_tokens
    if job.recompute_layers is None:
        return flight * layers * layer + layer
    boundary = shape.hidden * job.weight_bytes * job.micro_tokens / (job.tensor if job.sequence_parallel else 1)
    return flight * -(-layers // job.recompute_layers) * boundary + 2 * job.recompute_layers * layer


def head(shape: ModelShape, job: Job) -> tuple[float, float]:
    """Return the peak bytes of logits and their losses on the last stage: (in the update, in a forward pass)."""
    columns, megatron = shape.vocab / job.tensor, job.backend == "megatron"
    if job.head == "fast":
        # The logits as the model makes them and, on Megatron, as it returns them, in fp32. Their gradient takes their
        # place (method/head.py), and Triton's kernels need nothing beside it.
        logits = job.micro_tokens * columns * (job.weight_bytes + 4 * megatron)
        return logits, logits
    of_verl, tokens = HEAD["megatron" if megatron else "fsdp2"], job.micro_tokens
    if job.head == "fused":
        of_verl, tokens = FUSED, min(FUSED_TOKENS, tokens)
    with_entropy, without, forward = (multiple * 4 * tokens * columns for multiple in of_verl)
    if job.head == "fused":
        # A reference at a temperature for each sample has `method.linear_head`, whose parts may be larger.
        forward = max(forward, job.micro_tokens / CHUNKS * columns * job.weight_bytes)
    return (with_entropy if job.entropy else without), forward


def kv_bytes(shape: ModelShape, job: Job) -> float:
    """Return the bytes of one token in vLLM's KV cache on one rank: k and v of every layer, bf16."""
    return 4 * shape.layers * shape.head_dim * max(shape.kv_heads / job.rollout_tensor, 1)


def trained_parameters(shape: ModelShape, job: Job) -> int:
    """Return how many parameters have gradients and optimizer states: with LoRA those of the adapters alone."""
    if job.lora is None:
        return shape.parameters
    maps = [(i, o) for name, i, o in shape.linears if not job.lora.targets or name in job.lora.targets]
    return shape.layers * job.lora.rank * sum(i + o for i, o in maps)


def _states(shape: ModelShape, job: Job, stage: int) -> tuple[float, float, float, float]:
    """Return bytes of weights, gradients, optimizer states and reference of a rank, all on the GPU."""
    share = trained_parameters(shape, job) / shape.parameters
    # With LoRA the reference is the actor without its adapters: no second copy.
    own_reference = job.reference and job.lora is None
    if job.backend == "megatron":
        count = rank_parameters(shape, tensor=job.tensor, pipeline=job.pipeline, stage=stage)
        shards = job.data * job.context if job.distributed_optimizer else 1
        reference = 2 * count if own_reference else 0
        return 2 * count, GRADIENT_BYTES * count * share, OPTIMIZER_BYTES * count * share / shards, reference
    shard = job.held_bytes * shape.parameters / job.gpus
    return shard, shard * share, 2 * shard * share, (2 * shape.parameters / job.gpus if own_reference else 0)


def gathered(shape: ModelShape, job: Job) -> tuple[float, float]:
    """Return the bytes that FSDP2 holds unsharded: (in the update, in a forward pass). Assumed, not measured.

    Two layers and the embeddings; in the update also the fp32 gradient of one layer and the embeddings.
    """
    if job.backend == "megatron":
        return 0.0, 0.0
    root = shape.parameters - shape.layers * shape.layer_parameters
    forward = job.weight_bytes * (2 * shape.layer_parameters + root)
    gradients = GRADIENT_BYTES * (shape.layer_parameters + root)
    return forward + (gradients if job.lora is None else 0), forward


def memory(shape: ModelShape, job: Job, *, gpu_bytes: float) -> Memory:
    """Return what the fullest rank holds; of a pipeline the stage with the highest peak in the update."""
    stages = [_stage(shape, job, gpu_bytes, stage) for stage in range(job.pipeline)]
    return max(stages, key=lambda stage: stage.update)


def _stage(shape: ModelShape, job: Job, gpu_bytes: float, stage: int) -> Memory:
    weights, gradients, optimizer, reference = _states(shape, job, stage)
    logits, logits_forward = head(shape, job) if stage == job.pipeline - 1 else (0.0, 0.0)
    kept = activations(shape, job, stage=stage)
    unsharded, unsharded_forward = gathered(shape, job)
    asleep = CONTEXT + VLLM_ASLEEP
    # veRL moves what is offloaded to the GPU for the phase that needs it, and away for the others.
    at_rest = (0 if job.param_offload else weights + gradients) + (0 if job.optimizer_offload else optimizer)
    resident_reference = 0 if job.reference_offload else reference
    update = weights + gradients + optimizer + resident_reference + unsharded + kept + logits
    transient = unsharded_forward + layer_activation(shape, job) * job.micro_tokens + logits_forward
    actor_pass = at_rest + (weights if job.param_offload else 0) + resident_reference + transient
    reference_pass = at_rest + (reference if job.backend == "megatron" else 0) + transient
    rollout = at_rest + resident_reference + job.utilization * gpu_bytes + CONTEXT
    cache = job.utilization * gpu_bytes - 2 * shape.parameters / job.rollout_tensor - VLLM_WORKSPACE
    token = kv_bytes(shape, job)
    offloaded = (
        (weights if job.param_offload else 0)
        + (optimizer if job.optimizer_offload else 0)
        + (reference if job.reference_offload else 0)
    )
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        gathered=unsharded,
        activations=kept,
        head=logits,
        update=update * (1 + FRAGMENTATION) + asleep,
        log_prob=max(actor_pass, reference_pass) * (1 + FRAGMENTATION) + asleep,
        rollout=rollout,
        kv_cache=max(cache, 0.0),
        kv_tokens=int(max(cache, 0.0) / token),
        host_per_node=offloaded * min(job.gpus_per_node, job.gpus),
    )
