"""Every Qwen2.5 recipe composes, passes our checks and veRL's, and dry-runs without a GPU; what they must not set."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed import destroy_process_group, init_process_group
from transformers import Qwen2Config

from rapo_verl import Refused
from rapo_verl.data.chat import messages
from rapo_verl.data.prepare import SCHEMA
from rapo_verl.method.config import rapo_config_from
from rapo_verl.run.compose import compose_config, experiments, recipe_dir
from rapo_verl.run.dry_run import show_dry_run
from rapo_verl.run.preflight import problems_of
from rapo_verl.toy.base_model import build_tokenizer

RECIPES = [name for name in experiments() if name.startswith("qwen2.5")]
# What SimpleRL-Zoo published for Qwen2.5-7B (arXiv 2503.18892 and its launch script).
PUBLISHED = {
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 8192,
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.optim.lr": 5e-7,
    "actor_rollout_ref.actor.clip_ratio": 0.2,
    "actor_rollout_ref.actor.entropy_coeff": 0.001,
    "actor_rollout_ref.actor.kl_loss_coef": 1e-4,
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
}


@pytest.fixture(scope="module", name="stand_ins")
def model_and_data_stand_ins(tmp_path_factory) -> list[str]:
    """Return overrides that put a config with Qwen's proportions and 1,024 problems in place of what is on the hub."""
    folder = tmp_path_factory.mktemp("stand_ins")
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    row = {
        "data_source": "stand-in", "prompt": messages("What is 1 + 1?", "qwen-boxed"), "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0},
    }  # fmt: skip
    for name, rows in (("simplerl-8k", 1024), ("aime24", 4)):
        pq.write_table(pa.Table.from_pylist([row] * rows, schema=SCHEMA), folder / f"{name}.parquet")
    return [
        f"actor_rollout_ref.model.path={folder / 'model'}", f"data_dir={folder}", f"run_dir={folder / 'run'}",
        "trainer.total_epochs=100",  # of one step each
    ]  # fmt: skip


def test_every_recipe_named_in_the_docs_is_there():
    methods = [
        f"{size}_{method}" for size in ("3b", "7b") for method in ("rapo", "rapo_answers", "grpo", "grpo_reverse_kl")
    ]
    assert sorted(RECIPES) == sorted(
        ["qwen2.5_0.5b_1gpu", *(f"qwen2.5_{m}{twin}" for m in methods for twin in ("", "_fsdp2"))]
    )


@pytest.mark.parametrize(("ranks", "executor"), [(1, "uni"), (2, "mp")])
def test_vllms_model_runs_in_its_core_only_where_one_process_is_enough(ranks, executor):
    ranks = f"actor_rollout_ref.rollout.tensor_model_parallel_size={ranks}"
    config = compose_config(["experiment=toy_rapo_cpu", ranks])
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend == executor


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_every_check_and_the_dry_run(name, stand_ins, capsys):
    config = compose_config([f"experiment={name}", *stand_ins])
    found = problems_of(config)
    if "answers" in name:  # of the real base, which is not here: all else is as it should be
        assert len(found) == 1 and "rapo reference-answers FOLDER" in found[0]
        return
    assert found == []
    show_dry_run(config)
    said = capsys.readouterr().out
    assert "data.train_files: 1024 rows" in said and "data.val_files: 4 rows" in said
    assert "fits, with more than 10% of the card to spare" in said


def test_7b_grpo_has_the_published_settings():
    config = compose_config(["experiment=qwen2.5_7b_grpo"])
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED} == PUBLISHED
    assert config.trainer.v1.trainer_mode == "sync"


@pytest.mark.parametrize("stem", ["qwen2.5_3b_{}", "qwen2.5_7b_{}", "qwen2.5_3b_{}_fsdp2", "qwen2.5_7b_{}_fsdp2"])
def test_methods_of_a_size_differ_in_the_method_only(stem):
    same = ["run_dir=/runs/same", "trainer.experiment_name=same"]
    methods = ("rapo", "rapo_answers", "grpo", "grpo_reverse_kl")
    trees = {m: OmegaConf.to_container(compose_config([f"experiment={stem.format(m)}", *same])) for m in methods}
    kinds = {}
    for method, tree in trees.items():
        group = tree["actor_rollout_ref"]
        rapo = rapo_config_from(tree.pop("rapo"))
        on = (rapo.enabled, rapo.forward_kl.samples_coef > 0)
        kinds[method] = (on, group["actor"].pop("kl_loss_type"), group["actor"].pop("kl_loss_coef") > 0)
        assert group["actor"].pop("use_kl_loss") is (method != "rapo_answers")  # which has no term with a reference
        del group["rapo"], tree["trainer"]["v1"]["trainer_mode"]
    assert all(tree == trees["rapo"] for tree in trees.values())
    assert kinds["grpo"] == ((False, False), "low_var_kl", True)
    assert kinds["grpo_reverse_kl"] == ((False, False), "k2", True)
    assert kinds["rapo"][0] == (True, False) and not kinds["rapo"][2]
    assert kinds["rapo_answers"][0] == (False, True) and not kinds["rapo_answers"][2]


@pytest.mark.parametrize("name", ["qwen2.5_3b_rapo", "qwen2.5_7b_grpo"])
def test_fsdp2_twin_has_the_same_data_rollout_and_optimizer(name):
    same = ["run_dir=/runs/same", "trainer.experiment_name=same"]
    one, twin = (compose_config([f"experiment={n}", *same]) for n in (name, f"{name}_fsdp2"))
    for key in ("data", "rapo", "reward", "trainer", "algorithm"):
        assert one[key] == twin[key]
    for key in ("n", "temperature", "seed", "response_length", "engine_kwargs"):
        assert one.actor_rollout_ref.rollout[key] == twin.actor_rollout_ref.rollout[key]
    for key in ("lr", "weight_decay", "betas", "clip_grad", "lr_warmup_steps"):
        assert one.actor_rollout_ref.actor.optim[key] == twin.actor_rollout_ref.actor.optim[key]


def test_dry_run_starts_nothing_and_exits_by_the_plan(stand_ins):
    env = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
    command = [sys.executable, "-m", "rapo_verl.cli", "train", "experiment=qwen2.5_7b_rapo", "--dry-run", *stand_ins]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data.val_files: 4 rows" in done.stdout
    assert not os.path.exists(stand_ins[2].partition("=")[2])


def test_prompt_over_the_limit_fails_the_dry_run(stand_ins, capsys):
    config = compose_config(["experiment=qwen2.5_7b_rapo", *stand_ins, "data.max_prompt_length=16"])
    with pytest.raises(Refused, match="longest prompt has"):
        show_dry_run(config)


STOP_IDS = """
import sys
from vllm import SamplingParams
from vllm.transformers_utils.config import try_get_generation_config
fields = try_get_generation_config(sys.argv[1], trust_remote_code=False).to_diff_dict()
params = SamplingParams(temperature=1.0, max_tokens=8)
params.update_from_generation_config(fields, int(sys.argv[2]))
print(sorted(params.all_stop_token_ids), params.temperature, params.max_tokens)
"""


def test_vllm_stops_a_base_model_at_the_end_of_a_turn():
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    config = compose_config(["experiment=qwen2.5_7b_rapo"])
    folder = config.actor_rollout_ref.rollout.engine_kwargs.vllm.generation_config
    assert folder == str(recipe_dir() / "generation" / "qwen2.5_base")
    # As vllm/v1/engine/input_processor.py does for each request; 151643 is what a base model's tokenizer stops at.
    done = subprocess.run([sys.executable, "-c", STOP_IDS, folder, "151643"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[151643, 151645] 1.0 8", done.stderr[-2000:]


def test_chunked_entropy_on_megatron_is_refused_because_verl_cannot_differentiate_it(tmp_path, stand_ins):
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy_with_chunking

    chunked = "actor_rollout_ref.actor.entropy_from_logits_with_chunking=true"
    # With our own head there is no such entropy to differentiate.
    assert problems_of(compose_config(["experiment=qwen2.5_7b_rapo", *stand_ins, chunked])) == []
    verls = [chunked, "rapo.head=verl"]
    (problem,) = problems_of(compose_config(["experiment=qwen2.5_7b_rapo", *stand_ins, *verls]))
    assert "entropy_from_logits_with_chunking" in problem
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        logits = torch.randn(1, 4, 8, requires_grad=True)
        whole = vocab_parallel_entropy_with_chunking(logits * 1, chunk_size=4)
        whole.sum().backward()
        # Once this passes upstream, the refusal can go.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            vocab_parallel_entropy_with_chunking(logits * 1, chunk_size=2).sum().backward()
    finally:
        parallel_state.destroy_model_parallel()
        destroy_process_group()
