"""How samples reach the trainer: seeded requests, a strict replay buffer, and no lost reward crash.

Used by every run of ours, veRL's built-in GRPO included, so that comparisons share it. None of it changes what a
sample is worth.
"""

import os
import random
import time
import traceback
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from rapo_verl.reward.function import TRUNCATED, verdict_metrics
from rapo_verl.run.combinations import is_async
from rapo_verl.run.files import write_atomic
from rapo_verl.run.names import FAILURE_FILE, RUN_DIR_VARIABLE
from rapo_verl.run.seeds import sampling_seed
from rapo_verl.training.agent_loop import OneTurnLoop, Together, is_single_turn, queue_row, reward_batch


def failure_path() -> Path | None:
    """Return the file that a failing reward leaves in the run folder, None outside a run of ours."""
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    return Path(run_dir) / FAILURE_FILE if run_dir else None


class SeededAgentLoopWorker(AgentLoopWorkerTQ.__ray_actor_class__):
    """veRL's worker with one seed per response (synchronous trainers), and a reward failure that names its sample."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Not superfluous: Ray 2.60 rewraps an inherited __init__ of an async actor, whose super() then fails.
        super().__init__(*args, **kwargs)
        self._loop = OneTurnLoop.of(self)
        self._finished = Together(self._finish)

    # Read once: looked up for each sample, an OmegaConf node costs more than all that is done with it.
    _async = cached_property(lambda self: is_async(self.config.trainer.v1.trainer_mode))
    _seed = cached_property(lambda self: int(self.config.actor_rollout_ref.rollout.seed))
    # Whether samples are text, judged by a function.
    _plain = cached_property(
        lambda self: not (self.distillation_enabled or self.config.reward.reward_model.enable or self.processor)
    )

    async def _run_agent_loop(self, sampling_params: dict, trajectory: dict, **kwargs: Any) -> Any:
        validate = trajectory["validate"]
        # With asynchronous trainers an interrupted request goes on with its own seed
        # (workers/rollout/llm_server.py:285), whose random numbers have drawn its first tokens already: the rest would
        # depend on them beyond what the policy says.
        if validate or not self._async:
            # verl 0.9.1 trainer/ppo/v1/agent_loop_tq.py:125: passes one sampling_params to the whole group.
            seed = sampling_seed(
                "validation" if validate else "train",
                self._seed,
                int(trajectory["step"]),
                int(trajectory["sample_index"]),  # row of the problem in the data set
                int(kwargs["session_id"]),  # number of the response within its group
            )
            sampling_params = {**sampling_params, "seed": seed}
        if kwargs.get("trace") or not (is_single_turn(kwargs.get("agent_name", "")) and self._plain):
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        # verl 0.9.1 experimental/agent_loop/agent_loop.py:661: here without a loop of its own for each sample.
        fields = {name: value for name, value in kwargs.items() if name not in ("agent_name", "trace")}
        output = await self._loop.run(sampling_params, **fields)
        if not (output.response_ids and self.reward_loop_worker_handles):
            return await self._agent_loop_postprocess(output, validate, **fields)
        # verl 0.9.1 trainer/ppo/v1/agent_loop_tq.py:160: scores and stores each sample by itself.
        return await self._finished(("val" if validate else "train", output, fields))

    async def _finish(self, samples: list[tuple[str, Any, dict]]) -> list[Exception | None]:
        """Score samples and put them into the queue, each in one call; return what was raised of each."""
        for _, output, _ in samples:
            self._note_truncation(output)
        started = time.monotonic()
        results = await self._scored([(output, fields) for _, output, fields in samples])
        alike: dict[tuple, list] = defaultdict(list)
        for (partition, output, fields), result in zip(samples, results, strict=True):
            if isinstance(result, Exception):
                self._record_failure(result, output, fields)
                continue
            output.reward_score = result["reward_score"]
            output.extra_fields["reward_extra_info"] = result["reward_extra_info"]
            output.metrics.compute_score = time.monotonic() - started
            key, row, tag = queue_row(output, fields)
            alike[(partition, *row)].append((key, row, tag))
        for (partition, *_), group in alike.items():
            keys, rows, tags = (list(column) for column in zip(*group, strict=True))
            await tq.async_kv_batch_put(
                keys=keys, fields=list_of_dict_to_tensordict(rows), tags=tags, partition_id=partition
            )
        return [result if isinstance(result, Exception) else None for result in results]

    async def _scored(self, items: list[tuple[Any, dict]]) -> list[Any]:
        """Return the reward record of each sample, or what its reward function raised."""
        worker = random.choice(self.reward_loop_worker_handles)
        try:
            return await worker.compute_score_batch.remote(reward_batch(items))
        except Exception as error:  # of one of them: each alone, so that it is raised for its own sample
            if len(items) == 1:
                return [error]
            return [result for item in items for result in await self._scored([item])]

    async def _compute_score(self, outputs: list, kwargs: dict) -> None:
        # verl 0.9.1 experimental/agent_loop/agent_loop.py:967: agent_loop_tq.py:133 logs what it raises and goes on.
        self._note_truncation(outputs[-1])
        try:
            await super()._compute_score(outputs, kwargs)
        except Exception as error:  # recorded with its sample, then raised again
            self._record_failure(error, outputs[-1], kwargs)
            raise

    def _note_truncation(self, output: Any) -> None:
        """Tell the reward function what only tokens tell: veRL gives it the response as text (naive.py:50)."""
        # Through extra_fields, which naive.py:46 merges into its extra_info.
        length, limit = len(output.response_ids), int(self.rollout_config.response_length)
        ended = length > 0 and output.response_ids[-1] == self.tokenizer.eos_token_id
        output.extra_fields[TRUNCATED] = length >= limit and not ended

    def _record_failure(self, error: Exception, output: Any, fields: dict) -> None:
        path = failure_path()
        if path is None or path.exists():
            return
        write_atomic(
            path,
            f"{''.join(traceback.format_exception(error))}\n"
            f"data_source: {fields.get('data_source')}\n"
            f"reward_model: {fields.get('reward_model')}\n"
            f"extra_info: {fields.get('extra_info')}\n"
            f"prompt: {self.tokenizer.decode(output.prompt_ids)!r}\n"
            f"response: {self.tokenizer.decode(output.response_ids)!r}\n",
        )


class SeededAgentLoopManager(AgentLoopManagerTQ):
    """Set by ``rollout.agent.agent_loop_manager_class``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # verl 0.9.1 trainer/ppo/v1/agent_loop_tq.py:232: sets the worker class in __init__.
        self.agent_loop_workers_class = ray.remote(SeededAgentLoopWorker)


class StrictReplayBuffer(ReplayBuffer):
    """veRL's replay buffer (``trainer.v1.sampler.custom_sampler``), in a reproducible order and without lost samples.

    ``sampler_kwargs.poll_interval``: seconds between looks at the queue (veRL: 2.0, a fifth of a small step).
    ``sampler_kwargs.max_failed_share``: share of a batch's answers that may run into the verifier's limits.
    """

    def __init__(self, *args: Any, sampler_kwargs: Any = None, **kwargs: Any):
        poll_interval = float((sampler_kwargs or {}).get("poll_interval", 2.0))
        self.max_failed_share = float((sampler_kwargs or {}).get("max_failed_share", 0.1))
        super().__init__(*args, sampler_kwargs=sampler_kwargs, poll_interval=poll_interval, **kwargs)

    def _sync_metadata_from_transfer_queue(self) -> None:
        # verl 0.9.1 trainer/ppo/v1/replay_buffer.py:112: "failed groups remain sampleable and missing
        # trajectories are padded downstream", so a reward function that raises would only shrink the batch.
        super()._sync_metadata_from_transfer_queue()
        failed = {uid for uids in self.failure_keys.values() for uid in uids}
        if failed:
            path = failure_path()
            cause = path.read_text() if path is not None and path.exists() else "its traceback is in the log above"
            raise RuntimeError(f"the rollout or reward of {len(failed)} prompt(s) failed; the first one:\n{cause}")

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        """Return veRL's batch, ordered by (row of the problem, number of the response) instead of by random uid.

        Adds the counts of the verifier's verdicts to the metrics; it is the one place that sees every batch, of
        validation and of veRL's own trainers too. VerifierFailingError: too many of them say nothing of mathematics.
        """
        # verl 0.9.1 trainer/ppo/v1/replay_buffer.py:422: gives the samples in the order of their random uids.
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=["index", "extra_fields"])
        records = [fields.get("reward_extra_info") or {} for fields in data["extra_fields"]]
        metrics = {**metrics, **verdict_metrics(records, max_failed_share=self.max_failed_share)}
        rows = [int(row) for row in data["index"]]
        sessions = [int(key.split("_")[1]) for key in batch.keys]
        batch.reorder(sorted(range(len(rows)), key=lambda i: (rows[i], sessions[i], batch.keys[i])))
        return batch, metrics


class StrictReplayBufferAsync(StrictReplayBuffer, ReplayBufferAsync):
    """The same for veRL's asynchronous trainers, which leave out samples of a policy too old."""
