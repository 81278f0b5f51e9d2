"""The head without logits: what the head with logits gives, in chunks, in shards, and in veRL's FSDP engine."""

import json
import os
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_head_engine import RESPONSES, VOCABULARY, Batch, engine, rows_of
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.utils import tensordict_utils as tu

from rapo_verl.method import linear_head as linear_module
from rapo_verl.method.config import RapoConfig
from rapo_verl.method.head import head
from rapo_verl.method.linear_head import linear_head
from rapo_verl.run.combinations import refused_combinations
from rapo_verl.run.compose import compose_config
from rapo_verl.run.preflight import problems_of
from rapo_verl.training.engine import check_linear

QWEN2 = {"model_type": "qwen2", "vocab_size": 264}
ROWS, WIDTH, COLUMNS = 11, 6, 38
# fp64 sums of 38 terms of size up to 1e2; in fp32 1.2e-7 a step.
EXACT, SINGLE = {"rtol": 1e-11, "atol": 1e-12}, {"rtol": 1e-5, "atol": 1e-5}


def case(dtype=torch.float64, rows=ROWS, columns=COLUMNS, width=WIDTH) -> tuple[torch.Tensor, ...]:
    """Return hidden states, weight, labels and a temperature for each row."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, dtype=torch.float64, generator=generator) for n in (rows, columns))
    labels = torch.randint(0, columns, (rows,), generator=generator)
    temperature = 0.5 + torch.rand(rows, dtype=torch.float64, generator=generator)
    return hidden.to(dtype), (2 * weight).to(dtype), labels, temperature


def chunks_of(rows: int):
    """Let the head take so many tokens at a time."""
    return mock.patch.object(linear_module, "chunk_size", lambda *_: rows)


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_it_is_the_softmax_of_the_product_at_each_rows_temperature(chunk_rows):
    hidden, weight, labels, temperature = case()
    with chunks_of(chunk_rows):
        log_prob, entropy = linear_head(hidden, weight, labels, temperature=temperature)
    log_p = torch.log_softmax(hidden @ weight.T / temperature[:, None], -1)
    torch.testing.assert_close(log_prob, log_p.gather(1, labels[:, None])[:, 0], **EXACT)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_agrees_with_the_head_on_the_logits_of_the_models_own_product(dtype):
    hidden, weight, labels, temperature = case(dtype)
    want = head(hidden @ weight.T, labels, temperature=temperature)
    with chunks_of(4):
        log_prob, entropy = linear_head(hidden, weight, labels, temperature=temperature)
    assert log_prob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_prob, want.log_prob, **SINGLE)
    torch.testing.assert_close(entropy, want.entropy, **SINGLE)


def test_large_logits_do_not_overflow():
    hidden, weight, labels, _ = case()
    log_prob, entropy = linear_head(1e4 * hidden, weight, labels)
    want = torch.log_softmax(1e4 * hidden @ weight.T, -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_prob, want, **EXACT)
    assert (entropy >= 0).all() and (entropy < 1e-6).any()


def test_rows_that_do_not_count_may_hold_anything():
    hidden, weight, labels, temperature = case()
    want = linear_head(hidden, weight, labels, temperature=temperature)
    rows = torch.ones(ROWS, dtype=torch.bool)
    rows[3], hidden[3], labels[3], temperature[3] = False, torch.nan, -100, 0
    for found, whole in zip(linear_head(hidden, weight, labels, temperature=temperature, rows=rows), want):
        torch.testing.assert_close(found[rows], whole[rows], **EXACT)
        assert found[3] == 0


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch):
    from benchmarks.head import Memory

    hidden, weight, labels, temperature = case(torch.float32, rows=1024, columns=8192)
    monkeypatch.setattr(linear_module, "CHUNK_ELEMENTS", 0)  # as with more tokens
    with Memory() as memory:
        linear_head(hidden, weight, labels, temperature=temperature.float())
    assert memory.peak <= 0.10 * hidden.shape[0] * weight.shape[0] * 4  # three chunks, each 1/32 of it


def half(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        hidden, weight, labels, temperature = case()
        labels[:4] = torch.tensor([0, COLUMNS // 2 - 1, COLUMNS // 2, COLUMNS - 1])  # the shards' edges
        with chunks_of(4):
            whole = linear_head(hidden, weight, labels, temperature=temperature)
            shard = linear_head(hidden, weight.chunk(2)[rank], labels, temperature=temperature, group=dist.group.WORLD)
        torch.save((whole, shard), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_shards_of_the_vocabulary_give_what_one_does(tmp_path):
    mp.spawn(half, (os.fspath(tmp_path),), nprocs=2)
    for rank in range(2):
        for whole, shard in zip(*torch.load(tmp_path / f"{rank}.pt")):
            torch.testing.assert_close(shard, whole, **EXACT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, w, y, t: (h[:, :-1], w, y, t), r"hidden states \(11, 5\) need a weight \(vocabulary, 5\)"),
        (lambda h, w, y, t: (h, w, y[:-1], t), r"labels \(11,\), not \(38, 6\) and \(10,\)"),
        (lambda h, w, y, t: (h, w, y.index_fill(0, torch.tensor(2), COLUMNS), t), "row 2 has a label outside"),
        (lambda h, w, y, t: (h, w, y, t.index_fill(0, torch.tensor(3), 0)), "row 3 has a temperature"),
        (lambda h, w, y, t: (h.index_fill(0, torch.tensor(4), torch.nan), w, y, t), "row 4 has non-finite logits"),
        (lambda h, w, y, t: (h, w.index_fill(0, torch.tensor(0), torch.inf), y, t), "row 0 has non-finite logits"),
    ],
)
def test_bad_input_is_refused(change, said):
    hidden, weight, labels, temperature = change(*case())
    with pytest.raises(ValueError, match=said):
        linear_head(hidden, weight, labels, temperature=temperature)


# --- in the engine ---


def model(**changes) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, attn_implementation="eager", **changes,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def reference_pass(made, data) -> dict:
    with torch.no_grad():
        inputs, output_args = made.prepare_model_inputs(data)
        return made.prepare_model_outputs(made.module(**inputs, use_cache=False), output_args, data, None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("remove_padding", [True, False])
def test_the_engine_gives_verls_log_probs_at_a_temperature_for_each_sample(remove_padding, tied):
    made, batch = engine(), Batch()
    made.module = model(tie_word_embeddings=tied)
    temperature = 0.7 / batch.phi
    data = batch.data(remove_padding=remove_padding, temperature=temperature)
    want = reference_pass(made, data)
    made.use_linear_head()
    fused = data.copy()
    tu.assign_non_tensor(fused, use_fused_kernels=True)
    got = reference_pass(made, fused)
    assert got.keys() == {"log_probs"}
    assert got["log_probs"].offsets().tolist() == want["log_probs"].offsets().tolist()
    torch.testing.assert_close(rows_of(got["log_probs"]), rows_of(want["log_probs"]), **SINGLE)
    assert len(rows_of(got["log_probs"])) == sum(RESPONSES)


@pytest.mark.parametrize("remove_padding", [True, False])
def test_verls_fused_kernels_refuse_what_this_is_for(remove_padding):
    # When veRL takes a temperature for each sample itself, use_linear_head can go.
    data = Batch().data(remove_padding=remove_padding, temperature=torch.tensor([0.7, 0.8, 0.9]))
    tu.assign_non_tensor(data, use_fused_kernels=True)
    with pytest.raises(AssertionError, match="does not support per sample temperature"):
        engine().prepare_model_inputs(data)


@pytest.mark.parametrize(
    ("config", "bias", "said"),
    [
        ({}, torch.zeros(3), "has a bias"),
        ({"final_logit_softcapping": 30.0}, None, "has final_logit_softcapping"),
        ({"logits_scaling": 8.0}, torch.zeros(3), "has a bias and logits_scaling"),
    ],
)
def test_a_head_that_is_more_than_a_product_is_refused(config, bias, said):
    with pytest.raises(ValueError, match=said):
        check_linear(Qwen2Config(**config), bias)
    check_linear(Qwen2Config(final_logit_softcapping=None, logit_scale=1.0), None)


@pytest.mark.parametrize(
    ("tied", "override", "said"),
    [
        (True, None, None),
        (True, "actor_rollout_ref.model.lora_rank=4", "which LoRA does not make"),
        (True, "actor_rollout_ref.ref.strategy=torchtitan", "not on actor_rollout_ref.ref.strategy=torchtitan"),
        (False, None, "fails in veRL 0.9.1 on fsdp2"),
        (False, "rapo.reference.phi_min=1", "fails in veRL 0.9.1 on fsdp2"),
    ],
)
def test_fused_kernels_are_refused_only_where_there_is_no_such_head(tmp_path, tied, override, said):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"tie_word_embeddings": tied}))
    model, more = "actor_rollout_ref.model", [override] if override else []
    config = compose_config(
        ["experiment=toy_rapo_cpu", f"{model}.path={tmp_path}", f"{model}.use_fused_kernels=true", *more]
    )
    found = [problem for problem in problems_of(config) if "use_fused_kernels" in problem]
    assert [said in problem for problem in found] == ([True] if said else []), found


def test_a_hub_s_model_is_looked_up_as_a_folder_is():
    # Untied, and known without a network; its config is no file on this machine.
    arguments = ["experiment=qwen2.5_7b_rapo_fsdp2", "actor_rollout_ref.model.use_fused_kernels=true"]
    config = compose_config(arguments)
    assert not Path(config.actor_rollout_ref.model.path).exists()
    assert any(
        "fails in veRL 0.9.1 on fsdp2" in problem
        for problem in refused_combinations(config, RapoConfig(), {"tie_word_embeddings": False})
    )


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [("final_logit_softcapping", 30.0, True), ("logit_scale", 0.06, True), ("logit_scale", 1.0, False)],
)
def test_a_model_that_changes_its_logits_is_refused_before_the_run(tmp_path, name, value, refused):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"tie_word_embeddings": True, name: value}))
    model = "actor_rollout_ref.model"
    config = compose_config(["experiment=toy_rapo_cpu", f"{model}.path={tmp_path}", f"{model}.use_fused_kernels=true"])
    assert any(f"not with the model's {name}" in problem for problem in problems_of(config)) == refused
