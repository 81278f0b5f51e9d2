"""The agent loop at a third of its CPU time: one loop a worker, a prompt tokenized once, calls that arrive together.

veRL builds an agent loop for each sample by Hydra, renders its prompt again for each of a group's samples, and asks the
reward worker and the queue for each sample alone. What is asked, and what comes back, stays the same. `rollout` uses it
for samples of one turn, text only, judged by a function; all others go veRL's way.
"""

import asyncio
import copy
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, _agent_loop_registry
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.llm_server import LLMServerClient

# Seconds that a call waits for others: a thousandth of a small step.
WAIT_S = 0.005
MOST_PROMPTS = 4096


class Together:
    """Calls that arrive within `WAIT_S` of each other, answered by one call for all.

    Args:
        work: from the items to their results, in their order; an exception among them is raised to its caller, one
            that it raises to all.
    """

    def __init__(self, work: Callable[[list], Awaitable[list]]):
        self._work = work
        self._waiting: tuple[list, asyncio.Task] | None = None

    async def __call__(self, item: Any) -> Any:
        """Return this item's result."""
        if self._waiting is None:
            self._waiting = [], asyncio.create_task(self._run())
        items, task = self._waiting
        place = len(items)
        items.append(item)
        # Shielded: the others still wait for it.
        result = (await asyncio.shield(task))[place]
        if isinstance(result, BaseException):
            raise result
        return result

    async def _run(self) -> list:
        await asyncio.sleep(WAIT_S)
        assert self._waiting is not None
        (items, _), self._waiting = self._waiting, None
        return await self._work(items)


class _Here:
    """Runs in this thread what veRL gives to another: a few tokens to merge, a prompt to render."""

    async def run_in_executor(self, _: None, work: Callable[[], Any]) -> Any:
        return work()


class OneTurnLoop(SingleTurnAgentLoop):
    """veRL's single-turn loop for all samples of a worker, text only: it keeps nothing of a sample."""

    @classmethod
    def of(cls, worker: Any) -> "OneTurnLoop":
        """Return the loop that verl 0.9.1 experimental/agent_loop/agent_loop.py:683 would build for each sample."""
        # Read for each sample: as veRL's dataclass, a tenth of what an OmegaConf node costs.
        config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=worker.rollout_config))
        client = worker.llm_client
        if type(client) is LLMServerClient:
            client = copy.copy(client)
            client.config = config
        loop = cls(
            trainer_config=DictConfigWrap(config=config),
            server_manager=client,
            tokenizer=worker.tokenizer,
            processor=worker.processor,
            hf_model_type=worker.hf_model_type,
            dataset_cls=worker.dataset_cls,
            data_config=DictConfigWrap(worker.config.data),
        )
        # verl 0.9.1 experimental/agent_loop/agent_loop.py:335, 422: goes through a thread, twice for each sample.
        loop.loop = _Here()
        loop._prompts = {}
        return loop

    _prompts: dict[str, list[int]]

    async def ct_build_initial_tokens(self, messages: list[dict], *args: Any, **kwargs: Any) -> list[int]:
        """Return a prompt's tokens, rendered once for its group."""
        # verl 0.9.1 experimental/agent_loop/agent_loop.py:318: renders the prompt again for each sample.
        key = json.dumps(messages, default=str)
        if key not in self._prompts:
            if len(self._prompts) >= MOST_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = await super().ct_build_initial_tokens(messages, *args, **kwargs)
        return list(self._prompts[key])


def is_single_turn(agent_name: str) -> bool:
    """Whether an agent is veRL's own single-turn loop, and not one of the user's under its name."""
    config = _agent_loop_registry.get(agent_name) or {}
    return config.get("_target_") == f"{SingleTurnAgentLoop.__module__}.{SingleTurnAgentLoop.__qualname__}"


def reward_batch(items: list[tuple[Any, dict]]) -> DataProto:
    """Return what verl 0.9.1 experimental/agent_loop/agent_loop.py:967 sends to a reward worker, for several samples.

    Args:
        items: (output, its prompt's fields) each. Prompts are padded on the left, responses on the right, so that each
            row's mask reads as veRL's reward managers read it.
    """
    prompts = [torch.tensor(output.prompt_ids, dtype=torch.int64) for output, _ in items]
    responses = [torch.tensor(output.response_ids, dtype=torch.int64) for output, _ in items]
    left = pad_sequence(prompts, batch_first=True, padding_side="left")
    right = pad_sequence(responses, batch_first=True)
    seen_left = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    seen_right = pad_sequence([torch.ones_like(r) for r in responses], batch_first=True)
    mask = torch.cat([seen_left, seen_right], dim=1)
    batch = TensorDict(
        {
            "prompts": left,
            "responses": right,
            "attention_mask": mask,
            "input_ids": torch.cat([left, right], dim=1),
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        },
        batch_size=len(items),
    )
    columns = {name: [fields[name] for _, fields in items] for name in items[0][1]}
    columns |= {
        "__num_turns__": [output.num_turns for output, _ in items],
        "tool_extra_fields": [output.extra_fields for output, _ in items],
        "prompt_len": [len(row) for row in prompts],
        "response_len": [len(row) for row in responses],
    }
    return DataProto(batch=batch, non_tensor_batch={name: _objects(values) for name, values in columns.items()})


def queue_row(output: Any, fields: dict) -> tuple[str, dict, dict]:
    """Return the key, the fields and the tag under which verl 0.9.1 trainer/ppo/v1/agent_loop_tq.py:188 keeps a sample.

    Args:
        output: of one turn, text only, judged.
        fields: its prompt's.
    """
    row = {**output.as_dict(), **fields}
    row.pop("multi_modal_data", None)
    input_ids = torch.cat([row["prompts"], row["responses"]])
    row |= {
        "loss_mask": row["response_mask"],
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids)),
        "multi_modal_inputs": {},
    }
    tag = {
        "status": "success",
        "prompt_len": len(row["prompts"]),
        "response_len": len(row["responses"]),
        "seq_len": len(input_ids),
        "global_steps": fields["global_steps"],
        "min_global_steps": row["extra_fields"].get("min_global_steps"),
        "max_global_steps": row["extra_fields"].get("max_global_steps"),
    }
    return f"{fields['uid']}_{fields['session_id']}_0", row, tag


def _objects(values: list) -> np.ndarray:
    """Return an array of these very objects: NumPy would make a matrix of equally long lists."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
