"""phi(r) at its ends and between them, and what its readings make of the reference."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rapo_verl.method.config import PHI_SHAPES, READINGS, ReferenceConfig
from rapo_verl.method.reference_tokens import phi_nodes, reference_tokens, tail_at
from rapo_verl.method.reweighting import nucleus, reward_to_phi, reweight_tokens


def config(**changes) -> ReferenceConfig:
    return dataclasses.replace(ReferenceConfig(), **{"phi_min": 0.3, **changes})


@pytest.mark.parametrize("phi", PHI_SHAPES)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7), (-1e3, 1e3)])
def test_phi_is_monotone_and_stays_in_its_interval(phi, ends):
    low, high = ends
    settings = config(phi=phi, reward_min=low, reward_max=high, step_at=(low + high) / 2)
    values = reward_to_phi(torch.linspace(low - 2, high + 2, 1001), settings)
    assert values.dtype == torch.float32
    assert (values.diff() >= 0).all()
    assert values.max() == 1 and values.min() == torch.tensor(0.3)
    assert len(values.unique()) == 2 if phi == "step" else len(values.unique()) > 100


@pytest.mark.parametrize("phi", PHI_SHAPES)
@pytest.mark.parametrize("phi_min", [0.1, 0.3, 0.7, 0.8, 1 / 3])
def test_phi_is_exact_at_both_ends_and_beyond(phi, phi_min):
    rewards = torch.tensor([-5.0, 0.0, 1.0, 7.0])
    want = torch.tensor([phi_min, phi_min, 1.0, 1.0])
    assert torch.equal(reward_to_phi(rewards, config(phi=phi, phi_min=phi_min)), want)


@pytest.mark.parametrize("phi", PHI_SHAPES)
def test_phi_min_of_one_is_exactly_one_everywhere(phi):
    rewards = torch.linspace(-2, 3, 997)
    assert torch.equal(reward_to_phi(rewards, config(phi=phi, phi_min=1.0)), torch.ones(997))


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"phi": "linear"}, [0.3, 0.475, 0.65, 0.825, 1.0]),
        ({"phi": "step", "step_at": 0.5}, [0.3, 0.3, 1.0, 1.0, 1.0]),
        ({"phi": "step", "step_at": 1.0}, [0.3, 0.3, 0.3, 0.3, 1.0]),
        ({"phi": "power", "exponent": 2.0}, [0.3, 0.34375, 0.475, 0.69375, 1.0]),
        ({"phi": "power", "exponent": 0.5}, [0.3, 0.65, 0.3 + 0.7 * math.sqrt(0.5), 0.3 + 0.7 * math.sqrt(0.75), 1.0]),
        ({"phi": "power", "exponent": 1.0}, [0.3, 0.475, 0.65, 0.825, 1.0]),
    ],
)
def test_phi_shapes_have_their_closed_form(changes, want):
    got = reward_to_phi(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), config(**changes))
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-6)  # fp32 near 1: 1.2e-7 a step


def test_phi_uses_the_reward_range():
    got = reward_to_phi(torch.tensor([-1.0, 0.0, 3.0]), config(reward_min=-1.0, reward_max=3.0))
    torch.testing.assert_close(got, torch.tensor([0.3, 0.475, 1.0]), rtol=0, atol=1e-6)  # fp32 near 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_phi_is_fp32_whatever_the_reward_is(dtype):
    got = reward_to_phi(torch.tensor([0, 1], dtype=dtype), config())
    assert torch.equal(got, torch.tensor([0.3, 1.0]))


def test_phi_carries_no_gradient_and_leaves_the_reward_alone():
    reward = torch.tensor([0.0, 0.4], requires_grad=True)
    assert not reward_to_phi(reward, config()).requires_grad
    assert reward.tolist() == torch.tensor([0.0, 0.4]).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_reward_raises_and_names_the_first_row(bad):
    with pytest.raises(ValueError, match=f"sample 2 is {bad}"):
        reward_to_phi(torch.tensor([0.0, 1.0, bad, 0.5, bad]), config())


def test_unknown_shape_raises_with_the_allowed_names():
    with pytest.raises(ValueError, match=r"'cubic'.*linear, step, power"):
        reward_to_phi(torch.tensor([0.5]), config(phi="cubic"))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_token_reading_is_a_reference_pass_at_temperature_over_phi(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(5, 7, 50, dtype=torch.float64, generator=generator)
    phi = torch.tensor([0.2, 0.5, 0.8, 0.9, 1.0])
    log_prob = torch.log_softmax(logits / (temperature / phi).double()[:, None, None], -1)
    # pi_ref is what the rollout samples from: softmax(logits / T). Its power phi, normalised over the vocabulary:
    power = phi.double()[:, None, None] * torch.log_softmax(logits / temperature, -1)
    want = power - power.logsumexp(-1, keepdim=True)
    # T / phi is rounded to fp32 (6e-8), times logits up to 20 / 0.6.
    torch.testing.assert_close(log_prob, want, rtol=0, atol=1e-5)


def test_unknown_reading_raises_with_the_allowed_names():
    with pytest.raises(ValueError, match=r"'nucleous'.*token, nucleus, unnormalized"):
        reweighted("nucleous", torch.ones(5))


# --- all readings, from a reference pass that knows no phi ---

NODES = phi_nodes(0.3)
TOP_K, TOP_P = 12, 0.9


def reference(top_k: int = TOP_K, nodes=NODES):
    """Return log p over a vocabulary, labels (one in the nucleus, one named, one in the tail, ...), and the pass."""
    generator = torch.Generator().manual_seed(3)
    logits = 2.5 * torch.randn(5, 50, dtype=torch.float64, generator=generator)
    log_p = torch.log_softmax(logits / 0.7, -1)
    order = log_p.argsort(-1, descending=True)
    labels = torch.stack([order[row, rank] for row, rank in enumerate((0, 1, 10, 11, 40))])
    return log_p, labels, reference_tokens(logits, labels, k=top_k, temperature=0.7, nodes=nodes)


def reweighted(reading: str, phi: torch.Tensor, top_k: int = TOP_K):
    log_p, labels, tokens = reference(top_k)
    return log_p, labels, *reweight_tokens(tokens, labels, phi, reading=reading, top_p=TOP_P, nodes=NODES)


def by_definition(log_p: torch.Tensor, phi: torch.Tensor, reading: str, top_k: int = TOP_K) -> torch.Tensor:
    """Return log pi_hat over the vocabulary."""
    flat = phi.double()[:, None] * log_p
    if reading == "unnormalized":
        return flat
    if reading == "token":
        return torch.log_softmax(flat, -1)
    out = log_p.clone()
    for row in range(len(log_p)):
        order = log_p[row].argsort(descending=True)[:top_k]
        count = 1 + int((log_p[row, order].exp().cumsum(0) < TOP_P).sum())
        inside = order[:count]
        out[row, inside] = torch.log_softmax(flat[row, inside], 0) + log_p[row, inside].logsumexp(0)
    return out


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("top_k", [1, 3, TOP_K, 50])
@pytest.mark.parametrize("phi", [0.3, NODES[2], 1.0])
def test_each_reading_is_its_definition_for_sampled_and_named_tokens(reading, top_k, phi):
    phi = torch.full((5,), phi, dtype=torch.float64)
    log_p, labels, sampled, target = reweighted(reading, phi, top_k)
    want = by_definition(log_p, phi, reading, top_k)
    torch.testing.assert_close(sampled, want.gather(1, labels[:, None])[:, 0], rtol=0, atol=1e-12)  # fp64
    ids = target.ids.long()
    torch.testing.assert_close(target.log_prob, want.gather(1, ids), rtol=0, atol=1e-12)
    tail = want.scatter(1, ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(target.log_tail, tail, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reading", ["token", "nucleus"])
@pytest.mark.parametrize("phi", [0.3, 0.5, 0.77, 1.0])
def test_normalised_readings_sum_to_one_and_flatten_what_they_temper(reading, phi):
    log_p, _, _, target = reweighted(reading, torch.full((5,), phi, dtype=torch.float64))
    mass = target.log_prob.exp().sum(1) + target.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-12)
    plain = log_p.gather(1, target.ids.long())
    # The gap between the two most likely tokens shrinks by phi; the nucleus of some rows holds one token alone.
    shrunk = (target.log_prob[:, 0] - target.log_prob[:, 1]) / (plain[:, 0] - plain[:, 1])
    assert (shrunk - phi).abs().min() < 1e-9 and (phi == 1 or (shrunk < 1 - 1e-9).any())


def test_nucleus_keeps_the_mass_of_the_tail_and_token_does_not():
    phi = torch.full((5,), 0.5, dtype=torch.float64)
    log_p, _, _, target = reweighted("nucleus", phi)
    tail = log_p.scatter(1, target.ids.long(), -torch.inf).logsumexp(1)
    torch.testing.assert_close(target.log_tail, tail, rtol=0, atol=1e-12)
    assert (reweighted("token", phi)[3].log_tail > tail + 0.1).all()


def test_unnormalized_has_the_direction_of_token():
    phi = torch.full((5,), 0.5, dtype=torch.float64)
    token, plain = reweighted("token", phi)[3], reweighted("unnormalized", phi)[3]
    mass = plain.log_prob.exp().sum(1) + plain.log_tail.exp()
    assert (mass > 1.5).all()
    torch.testing.assert_close(plain.log_prob - mass.log()[:, None], token.log_prob, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("phi_min", "error"), [(0.8, 1e-7), (0.5, 1e-4), (0.3, 1e-3)])
def test_tail_between_the_nodes_is_close_to_exact(phi_min, error):
    # Vocabulary and spread of a language model: log p of the tail from -8 to -40.
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(8, 20_000, dtype=torch.float64, generator=generator)
    tokens = reference_tokens(logits, torch.zeros(8, dtype=torch.long), k=64, nodes=phi_nodes(phi_min))
    tail = torch.log_softmax(logits, -1).scatter(1, tokens.ids.long(), -torch.inf)
    worst = 0.0
    for phi in torch.linspace(phi_min, 1, 23, dtype=torch.float64):
        got = tail_at(tokens.log_tail, phi.expand(8), phi_nodes(phi_min))
        worst = max(worst, float((got - (phi * tail).logsumexp(1)).abs().max()))
    assert worst < error


def test_tail_is_exact_at_the_nodes_and_empty_where_all_tokens_are_named():
    _, _, tokens = reference()
    for number, phi in enumerate(NODES):
        got = tail_at(tokens.log_tail, torch.full((5,), phi, dtype=torch.float64), NODES)
        torch.testing.assert_close(got, tokens.log_tail[:, number], rtol=0, atol=1e-13)  # fp64
    everything = tail_at(reference(50)[2].log_tail, torch.full((5,), 0.6), NODES)
    assert (everything == -math.inf).all()


def test_nodes_span_phi_and_are_one_where_it_is_always_one():
    assert phi_nodes(1.0) == (1.0,)
    assert phi_nodes(0.4)[0] == 1 and phi_nodes(0.4)[-1] == 0.4 and len(set(phi_nodes(0.4))) == 5


@pytest.mark.parametrize("phi", [0.0, -0.1, 1.1, math.nan])
def test_phi_outside_its_interval_is_refused_with_its_row(phi):
    with pytest.raises(ValueError, match="phi of row 3"):
        reweighted("token", torch.tensor([0.5, 0.5, 0.5, phi, 0.5]))


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.5, math.nan])
def test_top_p_outside_its_interval_is_refused(top_p):
    with pytest.raises(ValueError, match=r"top_p is .*allowed: \(0, 1\]"):
        nucleus(torch.zeros(1, 3), top_p)


def test_nucleus_is_the_fewest_most_likely_tokens():
    log_prob = torch.tensor([[0.5, 0.3, 0.1, 0.05]]).log()
    for top_p, want in ((0.3, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.85, 3), (1.0, 4)):
        assert nucleus(log_prob, top_p).sum() == want, top_p


# --- the reference pass ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reference_pass_is_the_same_in_any_chunks_and_leaves_its_input_alone(dtype):
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, labels = logits.clone(), torch.arange(9)
    whole = reference_tokens(logits, labels, k=4, nodes=NODES, chunk_rows=9)
    for chunk in (1, 4):
        for a, b in zip(reference_tokens(logits, labels, k=4, nodes=NODES, chunk_rows=chunk), whole):
            assert torch.equal(a, b)
    assert torch.equal(logits, before) and whole.log_prob.dtype == torch.promote_types(dtype, torch.float32)
    want = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(whole.label_log_prob.double(), want, rtol=0, atol=1e-6)  # fp32


def test_reference_rows_left_out_may_hold_nan():
    logits = torch.randn(4, 30)
    logits[2] = math.nan
    rows = torch.tensor([True, True, False, True])
    tokens = reference_tokens(logits, torch.zeros(4, dtype=torch.long), k=3, rows=rows)
    assert all((field[2] == 0).all() and torch.isfinite(field).all() for field in tokens)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_reference_logits_are_refused_with_their_row(bad):
    logits = torch.randn(4, 30)
    logits[2, 7] = bad
    with pytest.raises(ValueError, match="logits of row 2 hold NaN or infinity"):
        reference_tokens(logits, torch.zeros(4, dtype=torch.long), k=3)


@pytest.mark.parametrize("k", [0, 31])
def test_more_tokens_than_the_vocabulary_are_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}; allowed: 1 to the vocabulary's 30 tokens"):
        reference_tokens(torch.zeros(2, 30), torch.zeros(2, dtype=torch.long), k=k)


def sharded_pass(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        logits, labels = shard_case()
        half = slice(rank * 15, rank * 15 + 15)
        options = {"k": 20, "nodes": NODES, "group": dist.group.WORLD, "chunk_rows": 2}
        torch.save(tuple(reference_tokens(logits[:, half], labels, **options)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def shard_case():
    logits = 3 * torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[0, 0], logits[0, 15], logits[1, 14], logits[2, 29] = 9.0, 8.0, 9.0, 9.0  # edges of the shards
    return logits, torch.tensor([0, 14, 15, 29, 3])


def test_two_vocabulary_shards_give_one_reference_pass(tmp_path):
    mp.start_processes(sharded_pass, (str(tmp_path),), nprocs=2, start_method="fork")
    logits, labels = shard_case()
    whole = reference_tokens(logits, labels, k=20, nodes=NODES)  # k above a shard's 15 columns
    for rank in range(2):
        for a, b in zip(torch.load(tmp_path / f"{rank}.pt"), whole):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # sums in another order
