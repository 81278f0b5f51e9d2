"""RAPO's head in veRL's own engines: what comes back belongs to the right tokens, in every layout veRL makes."""

import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import entropy_from_logits
from verl.utils.ulysses import set_ulysses_sequence_parallel_group
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker

from rapo_verl.method.config import FULL_VOCABULARY, ForwardKLConfig, RapoConfig, ReferenceConfig, rapo_config_from
from rapo_verl.method.head import Target, head
from rapo_verl.plan.head import fast_head
from rapo_verl.run.compose import compose_config
from rapo_verl.run.preflight import problems_of
from rapo_verl.training.engine import FIELDS, CpuFSDPEngine, response_index, run_head
from rapo_verl.training.worker import RapoWorker, reweighted_output

PROMPTS, RESPONSES, VOCABULARY, K = (3, 1, 4), (2, 5, 4), 12, 4  # 19 places: odd, so that two ranks need a pad
TEMPERATURE = 0.7
# fp32 log-probs of size up to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def jagged(rows) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


class Batch:
    """Sequences, the logits of policy and reference at every place, and a reward for each."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        lengths = [p + r for p, r in zip(PROMPTS, RESPONSES)]
        self.ids = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]
        self.policy, self.reference = (
            [3 * torch.randn(n, VOCABULARY, generator=generator) for n in lengths] for _ in range(2)
        )
        self.phi = torch.tensor([0.8, 0.9, 1.0])

    def data(self, *, remove_padding: bool = True, temperature=TEMPERATURE) -> TensorDict:
        data = TensorDict(
            {
                "input_ids": jagged(self.ids),
                "position_ids": jagged(torch.arange(len(x)) for x in self.ids),
                "responses": jagged(x[-n:].clone() for x, n in zip(self.ids, RESPONSES)),
                "response_mask": jagged(torch.ones(n, dtype=torch.int64) for n in RESPONSES),
            },
            batch_size=[3],
        )
        tu.assign_non_tensor(data, use_remove_padding=remove_padding, pad_token_id=0, temperature=temperature)
        return data

    def response_rows(self, per_place: list[torch.Tensor]) -> torch.Tensor:
        """Return the rows of packed values that predict the response tokens: veRL shifts by one."""
        return torch.cat([x[-n - 1 : -1] for x, n in zip(per_place, RESPONSES)])

    def labels(self) -> torch.Tensor:
        return torch.cat([x[-n:] for x, n in zip(self.ids, RESPONSES)])

    def target(self) -> Target:
        """Return the tempered reference's top K and tail, by definition."""
        phi = self.phi.repeat_interleave(torch.tensor(RESPONSES))[:, None]
        log_p = torch.log_softmax(self.response_rows(self.reference) / TEMPERATURE, -1)
        log_q = torch.log_softmax(phi * log_p, -1)
        ids = log_q.topk(K, -1).indices
        return Target(ids, log_q.gather(1, ids), log_q.scatter(1, ids, -torch.inf).logsumexp(1))


def with_target(data: TensorDict, target: Target) -> TensorDict:
    offsets = torch.tensor([0, *RESPONSES]).cumsum(0)
    for name, value in zip(FIELDS, target):
        data[name] = torch.nested.nested_tensor_from_jagged(value, offsets)
    return data


def engine(cls=CpuFSDPEngine, sp_size: int = 1):
    """Return an engine without its set-up: only the code between a batch and its outputs."""
    made = object.__new__(cls)
    made.pad_to_length, made.use_ulysses_sp, made.ulysses_sequence_parallel_size = False, sp_size > 1, sp_size
    made.engine_config = types.SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False, pad_to_length=False,
        pad_to_length_bucket=None,
    )  # fmt: skip
    made.module = types.SimpleNamespace(config=types.SimpleNamespace())
    made.compute_entropy_from_logits = lambda logits: head(logits, logits.argmax(-1)).entropy
    return made


def run(made, data: TensorDict, logits: list[torch.Tensor]) -> dict:
    remove_padding = tu.get_non_tensor_data(data, "use_remove_padding", default=True)
    _, output_args = made.prepare_model_inputs(data)
    packed = torch.cat(logits)[None] if remove_padding else torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)
    return made.prepare_model_outputs(types.SimpleNamespace(logits=packed), output_args, data, None)


def rows_of(output: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[-n - 1 : -1] for x, n in zip(output.unbind(), RESPONSES)])


def rapo(estimator="topk", reading="token") -> RapoConfig:
    return RapoConfig(
        forward_kl=ForwardKLConfig(estimator=estimator),
        reference=ReferenceConfig(reading=reading, top_k=K, phi_min=0.8),
    )


# --- FSDP ---


@pytest.mark.parametrize("remove_padding", [True, False])
@pytest.mark.parametrize("estimator", ["topk", "full"])
def test_reference_pass_then_actor_pass_give_the_kl_of_each_response_token(remove_padding, estimator):
    batch, made = Batch(), engine()
    data = batch.data(remove_padding=remove_padding)
    tu.assign_non_tensor(data, rapo_top_k=K if estimator == "topk" else 0, rapo_phi_min=0.8)
    output = reweighted_output(TensorDict(run(made, data, batch.reference)), data, batch.phi, rapo(estimator))

    want = batch.target()
    phi = batch.phi.repeat_interleave(torch.tensor(RESPONSES))[:, None]
    plain = torch.log_softmax(batch.response_rows(batch.reference) / TEMPERATURE, -1)
    sampled = torch.log_softmax(phi * plain, -1).gather(1, batch.labels()[:, None])[:, 0]
    torch.testing.assert_close(rows_of(output["log_probs"]), sampled, **CLOSE)
    if estimator == "topk":
        for name, value in zip(FIELDS, want):
            torch.testing.assert_close(output[name].values(), value, check_dtype=False, **CLOSE)

    # The fields go through the queue to the actor.
    data = batch.data(remove_padding=remove_padding)
    for name in FIELDS:
        data[name] = output[name]
    tu.assign_non_tensor(data, calculate_entropy=True)
    logits = [x.clone().requires_grad_(True) for x in batch.policy]
    got = run(made, data, logits)
    leaf = batch.response_rows(batch.policy).requires_grad_(True)
    log_p = torch.log_softmax(leaf / TEMPERATURE, -1)
    if estimator == "topk":
        by_head = head(leaf, batch.labels(), temperature=TEMPERATURE, target=want).forward_kl
    else:
        log_q = torch.log_softmax(phi * plain, -1)
        by_head = (log_q.exp() * (log_q - log_p)).sum(1)
    torch.testing.assert_close(rows_of(got["forward_kl"]), by_head, **CLOSE)
    torch.testing.assert_close(rows_of(got["log_probs"]), log_p.gather(1, batch.labels()[:, None])[:, 0], **CLOSE)
    torch.testing.assert_close(rows_of(got["entropy"]), -(log_p.exp() * log_p).sum(1), **CLOSE)
    weights = torch.arange(1.0, 1 + sum(RESPONSES))
    (weights * rows_of(got["forward_kl"])).sum().backward()
    (weights * by_head).sum().backward()
    torch.testing.assert_close(batch.response_rows([x.grad for x in logits]), leaf.grad, **CLOSE)
    assert sum(float(x.grad[: p - 1].abs().sum() + x.grad[-1].abs().sum()) for x, p in zip(logits, PROMPTS)) == 0


def test_gradient_takes_the_logits_memory_on_its_way_to_the_model():
    batch, made = Batch(), engine()
    data = with_target(batch.data(), batch.target())
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*size, generator=generator) for size in ((19, 3), (3, VOCABULARY)))
    logits = hidden @ weight.requires_grad_(True)
    leaf = logits.detach().clone().requires_grad_(True)
    for x in (logits, leaf):
        _, output_args = made.prepare_model_inputs(data)
        # A result, as a model's: what is saved for the backward may be written to, the leaf not.
        output = types.SimpleNamespace(logits=x[None] if x is logits else x[None] * 1)
        rows_of(made.prepare_model_outputs(output, output_args, data, None)["forward_kl"]).sum().backward()
    assert torch.equal(logits.detach(), leaf.grad) and leaf.grad.abs().sum() > 0
    torch.testing.assert_close(weight.grad, hidden.T @ leaf.grad, **CLOSE)


def test_nucleus_changes_only_the_sampled_log_probs_of_a_sample_estimator():
    batch, made = Batch(), engine()
    data = batch.data()
    tu.assign_non_tensor(data, rapo_top_k=K, rapo_phi_min=0.8)
    settings = rapo("bounded", "nucleus")
    output = reweighted_output(TensorDict(run(made, data, batch.reference)), data, batch.phi, settings)
    assert set(output.keys()) == {"log_probs"}
    plain = torch.log_softmax(batch.response_rows(batch.reference) / TEMPERATURE, -1)
    plain = plain.gather(1, batch.labels()[:, None])[:, 0]
    moved = (rows_of(output["log_probs"]) - plain).abs() > 1e-4
    assert moved[: RESPONSES[0] + RESPONSES[1]].any() and not moved.all()
    assert not moved[-RESPONSES[2] :].any()  # phi = 1


@pytest.mark.parametrize("remove_padding", [True, False])
def test_other_micro_batches_go_through_verl_bit_for_bit(remove_padding):
    batch = Batch()
    data = batch.data(remove_padding=remove_padding)
    assert not engine().takes_own_head(data)
    ours, theirs = (run(engine(cls), data, batch.policy) for cls in (CpuFSDPEngine, FSDPEngineWithLMHead))
    assert ours.keys() == theirs.keys() == {"log_probs"}
    assert torch.equal(ours["log_probs"].values(), theirs["log_probs"].values())


def own(made):
    made.own_head = True
    return made


def sums_and_gradient(made, data: TensorDict, logits: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return log-prob and entropy of the response tokens, and the gradient of their weighted sum."""
    logits = [x.clone().requires_grad_(True) for x in logits]
    got = run(made, data, logits)
    values = [rows_of(got[name]) for name in ("log_probs", "entropy")]
    weights = torch.arange(1.0, 1 + sum(RESPONSES))
    sum((weights.roll(i) * value).sum() for i, value in enumerate(values)).backward()
    return [*values, torch.cat([x.grad for x in logits])]


@pytest.mark.parametrize("remove_padding", [True, False])
@pytest.mark.parametrize("temperature", [TEMPERATURE, torch.tensor([0.7, 1.0, 1.4])])
def test_own_head_in_every_pass_gives_what_verl_s_gives(remove_padding, temperature):
    batch = Batch()
    data = batch.data(remove_padding=remove_padding)
    if isinstance(temperature, torch.Tensor):
        del data["temperature"]
        data["temperature"] = temperature
    tu.assign_non_tensor(data, calculate_entropy=True)
    theirs, made = engine(FSDPEngineWithLMHead), own(engine())
    # veRL's own, as it builds it without chunks and compilation.
    theirs.compute_entropy_from_logits = made.compute_entropy_from_logits = entropy_from_logits
    for ours, want in zip(*(sums_and_gradient(e, data, batch.policy) for e in (made, theirs))):
        torch.testing.assert_close(ours, want, **CLOSE)


def test_first_ratio_is_one_to_the_last_bit():
    batch, made = Batch(), own(engine())
    generator = torch.Generator().manual_seed(3)
    logits = [9 * torch.randn(len(x), 3000, generator=generator) for x in batch.ids]
    phi, ids = torch.rand(sum(RESPONSES), K, generator=generator).log(), torch.arange(K).expand(sum(RESPONSES), K)
    target = Target(ids.contiguous(), phi - 2, torch.full((sum(RESPONSES),), -1.0))
    with torch.no_grad():
        old = rows_of(run(made, batch.data(), logits)["log_probs"])
    for data in (batch.data(), with_target(batch.data(), target)):
        new = rows_of(run(made, data, [x.clone().requires_grad_(True) for x in logits])["log_probs"])
        assert torch.equal((new - old).exp(), torch.ones(len(old)))


def test_entropy_comes_back_only_where_verl_asks_for_it():
    batch = Batch()
    assert set(run(engine(), with_target(batch.data(), batch.target()), batch.policy)) == {"log_probs", "forward_kl"}


def test_targets_laid_out_for_other_tokens_are_an_error():
    batch = Batch()
    data = with_target(batch.data(), batch.target())
    index, labels = response_index(data), torch.cat(batch.ids).roll(-1)
    logits, temperature = torch.cat(batch.policy), torch.ones(len(labels))
    run_head(logits, labels, temperature, index, data)
    with pytest.raises(RuntimeError, match="lays its labels out in another way"):
        run_head(logits, labels, temperature, index.roll(1), data)


def test_full_on_a_large_vocabulary_is_refused():
    batch = Batch()
    data = batch.data()
    tu.assign_non_tensor(data, rapo_top_k=0, rapo_phi_min=0.8)
    logits = torch.zeros(sum(len(x) for x in batch.ids), FULL_VOCABULARY + 1)
    with pytest.raises(ValueError, match=f"vocabulary of {FULL_VOCABULARY + 1}; allowed: up to {FULL_VOCABULARY}"):
        run_head(logits, torch.cat(batch.ids).roll(-1), torch.ones(len(logits)), response_index(data), data)


def spawn(function, folder: Path) -> list[dict]:
    mp.start_processes(function, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)


def ulysses(rank: int, folder: str) -> None:
    join(rank, folder)
    try:
        set_ulysses_sequence_parallel_group(dist.group.WORLD)
        batch, made = Batch(), engine(sp_size=2)
        data = with_target(batch.data(), batch.target())
        _, output_args = made.prepare_model_inputs(data)
        packed = torch.cat(batch.policy)
        packed = torch.nn.functional.pad(packed, (0, 0, 0, output_args["pad_size"])).chunk(2)[rank].clone()
        assert output_args["pad_size"] == 1
        if rank == 1:
            packed[-1] = torch.nan  # the pad
        packed.requires_grad_(True)
        got = made.prepare_model_outputs(types.SimpleNamespace(logits=packed[None]), output_args, data, None)
        rows_of(got["forward_kl"]).sum().backward()
        values = {name: rows_of(got[name]).detach() for name in ("forward_kl", "log_probs")}
        torch.save(values | {"gradient": packed.grad}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_sequence_parallel_ranks_give_what_one_does(tmp_path):
    batch = Batch()
    logits = [x.clone().requires_grad_(True) for x in batch.policy]
    whole = run(engine(), with_target(batch.data(), batch.target()), logits)
    rows_of(whole["forward_kl"]).sum().backward()
    parts = spawn(ulysses, tmp_path)
    for part in parts:
        for name in ("forward_kl", "log_probs"):
            torch.testing.assert_close(part[name], rows_of(whole[name]).detach(), **CLOSE)
    gradient = torch.cat([part["gradient"] for part in parts])[: len(torch.cat(logits))]
    # veRL's gather multiplies gradients by the ranks, which FSDP's mean over them takes off again.
    torch.testing.assert_close(gradient / 2, torch.cat([x.grad for x in logits]), **CLOSE)


# --- Megatron ---


def megatron_engine():
    """Return an engine without its set-up."""
    from rapo_verl.training.megatron import RapoMegatronEngine

    made = object.__new__(RapoMegatronEngine)
    made.engine_config = types.SimpleNamespace(
        pad_to_length=False, pad_to_length_bucket=None, entropy_from_logits_with_chunking=False
    )
    return made


def batch_without_target(batch: Batch) -> TensorDict:
    data = batch.data()
    tu.assign_non_tensor(data, calculate_entropy=True)
    return data


def whole_gradient() -> list[torch.Tensor]:
    """Return the gradient of the sum of all three outputs for one FSDP rank."""
    batch = Batch()
    data = with_target(batch.data(), batch.target())
    tu.assign_non_tensor(data, calculate_entropy=True)
    logits = [x.clone().requires_grad_(True) for x in batch.policy]
    sum(rows_of(value).sum() for value in run(engine(), data, logits).values()).backward()
    return [x.grad for x in logits]


def megatron(rank: int, folder: str, *, tensor: int, context: int, data_format: str) -> None:
    from megatron.core import parallel_state
    from verl.models.mcore.util import (
        postprocess_bshd_engine,
        postprocess_thd_engine,
        preprocess_bshd_engine,
        preprocess_thd_engine,
    )

    join(rank, folder)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
        batch = Batch()
        data = with_target(batch.data(), batch.target())
        tu.assign_non_tensor(data, calculate_entropy=True)
        lay_out = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
        ids = data["input_ids"]
        label, *rest = lay_out(ids, need_roll=True)
        logits = lay_out(jagged(batch.policy))[0]
        temperature = lay_out(jagged(torch.full((len(x),), TEMPERATURE) for x in batch.ids))[0]
        columns = VOCABULARY // tensor
        shard = parallel_state.get_tensor_model_parallel_rank()
        logits = logits[..., shard * columns : (shard + 1) * columns].clone().requires_grad_(True)
        got = megatron_engine()._lm_head_logits_processor(
            logits, label, temperature, batch=data, data_format=data_format, calculate_entropy=True
        )

        def placed(found):
            if data_format == "thd":
                return {k: postprocess_thd_engine(v, rest[0], ids, 3) for k, v in found.items()}
            return {k: postprocess_bshd_engine(v, rest[0]) for k, v in found.items()}

        out = placed(got)
        sum(rows_of(v).sum() for v in out.values()).backward()
        # Where verl puts the whole gradient, this rank's rows and columns of it.
        want = lay_out(jagged(whole_gradient()))[0][..., shard * columns : (shard + 1) * columns]
        found = {k: rows_of(v).detach() for k, v in out.items()}
        # Without a target, by both heads: log-prob and entropy, and their gradient.
        for name, taken in (("ours", True), ("verl", False)):
            made = megatron_engine()
            made.own_head, leaf = taken, logits.detach().clone().requires_grad_(True)
            both = placed(
                made._lm_head_logits_processor(
                    leaf * 1, label, temperature.clone(), batch=batch_without_target(batch), data_format=data_format,
                    calculate_entropy=True, calculate_sum_pi_squared=False, distillation_use_topk=False,
                    distillation_only=False, logits_processor_func=None,
                )
            )  # fmt: skip
            sum(rows_of(v).square().sum() for v in both.values()).backward()
            found[name] = [*(rows_of(both[k]).detach() for k in ("log_probs", "entropy")), leaf.grad]
        torch.save(found | {"gradient": logits.grad, "want": want}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_other_megatron_micro_batches_go_to_verl(monkeypatch):
    pytest.importorskip("megatron.core")
    from verl.workers.engine import MegatronEngineWithLMHead

    def verl_s(self, logits, label, temperature, **options):
        return {"verl": options}

    monkeypatch.setattr(MegatronEngineWithLMHead, "_lm_head_logits_processor", verl_s)
    data, made = Batch().data(), megatron_engine()
    got = made._lm_head_logits_processor(None, None, None, batch=data, data_format="thd", calculate_entropy=True)
    assert got["verl"]["batch"] is data and got["verl"]["data_format"] == "thd" and got["verl"]["calculate_entropy"]


def thd_tensor_parallel(rank, folder):
    megatron(rank, folder, tensor=2, context=1, data_format="thd")


def thd_context_parallel(rank, folder):
    megatron(rank, folder, tensor=1, context=2, data_format="thd")


def bshd_tensor_parallel(rank, folder):
    megatron(rank, folder, tensor=2, context=1, data_format="bshd")


@pytest.mark.parametrize("layout", [thd_tensor_parallel, thd_context_parallel, bshd_tensor_parallel])
def test_two_megatron_ranks_give_what_one_fsdp_rank_does(tmp_path, layout):
    pytest.importorskip("megatron.core")
    batch = Batch()
    data = with_target(batch.data(), batch.target())
    tu.assign_non_tensor(data, calculate_entropy=True)
    whole = run(engine(), data, batch.policy)
    for part in spawn(layout, tmp_path):
        torch.testing.assert_close(part.pop("gradient"), part.pop("want"), **CLOSE)
        for ours, theirs in zip(part.pop("ours"), part.pop("verl")):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        assert part.keys() == whole.keys() == {"log_probs", "entropy", "forward_kl"}
        for name, value in part.items():
            torch.testing.assert_close(value, rows_of(whole[name]), **CLOSE)


# --- what a run is refused for, before it starts ---


def refusals(toy_dir, *overrides) -> list[str]:
    config = compose_config(["experiment=toy_rapo_cpu", f"toy_dir={toy_dir}", *overrides])
    return problems_of(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("actor_rollout_ref.model.use_fused_kernels=true", "set actor_rollout_ref.model.use_fused_kernels=false"),
        ("actor_rollout_ref.actor.calculate_sum_pi_squared=true", "calculate_sum_pi_squared is not computed"),
        ("rapo.reference.top_k=265", "rapo.reference.top_k is 265, above the model's vocabulary of 264"),
    ],
)
def test_what_the_head_cannot_do_is_refused_before_the_run(toy_dir, override, said):
    assert any(said in problem for problem in refusals(toy_dir, "rapo.forward_kl.estimator=topk", override))
    if "top_k" not in override:
        assert not any("estimator=bounded" in problem for problem in refusals(toy_dir, override))


VERL_S = ("actor_rollout_ref.model.use_fused_kernels=true", "actor_rollout_ref.actor.calculate_sum_pi_squared=true")


@pytest.mark.parametrize("setting", VERL_S)
def test_what_only_verl_s_head_does_is_refused_or_left_to_it(toy_dir, setting):
    assert any("rapo.head=fast cannot follow" in said for said in refusals(toy_dir, "rapo.head=fast", setting))
    for head_of, fast in (("auto", False), ("verl", False), ("fast", True)):
        config = compose_config(["experiment=toy_rapo_cpu", f"rapo.head={head_of}", setting])
        assert fast_head(config.actor_rollout_ref, rapo_config_from(OmegaConf.to_container(config.rapo))) == fast


@pytest.mark.parametrize(
    ("experiment", "head_of", "fast"),
    [("toy_rapo_cpu", "auto", True), ("toy_rapo_cpu", "verl", False), ("toy_grpo_cpu", "auto", False),
     ("toy_grpo_cpu", "fast", True), ("toy_rapo_answers_cpu", "auto", True)],
)  # fmt: skip
def test_head_is_ours_by_default_while_rapo_is_on_and_verl_s_while_it_is_off(experiment, head_of, fast):
    config = compose_config([f"experiment={experiment}", f"rapo.head={head_of}"])
    assert fast_head(config.actor_rollout_ref, rapo_config_from(OmegaConf.to_container(config.rapo))) == fast


def test_full_is_refused_for_the_vocabulary_of_a_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 151936}')
    overrides = [f"actor_rollout_ref.model.path={tmp_path}", "rapo.forward_kl.estimator=full"]
    assert any("vocabulary of 151936; allowed: up to 4096" in problem for problem in refusals(tmp_path, *overrides))


@pytest.mark.parametrize("override", ["rapo.forward_kl.estimator=topk", "rapo.forward_kl.estimator=full",
                                      "rapo.reference.reading=nucleus"])  # fmt: skip
def test_each_form_composes_and_is_accepted(toy_dir, override):
    assert refusals(toy_dir, override) == []


@pytest.mark.parametrize(
    ("reading", "phi_min"), [("token", 0.25), ("unnormalized", 0.25), ("token", 1.0), ("unnormalized", 1.0)]
)
def test_reference_pass_that_knows_phi_gets_a_temperature_or_its_log_probs_are_multiplied(reading, phi_min):
    worker = object.__new__(RapoWorker)
    worker.rapo = RapoConfig(reference=ReferenceConfig(reading=reading, phi_min=phi_min))
    rows = [torch.tensor([-1.5, -torch.inf]), torch.tensor([-0.7, 0.0, -9.0])]
    seen = []

    def reference_pass(data):
        seen.append(data["temperature"])
        return TensorDict({"log_probs": jagged(rows)}, batch_size=[2])

    data = TensorDict({"rm_scores": jagged([torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])])}, batch_size=[2])
    tu.assign_non_tensor(data, temperature=TEMPERATURE)
    output = worker._reweighted(reference_pass, data)
    # Bit for bit: powers of two are exact, and phi = 1 changes nothing.
    assert torch.equal(output["rapo_phi"], torch.tensor([phi_min, 1.0]))
    tempered = reading == "token" and phi_min < 1
    want = TEMPERATURE / torch.tensor([phi_min, 1.0]) if tempered else torch.tensor(TEMPERATURE)
    assert torch.equal(torch.as_tensor(seen[0]), want)
    factor = phi_min if reading == "unnormalized" else 1.0
    assert torch.equal(output["log_probs"].values(), torch.cat([factor * rows[0], rows[1]]))


@pytest.mark.parametrize("adapters", [True, False])
def test_only_the_actor_without_its_adapters_is_reweighted(monkeypatch, adapters):
    # With LoRA veRL asks the actor for the reference (trainer_base.py:1703).
    seen = []
    monkeypatch.setattr(ActorRolloutRefWorker, "compute_log_prob", lambda self, data: seen.append(data["temperature"]))
    worker = object.__new__(RapoWorker)
    worker.rapo = RapoConfig()
    data = TensorDict({"rm_scores": jagged([torch.tensor([0.0, 1.0]), torch.tensor([0.0])])}, batch_size=[2])
    tu.assign_non_tensor(data, temperature=TEMPERATURE, no_lora_adapter=not adapters)
    worker.compute_log_prob(data)
    # A reward of 1 leaves the reference as it is, one of 0 flattens it most.
    want = TEMPERATURE if adapters else torch.tensor([TEMPERATURE, TEMPERATURE / RapoConfig().reference.phi_min])
    torch.testing.assert_close(torch.as_tensor(seen[0]), torch.as_tensor(want))
