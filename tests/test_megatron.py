"""RAPO on verl's own MegatronEngine, tensor and pipeline parallel, against plain transformers on one process."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine import EngineRegistry, MegatronEngine, MegatronEngineWithLMHead

from rapo_verl.compose import compose_config
from rapo_verl.config import RapoConfig, ReferenceConfig
from rapo_verl.plan.memory import rank_parameters
from rapo_verl.plan.model import shape_of
from rapo_verl.policy_loss import rapo_policy_loss
from rapo_verl.reweighting import reference_temperature, reward_to_phi
from rapo_verl.toy.base_model import build_tokenizer

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("mbridge", reason="mbridge is not installed")

HERE = Path(__file__).parent
PROMPTS, RESPONSES, REWARDS = (5, 3, 6, 4), (7, 9, 2, 5), (0.0, 1.0, 0.5, 0.0)
TEMPERATURE, LR = 0.9, 1e-3
OVERRIDES = [
    f"actor_rollout_ref.actor.optim.lr={LR}",
    "actor_rollout_ref.actor.optim.weight_decay=0",  # Megatron spares biases and norms, torch.optim does not
    "actor_rollout_ref.actor.optim.total_training_steps=10",
    "actor_rollout_ref.actor.entropy_coeff=0.05",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24",  # of 48 tokens: two micro-batches, so that a pipeline fills
    "data.max_prompt_length=8",
    "data.max_response_length=12",
]
# fp32 sums in another order over 64 hidden units, 2 layers and 264 tokens of the vocabulary.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def jagged(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def response_of(rows):
    """Return what the model said of the response's tokens: shifted by one."""
    return [row[p - 1 : -1] for row, p in zip(rows, PROMPTS)]


class Truth:
    """The same batch through plain transformers, with RAPO's loss and torch's AdamW."""

    def __init__(self, folder: Path, *, tied: bool):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
            architectures=["Qwen2ForCausalLM"],
        )  # fmt: skip
        self.model = Qwen2ForCausalLM(config).float()
        with torch.no_grad():  # as after training: biases and norms are not what they start from
            for name, parameter in self.model.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.folder = folder / "model"
        self.model.save_pretrained(self.folder)
        build_tokenizer().save_pretrained(self.folder)
        self.ids = [torch.randint(3, 259, (p + r,)) for p, r in zip(PROMPTS, RESPONSES)]
        scores = [torch.cat([torch.zeros(n - 1), torch.tensor([r])]) for n, r in zip(RESPONSES, REWARDS)]
        self.batch = TensorDict(
            {
                "input_ids": jagged(self.ids),
                "position_ids": jagged(torch.arange(len(row)) for row in self.ids),
                "prompts": jagged(row[:p] for row, p in zip(self.ids, PROMPTS)),
                "responses": jagged(row[p:] for row, p in zip(self.ids, PROMPTS)),
                "response_mask": jagged(torch.ones(r, dtype=torch.int64) for r in RESPONSES),
                "loss_mask": jagged(torch.ones(r, dtype=torch.int64) for r in RESPONSES),
                "rm_scores": jagged(scores),
            },
            batch_size=[len(self.ids)],
        )

    def outputs(self, temperatures):
        """Return log-probs of the next token and entropies, a row per sequence, nats."""
        log_probs, entropies = [], []
        for ids, temperature in zip(self.ids, temperatures):
            logits = self.model(ids[None]).logits[0] / temperature
            log_p = logits.log_softmax(-1)
            labels = torch.roll(ids, -1)
            log_probs.append(log_p.gather(-1, labels[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        return log_probs, entropies

    def update_batch(self):
        """Return the batch as the trainer completes it, off-policy so that every term of the loss acts."""
        torch.manual_seed(1)
        with torch.no_grad():
            said = response_of(self.outputs([TEMPERATURE] * 4)[0])
        noise = [0.1 * torch.randn_like(row) for row in said], [0.8 * torch.randn_like(row) for row in said]
        advantages = [torch.full((r,), a) for r, a in zip(RESPONSES, (-1.0, 1.5, 0.5, -0.7))]
        data = self.batch.copy()
        data["old_log_probs"], data["ref_log_prob"] = (jagged(map(torch.add, said, part)) for part in noise)
        data["advantages"] = jagged(advantages)
        return data

    def update(self, config, rapo):
        """Return loss, metrics, gradients and weights of one step."""
        data = self.update_batch()
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(RESPONSES), global_batch_size=4)
        log_probs, entropies = self.outputs([TEMPERATURE] * 4)
        output = {"log_probs": jagged(log_probs), "entropy": jagged(entropies)}
        loss, metrics = rapo_policy_loss(config, output, data, rapo=rapo)
        loss.backward()
        named = dict(self.model.named_parameters())
        gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        torch.optim.AdamW(self.model.parameters(), LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).step()
        return loss, metrics, norm, gradients, {name: parameter.detach() for name, parameter in named.items()}


def run_ranks(truth: Truth, folder: Path, *, tensor: int, pipeline: int) -> list[dict]:
    """Return what each rank of verl's engine wrote."""
    torch.save(truth.batch, folder / "batch.pt")
    torch.save(truth.update_batch(), folder / "update.pt")
    spec = {
        "model": str(truth.folder), "tensor": tensor, "pipeline": pipeline, "temperature": TEMPERATURE,
        "batch": str(folder / "batch.pt"), "update": str(folder / "update.pt"), "out": str(folder),
        "overrides": OVERRIDES,
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(tensor * pipeline)
    env = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # what verl registers its Megatron engine for
        "VERL_ENGINE_VENDOR": "nvidia",  # and we ours
        "TORCHDYNAMO_DISABLE": "1",  # the entropy would take longer to compile than to run
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(ranks)),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
    }
    logs = [folder / f"rank{rank}.log" for rank in ranks]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "megatron_cpu.py"), str(folder / "spec.json")],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for rank, log in zip(ranks, logs)
    ]  # fmt: skip
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(ranks), "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in ranks]


# Two processes of half a minute each on an idle machine: `make test` leaves them to CI (.ci/run).
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "pp2")]


@pytest.fixture(scope="module", name="case", params=SLOW)
def engine_and_truth(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tensor, pipeline = (2, 1) if request.param == "tp2" else (1, 2)
    truth = Truth(folder, tied=tensor == 2)  # as 3B and as 7B
    ranks = run_ranks(truth, folder, tensor=tensor, pipeline=pipeline)
    # verl takes outputs from tensor rank 0 of the last stage.
    return truth, ranks, ranks[-1] if pipeline == 2 else ranks[0], (tensor, pipeline)


def rows_of(nested):
    return list(nested.unbind())


def test_reference_pass_has_a_temperature_per_sample(case):
    truth, _, out, _ = case
    reference = ReferenceConfig(phi_min=0.9)  # the recipe's
    phi = reward_to_phi(torch.tensor(REWARDS), reference)
    temperatures = reference_temperature(phi, temperature=TEMPERATURE, reading="token")
    assert len(set(temperatures.tolist())) == 3
    with torch.no_grad():
        expected = response_of(truth.outputs(temperatures)[0])
        plain = response_of(truth.outputs([TEMPERATURE] * 4)[0])
    got = response_of(rows_of(out["ref_log_prob"]["log_probs"]))
    for row, want in zip(got, expected):
        torch.testing.assert_close(row, want, **CLOSE)
    # The test would be empty if reweighting did nothing; a reward of 1 leaves the reference as it is.
    assert not torch.allclose(got[0], plain[0], **CLOSE)
    torch.testing.assert_close(got[1], plain[1], **CLOSE)


def test_log_prob_pass_gives_transformers_log_probs_and_entropy(case):
    truth, _, out, _ = case
    with torch.no_grad():
        log_probs, entropies = truth.outputs([TEMPERATURE] * 4)
    for name, expected in (("log_probs", log_probs), ("entropy", entropies)):
        for row, want in zip(response_of(rows_of(out["old_log_prob"][name])), response_of(expected)):
            torch.testing.assert_close(row, want, **CLOSE)


def test_update_has_the_same_loss_gradients_and_weights(case):
    truth, _, out, _ = case
    group = compose_config(["experiment=qwen2.5_7b_rapo", *OVERRIDES]).actor_rollout_ref
    group.actor.use_kl_loss = False
    rapo = RapoConfig(reference=ReferenceConfig(phi_min=0.9))
    before = {name: p.detach().clone() for name, p in truth.model.named_parameters()}
    loss, metrics, norm, gradients, weights = truth.update(omega_conf_to_dataclass(group.actor), rapo)
    said = tu.get(out["update"], "metrics")
    assert said["loss"] == pytest.approx([loss.item()], rel=1e-4)
    assert said["grad_norm"] == pytest.approx([norm.item()], rel=1e-4)
    assert norm > 1  # so that clipping acts too
    for name in ("rapo/forward_kl", "rapo/reference_mass_sampled", "rapo/log_rho_mean"):
        assert float(torch.as_tensor(said[name]).sum()) == pytest.approx(float(metrics[name].aggregate()), rel=1e-4)
    assert out["weights"].keys() == before.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(out["gradients"][name], gradient, rtol=1e-3, atol=1e-5 * norm.item())
        # Adam's first step moves a weight by lr whatever its gradient's size: where that is rounding, so is the sign.
        sure = gradient.abs() > 1e-4 * norm
        torch.testing.assert_close(out["weights"][name][sure], weights[name][sure], rtol=0, atol=LR * 1e-2)
        assert (weights[name] - before[name])[sure].abs().min() > 0.5 * LR


def test_exported_weights_reload_as_a_hugging_face_model(case):
    truth, _, out, _ = case
    model = Qwen2ForCausalLM(truth.model.config).float()
    missing, unexpected = model.load_state_dict(out["weights"], strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    for ids in truth.ids:
        with torch.no_grad():
            moved = model(ids[None]).logits
        assert torch.isfinite(moved).all()


def test_gradient_that_is_not_finite_stops_every_rank_before_the_optimizer_steps(case):
    _, ranks, out, _ = case
    assert all("update 2" in rank["refused"] and "not finite" in rank["refused"] for rank in ranks)
    assert re.search(r"losses of the micro-batches: \[(nan, \S+|\S+, nan)\]", out["refused"])
    for name, weight in out["weights"].items():
        assert torch.equal(out["weights_after_refusal"][name], weight), name


def test_verl_still_steps_on_any_gradient_and_looks_engines_up_as_we_register_ours(monkeypatch):
    import rapo_verl.engines  # noqa: F401
    from rapo_verl.megatron import GuardedMegatronEngine

    step = " ".join(inspect.getsource(MegatronEngine.optimizer_step).split())
    assert "update_successful, grad_norm, num_zeros_in_grad = self.optimizer.step()" in step
    assert "finite" not in step
    parameters = ["self", "data", "loss_function", "forward_only"]
    assert list(inspect.signature(MegatronEngine.forward_backward_batch).parameters) == parameters
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert issubclass(EngineRegistry.get_engine_cls("language_model", "megatron"), GuardedMegatronEngine)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "metax")
    assert EngineRegistry.get_engine_cls("language_model", "megatron") is MegatronEngineWithLMHead


def test_plan_counts_the_parameters_of_each_rank(case):
    truth, ranks, _, (tensor, pipeline) = case
    shape = shape_of(str(truth.folder))
    planned = [rank_parameters(shape, tensor=tensor, pipeline=pipeline, stage=stage) for stage in range(pipeline)]
    assert [rank["count"] for rank in ranks] == [planned[rank // tensor] for rank in range(tensor * pipeline)]
