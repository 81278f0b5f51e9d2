"""RAPO on verl's own MegatronEngine, tensor and pipeline parallel, against plain transformers on one process."""

import copy
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
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine import EngineRegistry, MegatronEngine, MegatronEngineWithLMHead

from rapo_verl.evaluation.engines import CPU_ENVIRONMENT
from rapo_verl.method.config import PER_TOKEN_ESTIMATORS, ForwardKLConfig, RapoConfig, ReferenceConfig
from rapo_verl.method.reweighting import reward_to_phi
from rapo_verl.plan.memory import rank_parameters
from rapo_verl.plan.model import shape_of
from rapo_verl.run.compose import compose_config
from rapo_verl.run.export import resolve_model
from rapo_verl.toy.base_model import build_tokenizer
from rapo_verl.training.engine import FIELDS
from rapo_verl.training.loss import rapo_policy_loss

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytest.importorskip("mbridge", reason="mbridge is not installed")

HERE = Path(__file__).parent
PROMPTS, RESPONSES, REWARDS = (5, 3, 6, 4), (7, 9, 2, 5), (0.0, 1.0, 0.5, 0.0)
TEMPERATURE, LR = 0.9, 1e-3
OVERRIDES = [
    f"actor_rollout_ref.actor.optim.lr={LR}",
    "actor_rollout_ref.actor.optim.weight_decay=0",  # Megatron spares biases and norms, torch.optim does not
    "actor_rollout_ref.actor.optim.total_training_steps=10",
    "actor_rollout_ref.actor.optim.lr_decay_style=linear",  # so that a resumed run must find its place in it
    "actor_rollout_ref.actor.entropy_coeff=0.05",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24",  # of 48 tokens: two micro-batches, so that a pipeline fills
    "data.max_prompt_length=8",
    "data.max_response_length=12",
]
# The estimators that need RAPO's head: the reference names K tokens, or all.
K = 16
ESTIMATORS = {
    name: [f"rapo.forward_kl.estimator={name}", f"rapo.reference.top_k={K}", "rapo.reference.phi_min=0.6"]
    for name in PER_TOKEN_ESTIMATORS
}
# fp32 sums in another order over 128 hidden units, 2 layers and 264 tokens of the vocabulary.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def jagged(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def response_of(rows):
    """Return what the model said of the response's tokens: shifted by one."""
    return [row[p - 1 : -1] for row, p in zip(rows, PROMPTS)]


def qwen(*, tied: bool) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=264, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.15,
    )  # fmt: skip


def llama() -> PretrainedConfig:
    """Return SmolLM2-135M's heads: 9 and 3 of KV, which no power of two divides, of 32 dimensions (vLLM's least)."""
    return LlamaConfig(
        vocab_size=264, hidden_size=288, intermediate_size=96, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip


class Truth:
    """The same batch through plain transformers, with RAPO's loss and torch's AdamW."""

    def __init__(self, folder: Path, shape: PretrainedConfig):
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(shape).float()
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

    def distributions(self, temperatures, model=None):
        """Return log p of every next token, (length, vocabulary) per sequence, nats."""
        logits = [(model or self.model)(ids[None]).logits[0] for ids in self.ids]
        return [(z / temperature).log_softmax(-1) for z, temperature in zip(logits, temperatures)]

    def outputs(self, temperatures, model=None):
        """Return log-probs of the next token and entropies, a row per sequence, nats."""
        distributions = self.distributions(temperatures, model)
        sampled = [p.gather(-1, ids.roll(-1)[:, None])[:, 0] for p, ids in zip(distributions, self.ids)]
        return sampled, [-(p.exp() * p).sum(-1) for p in distributions]

    def forward_kl(self, rapo, model):
        """Return the KL over the reference's k likeliest tokens and one outcome for the rest, by definition."""
        found, k = [], K if rapo.forward_kl.estimator == "topk" else 264
        with torch.no_grad():
            references = self.distributions(reference_temperatures(rapo.reference))
        for log_q, log_p in zip(references, self.distributions([TEMPERATURE] * 4, model)):
            ids = log_q.topk(k).indices
            q, p = log_q.exp(), log_p.exp()
            named = (q * (log_q - log_p)).gather(-1, ids).sum(-1)
            rest = torch.ones_like(q).scatter(-1, ids, 0)
            if k < 264:
                tails = [(x * rest).sum(-1) for x in (q, p)]
                named = named + tails[0] * (tails[0] / tails[1]).log()
            found.append(named)
        return found

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
        data["rapo_phi"] = reward_to_phi(torch.tensor(REWARDS), ReferenceConfig())  # as the reference pass returns it
        return data

    def update(self, config, rapo):
        """Return loss, metrics, gradient norm, gradients and weights of one step."""
        data, model = self.update_batch(), copy.deepcopy(self.model)
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(RESPONSES), global_batch_size=4)
        log_probs, entropies = self.outputs([TEMPERATURE] * 4, model)
        output = {"log_probs": jagged(log_probs), "entropy": jagged(entropies)}
        if rapo.forward_kl.estimator in PER_TOKEN_ESTIMATORS:
            output["forward_kl"] = jagged(self.forward_kl(rapo, model))
        loss, metrics = rapo_policy_loss(config, output, data, rapo=rapo)
        loss.backward()
        named = dict(model.named_parameters())
        gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).step()
        return loss, metrics, norm, gradients, {name: parameter.detach() for name, parameter in named.items()}


def reference_temperatures(reference: ReferenceConfig) -> torch.Tensor:
    """Return the temperature of each response's reference."""
    phi = reward_to_phi(torch.tensor(REWARDS), reference)
    return TEMPERATURE / phi


def run_ranks(truth: Truth, folder: Path, *, tensor: int, pipeline: int, resume: Path | None = None) -> list[dict]:
    """Return what each rank of verl's engine wrote: of everything, or of going on from a checkpoint."""
    torch.save(truth.batch, folder / "batch.pt")
    torch.save(truth.update_batch(), folder / "update.pt")
    spec = {
        "model": str(truth.folder), "tensor": tensor, "pipeline": pipeline, "temperature": TEMPERATURE,
        "batch": str(folder / "batch.pt"), "update": str(folder / "update.pt"), "out": str(folder),
        "overrides": OVERRIDES, "estimators": ESTIMATORS, "resume": resume is not None,
        "checkpoint": str(resume or folder / CHECKPOINT),
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


# Processes of half a minute each on an idle machine: `make test` leaves them to CI (.ci/run).
# Tied weights as 3B, its own head as 7B; each goes on from its checkpoint in another layout.
LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2pp2": (2, 2), "tp1": (1, 1), "tp3": (3, 1)}
SHAPES = {"tp2": qwen(tied=True), "pp2": qwen(tied=False), "tp2pp2": qwen(tied=True), "tp3": llama()}
OTHER = {"tp2": "tp1", "pp2": "tp2", "tp2pp2": "pp2", "tp3": "tp1"}
CHECKPOINT = "global_step_1/actor"


class Case:
    """What all ranks of a layout wrote, and the truth."""

    def __init__(self, folder: Path, name: str):
        self.name, self.folder, self.truth = name, folder, Truth(folder, SHAPES[name])
        self.tensor, self.pipeline = LAYOUTS[name]
        self.ranks = run_ranks(self.truth, folder, tensor=self.tensor, pipeline=self.pipeline)
        # verl takes outputs from tensor rank 0 of the last stage.
        self.out = self.ranks[self.tensor * (self.pipeline - 1)]

    def resumed(self) -> dict:
        """Return what the rank with outputs wrote of going on in the other layout."""
        tensor, pipeline = LAYOUTS[OTHER[self.name]]
        folder = self.folder / "resumed"
        folder.mkdir()
        checkpoint = self.folder / CHECKPOINT
        ranks = run_ranks(self.truth, folder, tensor=tensor, pipeline=pipeline, resume=checkpoint)
        return ranks[tensor * (pipeline - 1)]


@pytest.fixture(scope="module", name="case", params=[pytest.param(name, marks=pytest.mark.slow) for name in SHAPES])
def engine_and_truth(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def rows_of(nested):
    return list(nested.unbind())


def assert_rows_close(got, want):
    for row, expected in zip(response_of(rows_of(got)), response_of(want)):
        torch.testing.assert_close(row, expected, **CLOSE)


def test_engine_is_the_one_that_is_registered(case):
    assert [rank["engine"][0] for rank in case.ranks] == ["RapoMegatronEngine"] * len(case.ranks)


def test_reference_pass_has_a_temperature_per_sample(case):
    temperatures = reference_temperatures(ReferenceConfig(phi_min=0.9))  # the recipe's
    assert len(set(temperatures.tolist())) == 3
    with torch.no_grad():
        expected = case.truth.outputs(temperatures)[0]
        plain = response_of(case.truth.outputs([TEMPERATURE] * 4)[0])
    got = case.out["ref_log_prob"]["log_probs"]
    assert_rows_close(got, expected)
    # The test would be empty if reweighting did nothing; a reward of 1 leaves the reference as it is.
    got = response_of(rows_of(got))
    assert not torch.allclose(got[0], plain[0], **CLOSE)
    torch.testing.assert_close(got[1], plain[1], **CLOSE)


def test_reference_pass_without_logits_gives_the_same_on_the_response(case):
    with torch.no_grad():
        expected = case.truth.outputs(reference_temperatures(ReferenceConfig(phi_min=0.9)))[0]
    got = rows_of(case.out["linear_ref_log_prob"]["log_probs"])
    assert all((row[: p - 1] == 0).all() for row, p in zip(got, PROMPTS))  # the prompt is not computed: it was ours
    for row, want in zip(response_of(got), response_of(expected)):
        torch.testing.assert_close(row, want, **CLOSE)


def test_log_prob_pass_gives_transformers_log_probs_and_entropy(case):
    with torch.no_grad():
        log_probs, entropies = case.truth.outputs([TEMPERATURE] * 4)
    for name, expected in (("log_probs", log_probs), ("entropy", entropies)):
        assert_rows_close(case.out["old_log_prob"][name], expected)


def test_reference_names_the_tokens_that_transformers_finds_likeliest(case):
    temperatures = reference_temperatures(ReferenceConfig(phi_min=0.6))
    with torch.no_grad():
        log_q = torch.cat(response_of(case.truth.distributions(temperatures)))
        sampled = case.truth.outputs(temperatures)[0]
    for name in ESTIMATORS:
        output = case.out[name]["reference"]
        assert_rows_close(output["log_probs"], sampled)
        ids, log_prob, log_tail = (output[field].values() for field in FIELDS)
        assert ids.shape == (sum(RESPONSES), K if name == "topk" else 264)
        torch.testing.assert_close(log_prob, log_q.topk(ids.shape[1]).values, **CLOSE)
        torch.testing.assert_close(log_prob, log_q.gather(1, ids.long()), **CLOSE)
        rest = log_q.scatter(1, ids.long(), -torch.inf).logsumexp(1)
        torch.testing.assert_close(log_tail, rest, **CLOSE)


@pytest.mark.parametrize("estimator", ["sampled", *ESTIMATORS])
def test_update_has_the_same_loss_gradients_and_weights(case, estimator):
    group = compose_config(["experiment=qwen2.5_7b_rapo", *OVERRIDES]).actor_rollout_ref
    group.actor.use_kl_loss = False
    rapo = RapoConfig(reference=ReferenceConfig(phi_min=0.9))
    if estimator in ESTIMATORS:
        reference = ReferenceConfig(phi_min=0.6, top_k=K)
        rapo = RapoConfig(reference=reference, forward_kl=ForwardKLConfig(estimator=estimator))
    before = {name: p.detach() for name, p in case.truth.model.named_parameters()}
    loss, metrics, norm, gradients, weights = case.truth.update(omega_conf_to_dataclass(group.actor), rapo)
    out = case.out[estimator]
    said = tu.get(out["metrics"], "metrics")
    assert said["loss"] == pytest.approx([loss.item()], rel=1e-4)
    assert said["grad_norm"] == pytest.approx([norm.item()], rel=1e-4)
    assert norm > 1  # so that clipping acts too
    for name in ("rapo/forward_kl", "rapo/reference_mass_sampled", "rapo/log_rho_mean"):
        assert float(torch.as_tensor(said[name]).sum()) == pytest.approx(float(metrics[name].aggregate()), rel=1e-4)
    assert float(metrics["rapo/forward_kl"].aggregate()) > 1e-3
    assert out["weights"].keys() == before.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(out["gradients"][name], gradient, rtol=1e-3, atol=1e-5 * norm.item())
        # Adam's first step moves a weight by lr whatever its gradient's size: where that is rounding, so is the sign.
        sure = gradient.abs() > 1e-4 * norm
        torch.testing.assert_close(out["weights"][name][sure], weights[name][sure], rtol=0, atol=LR * 1e-2)
        assert (weights[name] - before[name])[sure].abs().min() > 0.5 * LR


def assert_same_second_update(got: dict, want: dict, **tolerance):
    assert_rows_close(got["log_prob"]["log_probs"], rows_of(want["log_prob"]["log_probs"]))
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, **tolerance)
    lr = [tu.get(out["metrics"], "metrics")["lr"] for out in (got, want)]
    # Linear from LR over ten updates, two of them done: a scheduler that began anew would be one behind.
    assert lr[0] == lr[1] == pytest.approx([LR * 0.8])


def test_resumed_actor_goes_on_as_if_nothing_had_happened(case):
    # Same layout, same process: to the bit.
    assert_same_second_update(case.out["resumed"], case.out["second"], rtol=0, atol=0)


def test_checkpoint_resumes_in_another_layout(case):
    # Weights, moments and place in the schedule: Adam divides by the square root of small second moments.
    assert_same_second_update(case.resumed(), case.out["second"], rtol=0, atol=LR * 2e-2)


def test_checkpoint_reloads_as_a_hugging_face_model(case):
    folder = resolve_model(str(case.folder / CHECKPOINT).removesuffix("/actor"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(model.named_parameters())
    for name, weight in case.out["sampled"]["weights"].items():
        assert torch.equal(weights[name], weight), name
    with torch.no_grad():
        log_probs = case.truth.outputs([TEMPERATURE] * 4, model)[0]
    assert_rows_close(case.out["second"]["log_prob"]["log_probs"], log_probs)


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
model, rows = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, enable_chunked_prefill=False,
          max_num_batched_tokens=16384, enable_prefix_caching=False)
done = llm.generate([{"prompt_token_ids": row} for row in rows], SamplingParams(max_tokens=1, prompt_logprobs=0))
found = [[p[t].logprob for p, t in zip(d.prompt_logprobs[1:], row[1:])] for d, row in zip(done, rows)]
print("LOGPROBS" + json.dumps(found))
"""


def test_checkpoint_in_vllm_has_the_same_log_probs(case):
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    if case.name == "tp2pp2":
        pytest.skip("tp2 and pp2 show both kinds of head")
    folder = resolve_model(str(case.folder / CHECKPOINT).removesuffix("/actor"))
    rows = json.dumps([ids.tolist() for ids in case.truth.ids])
    env = {**os.environ, **CPU_ENVIRONMENT, "VERL_PLATFORM": "cpu"}
    command = [sys.executable, "-c", VLLM, str(folder), rows]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOGPROBS")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = case.truth.outputs([1.0] * 4, model)[0]
    for got, want in zip(json.loads(line.removeprefix("LOGPROBS")), expected):
        # Two implementations of the network in fp32, log-probs of size up to 20.
        torch.testing.assert_close(torch.tensor(got), want[:-1], rtol=1e-4, atol=1e-3)


def test_gradient_that_is_not_finite_stops_every_rank_before_the_optimizer_steps(case):
    # The third update of this engine.
    assert all("update 3" in rank["refused"] and "not finite" in rank["refused"] for rank in case.ranks)
    assert re.search(r"losses of the micro-batches: \[(nan, \S+|\S+, nan)\]", case.out["refused"])
    for name, weight in case.out["second"]["weights"].items():
        assert torch.equal(case.out["weights_after_refusal"][name], weight), name


def test_plan_counts_the_parameters_of_each_rank(case):
    shape = shape_of(str(case.truth.folder))
    tensor, pipeline = case.tensor, case.pipeline
    planned = [rank_parameters(shape, tensor=tensor, pipeline=pipeline, stage=stage) for stage in range(pipeline)]
    assert [rank["count"] for rank in case.ranks] == [planned[rank // tensor] for rank in range(tensor * pipeline)]


def test_verl_still_steps_on_any_gradient_and_looks_engines_up_as_we_register_ours(monkeypatch):
    import rapo_verl.training.external_lib  # noqa: F401
    from rapo_verl.training.megatron import RapoMegatronEngine

    step = " ".join(inspect.getsource(MegatronEngine.optimizer_step).split())
    assert "update_successful, grad_norm, num_zeros_in_grad = self.optimizer.step()" in step
    assert "finite" not in step
    parameters = ["self", "data", "loss_function", "forward_only"]
    assert list(inspect.signature(MegatronEngine.forward_backward_batch).parameters) == parameters
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert issubclass(EngineRegistry.get_engine_cls("language_model", "megatron"), RapoMegatronEngine)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "metax")
    assert EngineRegistry.get_engine_cls("language_model", "megatron") is MegatronEngineWithLMHead
