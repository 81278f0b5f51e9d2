"""What fits the GPUs of a machine: the largest of our recipes as it is, and what makes a larger one fit."""

import importlib.util
import os
from typing import NamedTuple

from omegaconf import DictConfig

from rapo_verl.plan.card import Gpu
from rapo_verl.plan.job import job_of, violations
from rapo_verl.plan.memory import GIB, memory
from rapo_verl.plan.model import shape_of
from rapo_verl.plan.report import fitting_variants, misfits
from rapo_verl.run.compose import compose_config, experiments
from rapo_verl.run.finding import Finding
from rapo_verl.run.preflight import too_few_cpus


def what_fits(gpu: Gpu, count: int) -> list[Finding]:
    """Return, by their plans, which of our recipes fits so many of a card, first whether Ray finds its CPUs for it."""
    here = ["trainer.nnodes=1", f"trainer.n_gpus_per_node={count}"]
    # Of the methods of a size RAPO alone: the others differ in nothing that is counted, but for the head.
    names = [name for name in experiments() if name.startswith("qwen") and "grpo" not in name and "answers" not in name]
    plain, changed = NOTHING, NOTHING
    for name in names:
        command = [f"experiment={name}", *here]
        config = compose_config(command)
        if config.actor_rollout_ref.actor.strategy == "megatron" and not _has_megatron():
            continue
        shape, job = shape_of(config.actor_rollout_ref.model.path), job_of(config)
        if not violations(job, shape) and not misfits(job, memory(shape, job, gpu_bytes=gpu.memory_gib * GIB), gpu):
            plain = max(plain, Fit(shape.parameters, 0, command, config), key=_rank)
        elif variant := next(fitting_variants(shape, job, gpu, count), None):
            host = [f"({variant.memory.host_per_node / GIB:.0f} GiB of host memory)"] if variant.offloads else []
            fit = Fit(shape.parameters, len(variant.overrides), [*command, *variant.overrides, *host], config)
            changed = max(changed, fit, key=_rank)
    largest = plain if plain.command else changed
    short = [] if largest.config is None else too_few_cpus(largest.config)
    what = f"fits {count} x {gpu.memory_gib:.0f} GiB"
    mend = "take what fits with changes, where that is named, or more GPUs: rapo plan RECIPE --gpus N"
    found = [
        Finding("CPUs for Ray", str(os.cpu_count() or 1), not short, "".join(short)),
        Finding(what, " ".join(plain.command) or "none as it is", bool(plain.command), mend),
    ]
    if changed.parameters > plain.parameters:
        found.append(Finding(f"{what} with changes", " ".join(changed.command)))
    return found


class Fit(NamedTuple):
    """A recipe that fits: its size, how many settings are changed for it, and what `rapo train` takes."""

    parameters: int
    changes: int
    command: list[str]
    config: DictConfig | None


NOTHING = Fit(0, 0, [], None)


def _rank(fit: Fit) -> tuple[int, int]:
    """Larger models first, of equal ones that with fewer changes."""
    return fit.parameters, -fit.changes


def _has_megatron() -> bool:
    return importlib.util.find_spec("megatron") is not None
