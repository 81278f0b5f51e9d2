"""vLLM engines, in this process or as Ray actors; both sample through the same class."""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from rapo_verl import Refused
from rapo_verl.evaluation.generate import Engine, EngineLostError, Fleet, Request
from rapo_verl.evaluation.guard import guard
from rapo_verl.evaluation.store import Samples
from rapo_verl.run.doctor import has_gpu
from rapo_verl.run.names import CPU_ENVIRONMENT

logger = logging.getLogger(__name__)

# Samples that run at once in one engine; vLLM queues those for which there is no memory.
MAX_NUM_SEQS = 256
# Seeded requests on a processor need whole prompts: see recipe/experiment/cpu.yaml.
CPU_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 16384,
}
# vLLM forks its core unless this says otherwise; a process that has asked CUDA anything cannot be forked.
GPU_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with."""

    # Folder of a Hugging Face checkpoint.
    model: str
    max_model_len: int
    tensor_parallel: int = 1
    # Further arguments of vLLM's engine.
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Samples to keep in flight: twice what runs at once, so that no slot waits for this process."""
        return 2 * self.options.get("max_num_seqs", MAX_NUM_SEQS)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of vLLM's engine."""
        return {
            "max_num_seqs": MAX_NUM_SEQS,
            "enable_prefix_caching": True,
            # The checkpoint's generation_config.json must not change how responses are drawn.
            "generation_config": "vllm",
            "seed": 0,
            "disable_log_stats": True,
            "model": self.model,
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.tensor_parallel,
            **({} if has_gpu() else CPU_OPTIONS),
            **self.options,
        }


class VllmEngine:
    """vLLM in this process (its core is a process of its own)."""

    def __init__(self, spec: EngineSpec):
        for name, value in (GPU_ENVIRONMENT if has_gpu() else CPU_ENVIRONMENT).items():
            os.environ.setdefault(name, value)  # before vLLM is imported
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.capacity = spec.capacity
        self._numbers = itertools.count()
        before = set(psutil.Process().children(recursive=True))
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec.arguments()))
        self._guard = guard([p for p in psutil.Process().children(recursive=True) if p not in before])

    async def sample(self, request: Request) -> Samples:
        """Return the samples of one request; EngineLostError: vLLM's core died."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        asked = request.sampling
        params = SamplingParams(
            n=request.samples,
            seed=request.seed,
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_tokens=asked.max_tokens,
            stop_token_ids=list(asked.stop_token_ids),
            logprobs=0 if asked.logprobs else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = []
        try:
            prompt: Any = {"prompt_token_ids": list(request.prompt)}
            async for output in self._llm.generate(prompt, params, str(next(self._numbers))):
                outputs += output.outputs
        except EngineDeadError as error:
            raise EngineLostError(f"vLLM's core died ({error})") from error
        outputs.sort(key=lambda output: output.index)
        return Samples(
            [len(output.token_ids) for output in outputs],
            [str(output.finish_reason) for output in outputs],
            [output.cumulative_logprob if asked.logprobs else None for output in outputs],
            [output.text for output in outputs],
            [list(output.token_ids) for output in outputs] if asked.token_ids else None,
        )

    def close(self) -> None:
        """End vLLM's core."""
        self._llm.shutdown()
        self._guard.communicate()


def local_fleet(spec: EngineSpec) -> Fleet:
    """Return a fleet of one engine in this process, and a new one if it dies."""
    return lambda alive: [] if alive else [VllmEngine(spec)]


class RayEngine:
    """A `VllmEngine` in a Ray actor."""

    def __init__(self, handle: Any, capacity: int):
        self.capacity = capacity
        self._handle = handle

    async def sample(self, request: Request) -> Samples:
        """Return the samples of one request; EngineLostError: actor, vLLM or machine died, or could not start."""
        import ray

        try:
            return await self._handle.sample.remote(request)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineLostError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            # The actor or its node died, or Ray ended it because memory ran out.
            raise EngineLostError(str(error)) from error

    def close(self) -> None:
        """End the actor and what it holds."""
        import ray

        ray.kill(self._handle)


def ray_fleet(spec: EngineSpec, address: str, *, engines: int = 0) -> Fleet:
    """Return a fleet on a Ray cluster, "auto" or a "local" one: at most ``engines``, 0: as many as it has room for.

    One for every ``tensor_parallel`` GPUs of a node, or that number on CPUs. Nodes that join are used at the next look,
    those that leave take their engines with them.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise Refused(f"--ray {address}: {error}") from error

    def room() -> int:
        gpus = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        return sum(int(count) // spec.tensor_parallel for count in gpus)

    on_gpus = room() > 0
    if not on_gpus and engines < 1:
        raise Refused(
            f"no node of the Ray cluster has {spec.tensor_parallel} GPU(s); wait until one has joined, or give "
            "--engines N for N engines on processors"
        )
    resources = {"num_gpus": spec.tensor_parallel} if on_gpus else {"num_cpus": 1}
    actor: Any = ray.remote(max_concurrency=1000, **resources)(VllmEngine)
    actor = actor.options(runtime_env={"env_vars": {} if on_gpus else CPU_ENVIRONMENT})

    def fleet(alive: Sequence[Engine]) -> list[Engine]:
        here = room() if on_gpus else engines
        fresh = min(engines or here, here) - len(alive)
        if fresh > 0:
            logger.info("%d engine(s) start on Ray, %d live", fresh, len(alive))
        return [RayEngine(actor.remote(spec), spec.capacity) for _ in range(fresh)]

    return fleet
