"""A plan whole: memory, cost, what is illegal, what does not fit, and the nearest layouts that do."""

import bisect
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rapo_verl.plan.card import Gpu, card
from rapo_verl.plan.cost import Assumed, Cost, cost
from rapo_verl.plan.job import Job, job_of, violations
from rapo_verl.plan.memory import GIB, Memory, memory, trained_parameters
from rapo_verl.plan.model import ModelShape, shape_of

# A plan "fits" with this share of the card to spare: what is assumed above may be off by that much.
MARGIN = 0.1
# Steps of rollout.gpu_memory_utilization that the search tries.
UTILIZATIONS = (0.6, 0.5, 0.4, 0.3)
# A larger micro-batch is named in steps of so many tokens, and from this many times the recipe's on.
MICRO_STEP, MICRO_GAIN = 1024, 1.25


@dataclass(frozen=True)
class Plan:
    """What `rapo plan` says about one run."""

    shape: ModelShape
    job: Job
    gpu: Gpu
    assumed: Assumed
    memory: Memory
    cost: Cost
    problems: list[str]
    nearest: list[str]
    micro_tokens: int | None  # of the largest micro-batch that fits as well, where it is worth it

    @property
    def fits(self) -> bool:
        """Whether it is legal and fits every phase with MARGIN to spare."""
        return not self.problems


def plan(config: DictConfig, gpu: Gpu, *, gpus: int | None = None, assumed: Assumed | None = None) -> Plan:
    """Return the plan of a resolved run config, on ``gpus`` cards instead of its own number; Refused by `shape_of`."""
    shape, job = shape_of(config.actor_rollout_ref.model.path), job_of(config, gpus=gpus)
    assumed = assumed or Assumed()
    asked, illegal = job, violations(job, shape)
    job = _on_the_gpus(job)
    held = memory(shape, job, gpu_bytes=gpu.memory_gib * GIB)
    problems = illegal + misfits(job, held, gpu)
    nearest = _nearest_fits(shape, asked, gpu) if problems else []
    price = cost(shape, job, gpu, assumed, kv_tokens=held.kv_tokens)
    larger = None if problems else larger_micro_batch(shape, job, gpu, price.tokens / price.responses)
    return Plan(shape, job, gpu, assumed, held, price, problems, nearest, larger)


def _on_the_gpus(job: Job) -> Job:
    """Return the job with TP lowered to what its GPUs hold, so that the memory shown is one that could be."""
    room = job.gpus // (job.pipeline * job.context)
    if job.tensor <= room or room == 0:
        return job
    tensor = 1 << room.bit_length() - 1
    return replace(job, tensor=tensor, sequence_parallel=tensor > 1)


def show_plan(
    config: DictConfig, *, gpu: str | None = None, gpus: int | None = None, response: int = 1000, as_json: bool = False
) -> bool:
    """Print the plan of a config as tables or JSON and return whether it fits; Refused for a card that is not known."""
    made = plan(config, card(gpu), gpus=gpus, assumed=Assumed(response=response))
    if as_json:
        told = {**asdict(made), "fits": made.fits, "step_seconds": made.cost.step}
        print(json.dumps(_without_nan(told), indent=1))
    else:
        print_plan(made, Console())
    return made.fits


def _without_nan(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: _without_nan(value) for key, value in told.items()}
    return None if isinstance(told, float) and math.isnan(told) else told


def misfits(job: Job, held: Memory, gpu: Gpu) -> list[str]:
    """Return each phase that passes the card's memory less MARGIN, with its largest part."""
    limit = gpu.memory_gib * (1 - MARGIN)
    parts = {
        "optimizer states": held.optimizer,
        "logits": held.head,
        "gradients": held.gradients,
        "weights": held.weights,
        "activations": held.activations,
        "layers that FSDP gathers": held.gathered,
        "reference": 0 if job.reference_offload else held.reference,
    }
    vllm, most = job.utilization * gpu.memory_gib, f"most of it {max(parts, key=lambda part: parts[part])}"
    beside = f"vLLM's {vllm:.1f} GiB (gpu_memory_utilization) beside {held.rollout / GIB - vllm:.1f} GiB of the trainer"
    phases = ("update", held.update, most), ("log-prob passes", held.log_prob, most), ("rollout", held.rollout, beside)
    found = [
        f"{phase}: {size / GIB:.1f} GiB on a card of {gpu.memory_gib:.1f} GiB ({limit:.1f} with {MARGIN:.0%} to "
        f"spare): {why}"
        for phase, size, why in phases
        if size / GIB > limit
    ]
    if held.kv_tokens < job.max_model_len:
        found.append(
            f"rollout: {held.kv_tokens} tokens of KV cache, fewer than one sequence of {job.max_model_len}; raise "
            "rollout.gpu_memory_utilization or rollout.tensor_model_parallel_size"
        )
    return found


def larger_micro_batch(shape: ModelShape, job: Job, gpu: Gpu, length: float) -> int | None:
    """Return the most tokens of a micro-batch that fit as well; None: hardly more than now, or padding adds to them.

    A rank of a pipeline's stage has one micro-batch at least in each update; ``length`` is a sequence's mean.
    """
    all_of_a_rank = job.mini_batch * job.responses * length / (job.data * job.context * job.pipeline)
    sizes = range(job.micro_tokens // MICRO_STEP * MICRO_STEP, int(all_of_a_rank) + MICRO_STEP, MICRO_STEP)

    def too_large(tokens: int) -> bool:
        variant = replace(job, micro_tokens=tokens)
        return bool(misfits(variant, memory(shape, variant, gpu_bytes=gpu.memory_gib * GIB), gpu))

    fitting = bisect.bisect_left(sizes, True, key=too_large)
    largest = sizes[fitting - 1] if fitting else 0
    worth_it = job.by_tokens and not job.padded and largest >= MICRO_GAIN * job.micro_tokens
    return largest if worth_it else None


def _variants(job: Job, shape: ModelShape, gpus: int) -> Iterator[tuple[Job, list[str]]]:
    """Yield legal variants on a number of GPUs with their changed keys, few and mild changes first.

    Tried are TP up to 8, offload, the smallest micro-batch, and the rollout's share and TP; PP and CP stay.
    """
    megatron = job.backend == "megatron"
    engine = "actor.megatron" if megatron else "actor.fsdp_config"
    # Cut by sequences, no number of tokens changes a micro-batch.
    shortest = -(-job.sequence // job.context) if job.by_tokens else job.micro_tokens
    options: dict[tuple[str, str], Iterable[Any]] = {
        ("tensor", f"{engine}.tensor_model_parallel_size"): (1, 2, 4, 8) if megatron else (job.tensor,),
        ("optimizer_offload", f"{engine}.optimizer_offload"): (False, True),
        ("param_offload", f"{engine}.param_offload"): (False, True),
        ("micro_tokens", "actor.ppo_max_token_len_per_gpu"): {job.micro_tokens, shortest},
        ("utilization", "rollout.gpu_memory_utilization"): sorted({job.utilization, *UTILIZATIONS}, reverse=True),
        ("rollout_tensor", "rollout.tensor_model_parallel_size"): sorted({job.rollout_tensor, 2, 4}),
    }
    found = []
    for values in itertools.product(*options.values()):
        new: dict[str, Any] = {name: value for (name, _), value in zip(options, values)}
        changes = [f"actor_rollout_ref.{key}={new[name]}" for name, key in options if new[name] != getattr(job, name)]
        new |= {"least_tokens": new["micro_tokens"], "sequence_parallel": new["tensor"] > 1}
        new["reference_offload"] = job.reference_offload or new["param_offload"]
        variant = replace(job, gpus=gpus, **new)
        offloads = variant.param_offload + variant.optimizer_offload
        # The optimizer's states are larger, and needed in one phase alone: they go first.
        if variant.param_offload <= variant.optimizer_offload and not violations(variant, shape):
            mildness = offloads, len(changes), abs(job.utilization - variant.utilization), variant.tensor
            found.append((mildness, variant, changes))
    for _, variant, changes in sorted(found, key=lambda row: row[0]):
        yield variant, changes


class Variant(NamedTuple):
    """A layout that fits: as a job, the overrides that make it one, and what it holds."""

    job: Job
    overrides: list[str]
    memory: Memory

    @property
    def offloads(self) -> bool:
        """Whether anything of the trainer lies in host memory between its phases."""
        return self.job.param_offload or self.job.optimizer_offload


def fitting_variants(shape: ModelShape, job: Job, gpu: Gpu, gpus: int) -> Iterator[Variant]:
    """Yield the layouts on a number of GPUs that are legal and fit, few and mild changes first."""
    for variant, overrides in _variants(job, shape, gpus):
        held = memory(shape, variant, gpu_bytes=gpu.memory_gib * GIB)
        if not misfits(variant, held, gpu):
            yield Variant(variant, overrides, held)


def _nearest_fits(shape: ModelShape, job: Job, gpu: Gpu) -> list[str]:
    """Return the mildest change that fits on the same GPUs, and the fewest GPUs that fit without offload."""
    hints = []
    for gpus in dict.fromkeys((job.gpus, *(2**i for i in range(11) if 2**i > job.gpus))):
        fitting = fitting_variants(shape, job, gpu, gpus)
        found = next((variant for variant in fitting if gpus == job.gpus or not variant.offloads), None)
        if found is None:
            continue
        phase, peak = found.memory.peak
        host = f", {found.memory.host_per_node / GIB:.0f} GiB of host memory a node" if found.offloads else ""
        keys = ", ".join(found.overrides) or "no other change"
        hints.append(f"{gpus} GPUs: {keys} (peak {peak / GIB:.1f} GiB in {phase}{host})")
        if not found.offloads:
            return hints
    return hints or ["no layout of up to 1024 GPUs fits"]


def print_plan(made: Plan, console: Console) -> None:
    """Print the plan as tables, what is wrong and what would do last."""
    job, held, price, shape = made.job, made.memory, made.cost, made.shape
    adapters = f" ({trained_parameters(shape, job):,} in adapters of rank {job.lora.rank})" if job.lora else ""
    console.print(
        f"[bold]{shape.name}[/bold] {shape.parameters:,} parameters{adapters}, {job.backend} on {job.gpus} GPUs of "
        f"{made.gpu.memory_gib:.1f} GiB ({made.gpu.name}): TP {job.tensor} x PP {job.pipeline} x CP {job.context} x "
        f"DP {job.data}, rollout TP {job.rollout_tensor} x {max(job.gpus // job.rollout_tensor, 1)} replicas"
    )
    table = Table("GiB per GPU", "", title="memory of the fullest rank", title_justify="left")
    rows = ("weights", "gradients", "optimizer", "reference", "gathered", "activations", "head")
    offloaded = {"weights": job.param_offload, "optimizer": job.optimizer_offload, "reference": job.reference_offload}
    for name in rows:
        note = " (in host memory when not used)" if offloaded.get(name) else ""
        table.add_row(name + note, f"{getattr(held, name) / GIB:.1f}")
    table.add_section()
    for name in ("update", "log_prob", "rollout"):
        size = getattr(held, name) / GIB
        table.add_row(f"peak in {name}", f"{size:.1f} ({size / made.gpu.memory_gib:.0%})")
    table.add_row("KV cache of a replica's GPU", f"{held.kv_cache / GIB:.1f} ({held.kv_tokens:,} tokens)")
    table.add_row("host memory per node", f"{held.host_per_node / GIB:.0f}")
    console.print(table)
    table = Table("a step", "", title="cost (estimated, not measured)", title_justify="left")
    table.add_row(
        "responses, tokens", f"{price.responses:,}, {price.tokens / 1e6:.1f} M at {price.tokens / price.responses:.0f}"
    )
    table.add_row("FLOPs: a forward pass, the update", f"{price.forward_flops:.2e}, {price.update_flops:.2e}")
    for name in ("generation", "old_log_prob", "reference", "update", "heads", "step"):
        label = "of these three the heads" if name == "heads" else name
        table.add_row(f"{label}, seconds", f"{getattr(price, name):.0f}".replace("nan", "not known for this card"))
    if job.steps:  # else a number of epochs
        table.add_row(f"{job.steps} steps, hours", f"{job.steps * price.step / 3600:.1f}".replace("nan", "not known"))
    if job.validations:
        number = "of problems not here" if job.validation is None else f"of {job.validation:,} responses"
        seconds, hours = f"{price.validation:.0f}", f"{job.validations * price.validation / 3600:.1f}"
        label = f"a validation {number}, seconds; all {job.validations}, hours"
        table.add_row(label, f"{seconds}; {hours}".replace("nan", "not known"))
    table.add_row("a checkpoint, disk for all kept", f"{price.checkpoint / GIB:.0f} GiB, {price.disk / GIB:.0f} GiB")
    console.print(table)
    console.print(
        "not measured but assumed: context, NCCL, sleeping vLLM, fragmentation, gathered FSDP layers (docs/scaling.md)"
    )
    if job.by_tokens and job.padded:
        times = job.sequence * price.responses / price.tokens
        console.print(
            "actor_rollout_ref.model.use_remove_padding=false pads the sequences of a micro-batch to the longest: "
            f"activations and head take up to {times:.1f} times what is shown",
            highlight=False,
        )
    if made.fits:
        console.print(f"fits, with more than {MARGIN:.0%} of the card to spare")
        if made.micro_tokens is not None:
            console.print(
                f"as do larger micro-batches, whose passes are fewer: up to actor_rollout_ref.actor.ppo_max_token_len_"
                f"per_gpu={made.micro_tokens} ({job.micro_tokens} now)",
                highlight=False,
            )
        return
    for title, lines in (("does not fit:", made.problems), ("nearest that does:", made.nearest)):
        console.print(f"[bold]{title}[/bold]")
        for line in lines:
            console.print(f"- {line}", highlight=False)
