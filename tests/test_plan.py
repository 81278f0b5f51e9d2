"""The plan's arithmetic: exact counts, hand-made values, and what of its memory model a CPU can measure."""

import json
import math
import weakref
from dataclasses import replace

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch.distributed import destroy_process_group, init_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from rapo_verl import Refused
from rapo_verl.cli import app
from rapo_verl.method.head import head as fast_head
from rapo_verl.plan.card import GPUS, card
from rapo_verl.plan.cost import COPY_SHARE, HEAD_TIME, Assumed, cost, forward_flops, head_seconds
from rapo_verl.plan.head import head_of
from rapo_verl.plan.job import job_of, violations
from rapo_verl.plan.memory import (
    FUSED,
    FUSED_TOKENS,
    GIB,
    HEAD,
    activations,
    head,
    kv_bytes,
    layer_activation,
    memory,
    rank_parameters,
    trained_parameters,
)
from rapo_verl.plan.model import PUBLISHED, shape_of
from rapo_verl.plan.report import MARGIN, MICRO_STEP, larger_micro_batch, misfits, plan, show_plan
from rapo_verl.run.compose import compose_config

H100 = GPUS["h100"]


@pytest.fixture(scope="module", name="config")
def recipe():
    return compose_config(["experiment=qwen2.5_7b_rapo"])


@pytest.fixture(scope="module", name="job")
def recipe_job(config):
    return job_of(config)


@pytest.fixture(scope="module", name="shape")
def qwen_7b():
    return shape_of("Qwen/Qwen2.5-7B")


# --- parameters ---


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the published checkpoints hold
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-14B", 14_770_033_664),
        ("Qwen/Qwen2.5-32B", 32_763_876_352),
    ],
)
def test_published_shape_has_the_published_number_of_parameters(name, parameters):
    assert name in PUBLISHED and shape_of(name).parameters == parameters


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B"])
def test_ranks_together_hold_every_parameter_once_but_what_is_replicated(name):
    shape = shape_of(name)
    assert rank_parameters(shape) == shape.parameters
    norms = shape.layers * shape.layer_replicated + shape.hidden
    assert 2 * rank_parameters(shape, tensor=2) - norms == shape.parameters
    stages = [rank_parameters(shape, tensor=2, pipeline=4, stage=stage) for stage in range(4)]
    copy = shape.embedding if shape.tied else 0  # a shared head lives on the last stage too
    assert 2 * sum(stages) - norms == shape.parameters + copy
    assert shape.layer_replicated == 2 * shape.hidden


def test_kv_heads_are_repeated_beyond_their_number():
    shape = shape_of("Qwen/Qwen2.5-3B")  # 2 KV heads
    more = 4 * rank_parameters(shape, tensor=4) - (shape.parameters + 3 * (shape.layers * 2 + 1) * shape.hidden)
    assert more == shape.layers * 2 * 2 * 128 * (2048 + 1)  # k and v of 2 more heads of 128, weight and bias


def test_unknown_model_is_refused_with_what_to_give():
    with pytest.raises(ValueError, match="give a checkpoint folder"):
        shape_of("/no/such/model")


# --- memory ---


def test_states_of_the_7b_recipe_are_counted_by_hand(shape, job):
    held = memory(shape, job, gpu_bytes=80 * GIB)
    count = rank_parameters(shape, tensor=4)
    assert (job.tensor, job.data) == (4, 4)
    assert held.weights == 2 * count and held.gradients == 4 * count and held.reference == 2 * count
    assert held.optimizer == 12 * count / 4
    # Logits in bf16, and Megatron's fp32 of them, split over TP 4.
    assert held.head == (2 + 4) * 16384 * 152064 / 4
    # 28 layers' inputs of 3584 in bf16, split four ways by sequence parallel, and one layer in full twice.
    assert held.activations == 28 * 16384 * 3584 * 2 / 4 + 2 * 16384 * layer_activation(shape, job)
    assert layer_activation(shape, job) == (4 * 3584 * 2 + (2 * 3584 + 2 * 512 + 3 * 18944) * 2 + 4 * 28) / 4
    assert held.peak[0] == "rollout"


def test_kv_cache_of_a_token_is_counted_by_hand(shape, job):
    assert kv_bytes(shape, job) == 2 * 28 * 4 * 128 * 2
    assert kv_bytes(shape, replace(job, rollout_tensor=8)) == 2 * 28 * 1 * 128 * 2


def test_offload_moves_bytes_to_the_host_and_spares_the_rollout(shape, job):
    here, there = (
        memory(shape, replace(job, param_offload=off, optimizer_offload=off, reference_offload=off), gpu_bytes=80 * GIB)
        for off in (False, True)
    )
    assert there.host_per_node == 8 * (here.weights + here.optimizer + here.reference)
    assert here.rollout - there.rollout == here.weights + here.gradients + here.optimizer + here.reference
    assert here.update > there.update  # by the reference alone: all else is needed there
    assert here.update - there.update == pytest.approx(1.05 * here.reference)


def test_pipeline_keeps_micro_batches_in_flight_on_the_first_stage(shape, job):
    piped = replace(job, pipeline=4)
    first, last = (activations(shape, piped, stage=stage) for stage in (0, 3))
    block = 2 * 16384 * layer_activation(shape, job)
    assert first - block == 4 * (last - block)


def test_more_of_anything_never_needs_less(shape, job):
    update = memory(shape, job, gpu_bytes=80 * GIB).update
    for change in (
        {"micro_tokens": 20000}, {"recompute_layers": None}, {"recompute_layers": 4}, {"gpus": 8}, {"tensor": 2},
        {"sequence_parallel": False}, {"distributed_optimizer": False},
    ):  # fmt: skip
        assert memory(shape, replace(job, **change), gpu_bytes=80 * GIB).update > update, change


class LivePeak(TorchDispatchMode):
    """Counts the bytes of the tensors alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, out)
        return out

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key):
        self.now -= self.alive.pop(key)


TOKENS, VOCABULARY, HIDDEN = 256, 4096, 16


def measured_head(kind, backend, *, entropy, backward):
    """Return the peak of what an engine does with the logits, in bytes; torch.compile is off."""
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    label = torch.randint(0, VOCABULARY, (1, TOKENS))
    with LivePeak() as live, torch.set_grad_enabled(backward):
        logits = None if kind == "fused" else torch.nn.functional.linear(hidden, weight)
        if kind == "fused":
            total = sum(x.sum() for x in FusedLinearForPPO()(hidden, weight, label)[: 1 + entropy])
        elif kind == "fast":  # training/engine.py, run_head; Megatron returns fp32
            logits = logits.float() if backend == "megatron" else logits
            found = fast_head(logits.flatten(0, 1), label[0], gradient_in_place=True)
            total = found.log_prob.sum() + (found.entropy.sum() if entropy else 0.0)
        elif backend == "megatron":  # megatron/transformer_impl.py:1195 of verl 0.9.1, _lm_head_logits_processor
            logits = logits.float().div_(torch.full((1, TOKENS, 1), 0.9))
            kept = logits.clone() if entropy else logits
            total = vocab_parallel_entropy(logits).sum() if entropy else 0.0
            total = total + vocab_parallel_log_probs_from_logits(kept, label).sum()
            del kept
        else:  # fsdp/transformer_impl.py:1414, the entropy alone: flash-attn's cross-entropy is no CPU code
            total = torch.utils.checkpoint.checkpoint(
                torch_functional.entropy_from_logits_with_chunking, logits[0], TOKENS // 5, use_reentrant=False
            ).sum()
        del logits
        if backward:
            total.backward()
    return live.peak


def planned_head(job, kind, backend, *, entropy, backward):
    shape = replace(shape_of("Qwen/Qwen2.5-0.5B"), vocab=VOCABULARY)
    small = replace(job, backend=backend, tensor=1, micro_tokens=TOKENS, head=kind, entropy=entropy)
    return head(shape, small)[0 if backward else 1]


PASSES = [
    {"entropy": True, "backward": True},
    {"entropy": False, "backward": True},
    {"entropy": True, "backward": False},
]
UNIT = 4 * TOKENS * VOCABULARY


# Weight, hidden states and their gradients are 0.02 units here and nothing at Qwen's size; of ours, the chunks of
# torch's sweeps are up to 3/32 more, which Triton's do not make.
@pytest.mark.parametrize("backend", ["megatron", "fsdp2"])
@pytest.mark.parametrize("passes", PASSES)
def test_our_head_keeps_the_logits_and_nothing_else(job, backend, passes):
    excess = measured_head("fast", backend, **passes) - planned_head(job, "fast", backend, **passes)
    assert 0 <= excess < 0.12 * UNIT


@pytest.mark.parametrize("passes", PASSES)
def test_fused_kernels_keep_a_few_chunks(job, passes, monkeypatch):
    monkeypatch.setattr("test_plan.TOKENS", 2 * FUSED_TOKENS)
    monkeypatch.setattr("rapo_verl.plan.memory.CHUNKS", 1 << 20)  # the linear head's part of it is our own
    planned = planned_head(job, "fused", "fsdp2", **passes)
    assert measured_head("fused", "fsdp2", **passes) == pytest.approx(planned, rel=0.02)


def test_reference_without_logits_is_counted_by_its_chunks(job, shape):
    fused = replace(job, head="fused", micro_tokens=1 << 20, tensor=1)
    update, forward = head(shape, fused)
    assert update == FUSED[0] * 4 * 512 * 152064 and forward == (1 << 20) / 16 * 152064 * 2
    assert head(shape, replace(fused, micro_tokens=9216))[1] == FUSED[2] * 4 * 512 * 152064


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "fast"),
        ({"rapo.forward_kl.estimator": "topk"}, "fast"),
        ({"rapo.head": "verl"}, "verl"),
        ({"actor_rollout_ref.model.use_fused_kernels": True}, "fused"),
        ({"actor_rollout_ref.actor.calculate_sum_pi_squared": True}, "verl"),
        ({"rapo.forward_kl.coef": 0.0, "rapo.reference.phi_min": 1.0}, "verl"),
        ({"rapo.forward_kl.coef": 0.0, "rapo.reference.phi_min": 1.0, "rapo.head": "fast"}, "fast"),
        ({"rapo.forward_kl.coef": -1.0}, "verl"),  # refused elsewhere, with its reason
    ],
)
def test_plan_counts_the_head_that_the_run_will_have(config, settings, kind):
    changed = config.copy()
    for key, value in settings.items():
        OmegaConf.update(changed, key, value)
    assert head_of(changed) == job_of(changed).head == kind


def test_head_multiples_are_what_verls_functions_take(tmp_path, monkeypatch, job):
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state

    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        for passes in PASSES:
            measured = measured_head("verl", "megatron", **passes)
            assert measured == pytest.approx(planned_head(job, "verl", "megatron", **passes), abs=0.05 * UNIT)
        # Measured without the log-probs, whose gradient is one more bf16 tensor: half a unit.
        entropy_alone = measured_head("verl", "fsdp2", entropy=True, backward=True) / UNIT
        assert entropy_alone + 0.5 == pytest.approx(HEAD["fsdp2"][0], abs=0.3)
    finally:
        parallel_state.destroy_model_parallel()
        destroy_process_group()


def test_gradient_checkpointing_keeps_the_input_of_each_layer(job):
    layers, hidden, tokens = 6, 32, 40
    config = Qwen2Config(
        vocab_size=64, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = {}

    def pack(tensor):
        if tensor.dim() == 3 and tensor.shape[1:] == (tokens, hidden):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    assert out.last_hidden_state.requires_grad
    # Beside the layers' inputs: the last layer's output and what the final norm keeps of it.
    boundaries = layers * tokens * hidden * 4
    assert boundaries <= sum(kept.values()) <= boundaries + 4 * tokens * hidden * 4
    small = replace(job, weight_bytes=4, sequence_parallel=False, tensor=1, pipeline=1, micro_tokens=tokens)
    shape = replace(shape_of("Qwen/Qwen2.5-0.5B"), hidden=hidden, layers=layers)
    block = 2 * tokens * layer_activation(shape, small)
    assert activations(shape, small, stage=0) - block == boundaries


# --- LoRA ---


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
def test_adapters_have_as_many_parameters_as_peft_makes(tmp_path, targets):
    tiny = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path)
    made = peft.get_peft_model(Qwen2ForCausalLM(tiny), peft.LoraConfig(r=4, target_modules=targets))
    config = compose_config(["experiment=qwen2.5_7b_rapo_fsdp2"])
    model = config.actor_rollout_ref.model
    model.path, model.lora_rank, model.target_modules = str(tmp_path), 4, targets
    job = job_of(config)
    assert trained_parameters(shape_of(str(tmp_path)), job) == made.get_nb_trainable_parameters()[0]
    made.save_pretrained(tmp_path / "adapter")
    model.lora_rank, model.lora_adapter_path = 0, str(tmp_path / "adapter")
    assert job_of(config).lora.rank == 4
    assert trained_parameters(shape_of(str(tmp_path)), job_of(config)) == trained_parameters(
        shape_of(str(tmp_path)), job
    )


@pytest.mark.parametrize("experiment", ["qwen2.5_7b_rapo_fsdp2", "qwen2.5_7b_rapo"])
def test_lora_keeps_the_weights_and_little_else(shape, experiment):
    config = compose_config([f"experiment={experiment}"])
    full = memory(shape, job_of(config), gpu_bytes=H100.memory_gib * GIB)
    config.actor_rollout_ref.model.lora_rank = config.actor_rollout_ref.model.lora.rank = 16
    job = job_of(config)
    held = memory(shape, job, gpu_bytes=H100.memory_gib * GIB)
    share = trained_parameters(shape, job) / shape.parameters
    assert share == pytest.approx(40_370_176 / shape.parameters)  # rank 16 on the seven maps of 28 layers
    assert held.weights == full.weights and held.reference == 0
    assert held.gradients == full.gradients * share and held.optimizer == full.optimizer * share
    price, whole = (cost(shape, j, H100, Assumed(), kv_tokens=500_000) for j in (job, replace(job, lora=None)))
    assert price.update_flops == whole.update_flops - whole.forward_flops and price.checkpoint < whole.checkpoint


def test_weights_kept_in_half_precision_take_half(shape):
    config = compose_config(["experiment=qwen2.5_7b_rapo_fsdp2"])
    whole = memory(shape, job_of(config), gpu_bytes=H100.memory_gib * GIB)
    config.actor_rollout_ref.actor.fsdp_config.model_dtype = "bf16"
    half = memory(shape, job_of(config), gpu_bytes=H100.memory_gib * GIB)
    assert (half.weights, half.optimizer) == (whole.weights / 2, whole.optimizer / 2)


# --- other models, other cards ---

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("phi3", None),
        ("llama", None),
        ("qwen3", None),
        ("gemma2", None),
        ("olmo2", None),
        ("gpt_neox", None),
        ("qwen3_moe", "mixture of experts"),
        ("mixtral", "mixture of experts"),
        ("gpt2", "dense decoders"),
        ("mamba", "dense decoders"),
        ("bert", "dense decoders"),
    ],
)
def test_dense_decoders_are_planned_and_others_refused_with_the_reason(tmp_path, kind, said):
    own = {"hidden_size": 768, "num_hidden_layers": 2}
    sizes = own if kind in ("gpt2", "mamba") else {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    if said is not None:
        with pytest.raises(Refused, match=said):
            shape_of(str(tmp_path))
        return
    shape = shape_of(str(tmp_path))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.layers == 2 and 0 < 2 * shape.layer_parameters < shape.parameters
    assert 0 < shape.layer_replicated < shape.layer_parameters and len(shape.linears) >= 4


@pytest.mark.parametrize(
    ("answer", "memory_gib", "tflops"),
    [
        ("81559, NVIDIA H100 80GB HBM3", 79.6, 989),
        ("143771, NVIDIA H200\n143771, NVIDIA H200", 140.4, 989),
        ("40960, NVIDIA A100-SXM4-40GB", 40.0, 312),
        ("24564, NVIDIA GeForce RTX 4090", 24.0, 165),
        ("46068, NVIDIA L40S", 45.0, 362),
        ("16384, Some card of 2031", 16.0, None),
        ("81559, NVIDIA H100 80GB HBM3\n24564, NVIDIA GeForce RTX 4090", 24.0, 165),
    ],
)
def test_plan_takes_the_card_that_is_there(tmp_path, monkeypatch, config, capsys, answer, memory_gib, tflops):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    show_plan(config, as_json=True)
    gpu = json.loads(capsys.readouterr().out)["gpu"]
    assert gpu["memory_gib"] == pytest.approx(memory_gib, rel=0.01) and gpu["tflops"] == tflops
    show_plan(config)
    text = capsys.readouterr().out
    assert "the card here" in " ".join(text.split()) and ("not known for this card" in text) == (tflops is None)


@pytest.mark.parametrize(
    "script", ["exit 1", "echo No devices were found", "exec sleep 60", "trap '' TERM; while :; do sleep 1; done"]
)
def test_without_a_card_that_answers_an_h100_is_planned_and_said(tmp_path, monkeypatch, script):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("rapo_verl.plan.card.SMI_SECONDS", 0.5)
    assert card(None).memory_gib == 79.6 and "no card here" in card(None).name
    assert card("H200").memory_gib == 140.4


# --- cost ---


def test_forward_flops_are_two_per_parameter_and_token_and_attention(shape):
    matrices = shape.parameters - shape.embedding - (shape.layers * 2 + 1) * shape.hidden  # embedding and norms aside
    # Biases are counted with the matrices: below a ten-thousandth.
    assert forward_flops(shape, 1000, 0) == pytest.approx(2 * 1000 * matrices, rel=1e-4)
    assert forward_flops(shape, 10, 100) - forward_flops(shape, 10, 0) == 10 * 2 * 28 * 3584 * 100


def test_cost_follows_the_recipe(shape, job):
    price = cost(shape, job, H100, Assumed(), kv_tokens=500_000)
    assert price.responses == 8192 and price.tokens == 8192 * 1200
    assert price.update_flops == 4 * price.forward_flops  # forward, twice that backward, once more recomputed
    kept = cost(shape, replace(job, recompute_layers=None), H100, Assumed(), kv_tokens=500_000)
    assert kept.update_flops == 3 * price.forward_flops
    assert price.checkpoint == 14 * shape.parameters and price.disk == 4 * price.checkpoint
    # No faster than one response of the limit, which reads 15 GB of weights 8192 times.
    assert price.generation >= 8192 * 2 * shape.parameters / (3.35e12 * 0.6)
    half = cost(shape, replace(job, gpus=8), H100, Assumed(), kv_tokens=500_000)
    assert half.update == 2 * price.update and half.old_log_prob == 2 * price.old_log_prob


def test_head_adds_its_passes_over_the_logits_to_every_stage(shape, job):
    ours, verls = (
        cost(shape, replace(job, head=head), H100, Assumed(), kv_tokens=500_000) for head in ("fast", "verl")
    )
    copy = 2 * 2 * ours.tokens * 152064 / 16 / (3.35e12 * COPY_SHARE)
    (forward, update), (verls_forward, verls_update) = HEAD_TIME["fast"], HEAD_TIME["megatron"]
    assert ours.heads == pytest.approx((2 * forward + update) * copy)
    assert verls.update - ours.update == pytest.approx((verls_update - update) * copy)
    assert verls.reference - ours.reference == pytest.approx((verls_forward - forward) * copy)
    # What benchmarks/head.py measured on an H200 with 8192 rows, in milliseconds.
    h200 = replace(job, head="fast", gpus=1)
    assert [1e3 * x for x in head_seconds(shape, h200, GPUS["h200"], 8192)] == pytest.approx([1.1, 2.9], rel=0.1)


# --- what is illegal, and what fits ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 6}, "6 GPUs do not divide by TP x PP x CP = 4; nearest legal: 4"),
        ({"tensor": 3}, "tensor_model_parallel_size 3"),
        ({"tensor": 8}, "nearest legal: 4"),
        ({"pipeline": 3, "gpus": 24}, "does not divide 28 layers; nearest legal: 2"),
        ({"mini_batch": 100, "prompts": 100, "gpus": 12 * 4, "responses": 1}, "nearest legal: 96"),
        ({"mini_batch": 300}, "nearest legal: 256"),
        ({"micro_tokens": 9000}, "nearest legal: *_max_token_len_per_gpu=9216"),
        ({"least_tokens": 9000}, "a micro-batch holds 9000 tokens"),
        ({"rollout_tensor": 3}, "rollout.tensor_model_parallel_size 3"),
        ({"max_model_len": 4096}, "nearest legal: 9216"),
        ({"utilization": 1.2}, "between 0 and 1"),
        ({"backend": "fsdp2", "tensor": 1, "context": 3, "gpus": 12}, "nearest legal: 2"),
    ],
)
def test_each_violation_names_the_nearest_legal_value(shape, job, change, said):
    assert violations(job, shape) == []
    assert any(said in line for line in violations(replace(job, **change), shape))


def test_context_parallel_counts_towards_the_tokens_of_a_micro_batch(shape, job):
    assert violations(replace(job, micro_tokens=4608, context=2), shape) == []


def test_smallest_pass_must_hold_a_sequence_too(config, shape):
    changed = config.copy()
    changed.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu = 4096  # the update's stays at 16384
    job = job_of(changed)
    assert (job.micro_tokens, job.least_tokens) == (16384, 4096)
    assert any("a micro-batch holds 4096 tokens" in line for line in violations(job, shape))


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 4),  # three are kept, and the newest is written before the oldest goes
        ({"max_actor_ckpt_to_keep": None}, 10),
        ({"max_actor_ckpt_to_keep": 0, "save_freq": 30}, 4),
        ({"total_training_steps": 20}, 2),
        ({"total_training_steps": None}, 4),
    ],
)
def test_checkpoints_on_disk_are_all_where_no_number_is_kept(config, changes, most):
    job = job_of(OmegaConf.merge(config, {"trainer": changes}))
    assert job.checkpoints == most


def test_7b_on_16_cards_of_80_gib_fits_with_a_margin(config):
    made = plan(config, H100, gpus=16)
    assert made.fits and made.nearest == []
    assert max(made.memory.update, made.memory.rollout) < (1 - MARGIN) * H100.memory_gib * GIB


def test_larger_micro_batch_is_the_largest_that_fits(config, shape, job, capsys):
    show_plan(config, gpu="h100")
    key, _, told = capsys.readouterr().out.replace("\n", "").partition("up to ")[2].partition(" ")[0].partition("=")
    assert plan(compose_config(["experiment=qwen2.5_7b_rapo", f"{key}={told}"]), H100).fits
    more = replace(job, micro_tokens=int(told) + MICRO_STEP)
    assert misfits(more, memory(shape, more, gpu_bytes=H100.memory_gib * GIB), H100)


@pytest.mark.parametrize("backend", ["megatron", "fsdp2"])
def test_our_head_leaves_room_for_a_larger_micro_batch_than_verls(shape, job, backend):
    ours, verls = (
        larger_micro_batch(shape, replace(job, backend=backend, head=head), H100, 1200) for head in ("fast", "verl")
    )
    assert ours > 2 * verls


def test_no_larger_micro_batch_is_named_than_an_update_has_tokens_or_where_padding_adds_to_it(config, capsys):
    all_of_a_rank = 256 * 8 * 1200 / 4
    roomy = replace(H100, memory_gib=4000)
    assert all_of_a_rank <= plan(config, roomy).micro_tokens < all_of_a_rank + MICRO_STEP
    assert plan(config, replace(H100, memory_gib=20)).micro_tokens is None  # nothing fits
    for key in ("actor.use_dynamic_bsz", "model.use_remove_padding"):
        other = config.copy()
        OmegaConf.update(other, f"actor_rollout_ref.{key}", False)
        assert plan(other, roomy).micro_tokens is None
    show_plan(other, gpu="h100")
    assert "up to 7.7 times what is shown" in " ".join(capsys.readouterr().out.split())  # 9216 of 1200 tokens


def test_7b_on_2_cards_says_what_breaks_and_its_hint_fits(config):
    made = plan(config, H100, gpus=2)
    assert not made.fits
    assert any("2 GPUs do not divide by TP x PP x CP = 4; nearest legal: 4" in line for line in made.problems)
    assert any("update" in line and "optimizer states" in line for line in made.problems)
    (hint,) = made.nearest
    count, _, rest = hint.partition(" GPUs: ")
    changes = [part for part in rest.partition(" (")[0].split(", ") if "=" in part]
    mended = plan(compose_config(["experiment=qwen2.5_7b_rapo", *changes]), H100, gpus=int(count))
    assert mended.fits, mended.problems


def test_recipe_for_one_card_fits_24_gib():
    assert plan(compose_config(["experiment=qwen2.5_0.5b_1gpu"]), GPUS["rtx4090"]).fits


def test_hint_stays_on_the_same_cards_where_offload_is_enough(config):
    made = plan(config, GPUS["a100-40"], gpus=8)
    assert not made.fits
    first, *others = made.nearest
    assert first.startswith("8 GPUs: ") and "_offload=True" in first and "host memory" in first
    assert len(others) == 1 and others[0].startswith("16 GPUs: ") and "offload" not in others[0]
    fewer = config.copy()
    for key, value in (part.split("=") for part in first.partition(": ")[2].partition(" (")[0].split(", ")):
        OmegaConf.update(fewer, key, yaml.safe_load(value))
    fewer.actor_rollout_ref.ref.megatron.param_offload = fewer.actor_rollout_ref.actor.megatron.param_offload
    tokens = fewer.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    fewer.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu = tokens  # veRL's config follows by interpolation
    fewer.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu = tokens
    assert plan(fewer, GPUS["a100-40"], gpus=8).fits


def test_hint_names_no_tokens_where_micro_batches_are_cut_by_sequences(config):
    by_sequences = OmegaConf.merge(
        config, {"actor_rollout_ref": {"actor": {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 2}}}
    )
    made = plan(by_sequences, GPUS["a100-40"], gpus=8)
    assert made.nearest and not any("max_token_len" in hint for hint in made.nearest)


def test_cli_prints_json_and_exits_by_whether_it_fits():
    runner = CliRunner()
    done = runner.invoke(app, ["plan", "qwen2.5_7b_rapo", "--gpus", "16", "--gpu", "h100", "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["fits"] and said["job"]["gpus"] == 16
    assert runner.invoke(app, ["plan", "qwen2.5_7b_rapo", "--gpus", "2", "--gpu", "h100"]).exit_code == 1
    assert runner.invoke(app, ["plan", "qwen2.5_7b_rapo", "--gpu", "tpu"]).exit_code == 2
    assert runner.invoke(app, ["plan", "no_such_recipe"]).exit_code == 2


def test_plan_prices_the_validation_of_the_problems_that_are_here(config, shape, tmp_path, capsys):
    table = pa.table({"x": range(30)})
    pq.write_table(table, tmp_path / "aime24.parquet")
    here = OmegaConf.merge(config, {"data": {"val_files": str(tmp_path / "aime24.parquet")}})
    job = job_of(here)
    assert (job.validation, job.validations) == (30 * 16, 6)  # before the first step, and after 20, 40, ... 100
    made = plan(here, H100)
    # 480 of the 8192 responses of a step; here both take as long as the longest response.
    assert 0 < made.cost.validation <= made.cost.generation
    assert plan(here, H100, gpus=4).cost.validation < plan(here, H100, gpus=4).cost.generation
    show_plan(here, gpu="h100")
    assert "a validation of 480 responses, seconds; all 6, hours" in " ".join(capsys.readouterr().out.split())
    assert math.isnan(plan(config, H100).cost.validation)
    off = OmegaConf.merge(here, {"trainer": {"test_freq": -1, "val_before_train": False}})
    assert job_of(off).validations == 0
