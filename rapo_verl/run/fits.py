"""What fits the GPUs of a machine: the largest of our recipes as it is, and what makes a larger one fit."""

import importlib.util
import os
from dataclasses import dataclass, field

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
    plain, changed = Fit(), Fit()
    for name in names:
        config = compose_config([f"experiment={name}", *here])
        if config.actor_rollout_ref.actor.strategy == "megatron" and not _has_megatron():
            continue
        shape, job = shape_of(config.actor_rollout_ref.model.path), job_of(config)
        command = [f"experiment={name}", *here]
        if not violations(job, shape) and not misfits(job, memory(shape, job, gpu_bytes=gpu.memory_gib * GIB), gpu):
            plain = max(plain, Fit(shape.parameters, 0, command, config), key=Fit.rank)
        elif variant := next(fitting_variants(shape, job, gpu, count), None):
            host = [f"({variant.memory.host_per_node / GIB:.0f} GiB of host memory)"] if variant.offloads else []
            fit = Fit(shape.parameters, len(variant.overrides), [*command, *variant.overrides, *host], config)
            changed = max(changed, fit, key=Fit.rank)
    what = f"fits {count} x {gpu.memory_gib:.0f} GiB"
    found = [
        _cpus_for_ray(plain if plain.parameters else changed),
        Finding(
            what,
            " ".join(plain.command) or "none as it is",
            bool(plain.command),
            "take what fits with changes, where that is named, or more GPUs: rapo plan RECIPE --gpus N",
        ),
    ]
    if changed.parameters > plain.parameters:
        found.append(Finding(f"{what} with changes", " ".join(changed.command)))
    return found


@dataclass(frozen=True)
class Fit:
    """A recipe that fits: its size, how many settings are changed for it, and what `rapo train` takes."""

    parameters: int = 0
    changes: int = 0
    command: list[str] = field(default_factory=list)
    config: DictConfig | None = None

    def rank(self) -> tuple[int, int]:
        """Larger models first, of equal ones that with fewer changes."""
        return self.parameters, -self.changes


def _cpus_for_ray(fit: Fit) -> Finding:
    there = os.cpu_count() or 1
    short = [] if fit.config is None else too_few_cpus(fit.config)
    return Finding("CPUs for Ray", str(there), not short, "".join(short))


def _has_megatron() -> bool:
    return importlib.util.find_spec("megatron") is not None
