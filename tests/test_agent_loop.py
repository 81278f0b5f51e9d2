import asyncio
import inspect

import numpy as np
import pytest
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

from rapo_verl.training.agent_loop import OneTurnLoop, Together, is_single_turn, queue_row, reward_batch


def output(prompt, response, **fields) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=prompt,
        response_ids=response,
        response_mask=[1] * len(response),
        response_logprobs=[-0.5] * len(response),
        num_turns=2,
        metrics=AgentLoopMetrics(),
        extra_fields={"global_steps": 3, "min_global_steps": 3, "max_global_steps": 3},
        **fields,
    )


def test_calls_that_arrive_together_are_one_call():
    seen = []

    async def work(items):
        seen.append(items)
        return [2 * item for item in items]

    async def main():
        together = Together(work)
        first = await asyncio.gather(*(together(i) for i in range(5)))
        return first, await together(9)

    assert asyncio.run(main()) == ([0, 2, 4, 6, 8], 18)
    assert seen == [[0, 1, 2, 3, 4], [9]]


def test_an_exception_goes_to_its_own_caller_and_one_of_the_call_to_all():
    async def some(items):
        return [ValueError(str(item)) if item == 1 else item for item in items]

    async def none(items):
        raise KeyError("all")

    async def ask(work):
        return await asyncio.gather(*(Together(work).__call__(i) for i in range(3)), return_exceptions=True)

    async def ask_one(work):
        together = Together(work)
        return await asyncio.gather(*(together(i) for i in range(3)), return_exceptions=True)

    kinds = [type(result) for result in asyncio.run(ask_one(some))]
    assert kinds == [int, ValueError, int]
    assert [type(result) for result in asyncio.run(ask_one(none))] == [KeyError] * 3
    assert [type(result) for result in asyncio.run(ask(none))] == [KeyError] * 3


def test_each_row_of_a_reward_batch_reads_as_its_sample_alone():
    fields = [
        {"data_source": "a", "reward_model": {"ground_truth": str(i)}, "raw_prompt": [{"role": "user"}]}
        for i in range(3)
    ]
    outputs = [output([5, 6], [7, 8, 9]), output([5], [7]), output([1, 2, 3, 4], [9, 8])]
    batch = reward_batch(list(zip(outputs, fields)))
    for i, sample in enumerate(outputs):
        item = batch[i : i + 1][-1:][0]  # as compute_score_batch and the naive manager take it
        responses = item.batch["responses"]
        length = item.batch["attention_mask"][-len(responses) :].sum()
        assert responses[:length].tolist() == sample.response_ids
        kept = item.batch["attention_mask"].bool()
        assert item.batch["input_ids"][kept].tolist() == sample.prompt_ids + sample.response_ids
        assert item.batch["position_ids"][kept].tolist() == list(range(int(kept.sum())))
        assert item.non_tensor_batch["reward_model"] == {"ground_truth": str(i)}
        assert item.non_tensor_batch["tool_extra_fields"] is sample.extra_fields
        assert item.non_tensor_batch["response_len"] == len(sample.response_ids)
    assert batch.non_tensor_batch["raw_prompt"].dtype == np.dtype(object)


def test_queue_row_is_what_verl_puts(monkeypatch):
    """veRL's own method, its queue replaced by a list: the same key, fields and tag."""
    put = []

    async def keep(keys, fields, tags, partition_id):
        put.append((keys, fields, tags, partition_id))

    cls = AgentLoopWorkerTQ.__ray_actor_class__
    monkeypatch.setattr(inspect.getmodule(cls).tq, "async_kv_batch_put", keep)

    class Bare(cls):
        def __init__(self):
            self.processor = None
            self.reward_loop_worker_handles = None
            self.distillation_enabled = False

    sample, fields = (
        output([5, 6], [7, 8, 9], reward_score=1.0),
        {"uid": "u", "session_id": 4, "global_steps": 3, "index": 2},
    )
    asyncio.run(Bare()._agent_loop_postprocess(sample.model_copy(deep=True), False, **fields))
    ((keys, rows, tags, partition),) = put
    key, row, tag = queue_row(sample, fields)
    assert (keys, tags, partition) == ([key], [tag], "train")
    assert set(row) == set(rows.keys())
    for name, value in row.items():
        theirs = rows[name][0]
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs.dtype and torch.equal(value, theirs), name
        else:
            assert value == getattr(theirs, "data", theirs), name


@pytest.mark.parametrize(
    "function, line",
    [
        (AgentLoopWorker._run_agent_loop, "agent_loop = hydra.utils.instantiate("),
        (AgentLoopWorker._run_agent_loop, "agent_loop.run(sampling_params, **kwargs)"),
        (AgentLoopBase.ct_build_initial_tokens, "return self._cap_text_prompt_length(prompt_ids)"),
        (AgentLoopBase.ct_merge_assistant_token, "self.continuous_token_builder.align_response_metadata("),
        (AgentLoopWorker._compute_score, 'extra_fields["reward_extra_info"] = result["reward_extra_info"]'),
        (SingleTurnAgentLoop.run, "= await self.ct_merge_assistant_token("),
    ],
)
def test_verl_still_does_what_is_done_together_here(function, line):
    source = inspect.getsource(inspect.unwrap(function))
    assert line in source


def test_a_loop_of_the_user_s_is_left_to_verl():
    assert is_single_turn("single_turn_agent") and not is_single_turn("tool_agent") and not is_single_turn("mine")
    # What a loop keeps between samples would leak: veRL's keeps these two numbers only.
    assert set(SingleTurnAgentLoop.__init__.__code__.co_names) == {
        "super",
        "__init__",
        "rollout_config",
        "prompt_length",
        "response_length",
    }
    assert issubclass(OneTurnLoop, SingleTurnAgentLoop)
