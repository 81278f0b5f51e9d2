"""Nothing takes a model for a Qwen: other families' shapes, templates and special tokens, on tiny random weights."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig
from typer.testing import CliRunner

from rapo_verl import Refused
from rapo_verl.cli import app
from rapo_verl.data.chat import end_of_turn
from rapo_verl.data.prepare import prepare
from rapo_verl.evaluation.prompts import load_prompts
from rapo_verl.evaluation.spec import read_problems
from rapo_verl.plan.model import shape_of
from rapo_verl.run.compose import compose_config
from rapo_verl.run.folder import read_metrics
from rapo_verl.run.preflight import problems_of
from rapo_verl.toy.base_model import build_tokenizer

VOCABULARY = 269  # a prime: no multiple of 8, nor of anything that might be sharded
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# Of each family: config, whether it has a pad token, chat template, what ends a turn, what ends a text.
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2,
    "max_position_embeddings": 512, "num_attention_heads": 3, "head_dim": 32, "num_key_value_heads": 1,
}  # fmt: skip
FAMILIES = {
    "llama": (
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        "{% for m in messages %}<|head|>{{ m['role'] }}\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant\n\n{% endif %}",
        "<|eot_id|>",
        "<|end_of_text|>",
    ),
    "mistral": (
        MistralConfig(**SMALL, tie_word_embeddings=False, sliding_window=None),
        REFUSING + "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
        "</s>",
        "</s>",
    ),
    "gemma": (
        GemmaConfig(
            **SMALL | {"num_attention_heads": 2}, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh"
        ),
        REFUSING
        + "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        "<eos>",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES, name="model")
def tiny_model(request, tmp_path_factory):
    """A checkpoint of the family without a pad token, its eos the end of a text as base models have it."""
    config, template, turn, text = FAMILIES[request.param]
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in dict.fromkeys((turn, text))])
    tokenizer.eos_token, tokenizer.chat_template, tokenizer.pad_token = text, template, None
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, None, None
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / request.param
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="problems")
def bare_problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    source = folder / "sums.jsonl"
    rows = [{"id": str(i), "question": f"{i} + {i * i} = ?", "answer": str(i + i * i)} for i in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: prepare(str(source), folder, name=name, prompt=name) for name in ("bare", "qwen-boxed")}


def overrides(model, problems, run_dir):
    return [
        "experiment=smollm2_135m_rapo_cpu", f"run_dir={run_dir}", f"actor_rollout_ref.model.path={model}",
        f"data.train_files={problems['bare']}", f"data.val_files={problems['bare']}", "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=2", "data.max_prompt_length=64",
        "data.max_response_length=8", "trainer.total_training_steps=2", "trainer.save_freq=2",
    ]  # fmt: skip


def test_responses_end_where_the_chat_template_ends_an_answer(model, problems):
    _, _, turn, text = FAMILIES[model.name]
    found, _ = read_problems([problems["bare"]])
    prompts, ends = load_prompts(model, found, 8)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert end_of_turn(tokenizer) == turn
    assert {tokenizer.convert_tokens_to_ids(turn), tokenizer.convert_tokens_to_ids(text)} <= set(ends)
    assert len(prompts) == 12


def test_a_system_message_that_the_template_refuses_is_refused_with_the_way_out(model, problems):
    found, _ = read_problems([problems["qwen-boxed"]])
    if model.name == "llama":
        assert load_prompts(model, found, 8)
        return
    with pytest.raises(Refused, match=r"--prompt boxed"):
        load_prompts(model, found, 8)


def test_plan_checks_and_inspection_take_the_family(model, problems, tmp_path):
    shape = shape_of(str(model))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert shape.parameters == sum(p.numel() for p in loaded.parameters())
    assert shape.tied == (model.name != "mistral") and (shape.vocab, shape.head_dim) == (VOCABULARY, 32)
    assert problems_of(compose_config(overrides(model, problems, tmp_path / "run"))) == []
    command = ["inspect-reference", str(model), "--prompts", str(problems["bare"]), "--rows", "2", "--tokens", "4"]
    done = CliRunner().invoke(app, [*command, "--top-k", "8", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_two_steps_and_an_evaluation_of_the_family(model, problems, tmp_path, request):
    if model.name == "gemma":
        # All steps run, but vLLM on a processor and the trainer differ by .002 in probability; why is not known yet.
        request.applymarker(pytest.mark.xfail(strict=True, reason="Gemma: sampler and trainer differ on a processor"))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rapo_verl.cli"]
    done = subprocess.run([*command, "train", *overrides(model, problems, run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = read_metrics(run)
    assert [step["step"] for step in steps] == [1, 2]
    # The policy is the reference before the first update, and sampler and trainer are one model.
    assert steps[0]["training/rollout_probs_diff_max"] < 1e-3
    wish = ["eval", "generate", "--model", run, "--data", problems["bare"], "--n", 2, "--max-tokens", 8]
    done = subprocess.run([*command, *map(str, wish), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
