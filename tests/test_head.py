"""The head's three outputs and their gradient: by autograd, in shards and chunks, and for faults known elsewhere."""

import itertools
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rapo_verl.method import head as head_module
from rapo_verl.method.head import HeadOutput, Target, chunk_size, head

ROWS, VOCABULARY, K = 11, 38, 5
# fp64 sums of 38 terms of size up to 1e2.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
# fp32: 1.2e-7 a step, sums of 38 terms of size 10.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}


class Case:
    """Logits, labels, temperatures and a target, with the k most likely tokens of another distribution named."""

    def __init__(self, *, k=K, dtype=torch.float64, seed=0, rows=ROWS, scale=3.0, mass=1.0, vocabulary=VOCABULARY):
        generator = torch.Generator().manual_seed(seed)
        self.logits = (scale * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)).to(dtype)
        self.labels = torch.randint(0, vocabulary, (rows,), generator=generator)
        self.temperature = 0.5 + torch.rand(rows, dtype=torch.float64, generator=generator)
        other = torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator) * scale
        self.log_q = torch.log_softmax(other, -1) + torch.tensor(mass, dtype=torch.float64).log()
        top = self.log_q.topk(k, -1)
        self.target = Target(top.indices.int(), top.values, off(self.log_q, top.indices))
        self.weights = torch.randn(3, rows, dtype=torch.float64, generator=generator)

    def run(self, logits=None, weights=None, chunk_rows=None, **options) -> tuple[HeadOutput, torch.Tensor]:
        logits = (self.logits if logits is None else logits).clone().requires_grad_(True)
        options = {"temperature": self.temperature, "target": self.target} | options
        weights = self.weights if weights is None else weights
        with chunks_of(chunk_rows) if chunk_rows else nullcontext():
            out = head(logits, self.labels, **options)
            sum((w.to(x.dtype) * x).sum() for w, x in zip(weights, out)).backward()
        return HeadOutput(*(x.detach() for x in out)), logits.grad


def chunks_of(rows: int):
    """Let the head take so many tokens at a time."""
    return mock.patch.object(head_module, "chunk_size", lambda *_: rows)


def off(log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return log of the mass off ``ids``, by a masked sum."""
    return log_q.scatter(1, ids, -torch.inf).logsumexp(1)


def by_autograd(case: Case, logits=None, temperature=None) -> tuple[HeadOutput, torch.Tensor]:
    """Return the same from the definitions, in fp64."""
    logits = (case.logits if logits is None else logits).double().clone().requires_grad_(True)
    temperature = case.temperature if temperature is None else temperature
    ids = case.target.ids.long()
    log_p = torch.log_softmax(logits / temperature[:, None], -1)
    q, q_tail = case.target.log_prob.double().exp(), case.target.log_tail.double().exp()
    p, p_tail = log_p.gather(1, ids).exp(), off(log_p, ids).exp()
    kl = (q * (case.target.log_prob.double() - log_p.gather(1, ids)) - q + p).sum(1)
    if ids.shape[1] < logits.shape[1]:
        kl = kl + q_tail * (case.target.log_tail.double() - off(log_p, ids)) - q_tail + p_tail
    out = HeadOutput(log_p.gather(1, case.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), kl)
    sum((w * x).sum() for w, x in zip(case.weights, out)).backward()
    return HeadOutput(*(x.detach() for x in out)), logits.grad


def assert_same(got, want, **tolerance):
    for a, b in zip((*got[0], got[1]), (*want[0], want[1])):
        torch.testing.assert_close(a.double(), b.double(), **(tolerance or EXACT))


# --- values and gradient ---


@pytest.mark.parametrize("k", [1, K, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("mass", [1.0, 2.5])
def test_values_and_gradient_are_those_of_the_definitions(k, mass):
    case = Case(k=k, mass=mass)
    assert_same(case.run(chunk_rows=3), by_autograd(case))


@pytest.mark.parametrize("only", range(3))
def test_each_output_has_its_own_gradient(only):
    case = Case()
    case.weights = torch.zeros(3, ROWS, dtype=torch.float64).index_fill_(0, torch.tensor([only]), 1.0)
    want = by_autograd(case)
    assert_same(case.run(), want)
    logits = case.logits.clone().requires_grad_(True)
    head(logits, case.labels, temperature=case.temperature, target=case.target)[only].sum().backward()
    torch.testing.assert_close(logits.grad, want[1], **EXACT)  # the others' gradients are not even given
    assert want[1].abs().max() > 0.1


def test_gradcheck_in_fp64():
    case = Case(rows=4)

    def function(logits):
        return tuple(head(logits, case.labels, temperature=case.temperature, target=case.target))

    with chunks_of(3):
        assert torch.autograd.gradcheck(function, (case.logits.clone().requires_grad_(True),))


def test_forward_kl_is_zero_at_equality_positive_elsewhere_and_has_its_direction():
    case = Case()
    log_p = torch.log_softmax(case.logits, -1)
    ids = log_p.topk(K, -1).indices
    same = Target(ids, log_p.gather(1, ids), off(log_p, ids))
    out, gradient = case.run(temperature=1.0, target=same, weights=torch.tensor([[0.0], [0.0], [1.0]]))
    assert out.forward_kl.abs().max() < 1e-14 and gradient.abs().max() < 1e-14  # rounding of fp64
    forward = case.run()[0].forward_kl
    assert (forward > 0).all()
    log_q = case.target.log_prob
    there = Target(case.target.ids, torch.log_softmax(case.logits, -1).gather(1, case.target.ids.long()), None)
    there = there._replace(log_tail=off(torch.log_softmax(case.logits, -1), case.target.ids.long()))
    backward = head(case.log_q, case.labels, target=there).forward_kl
    assert log_q.shape == there.log_prob.shape and (forward - backward).abs().min() > 1e-3


def test_forward_kl_grows_to_that_of_the_vocabulary_with_k():
    values = [Case(k=k).run()[0].forward_kl for k in (1, 3, 10, 30, VOCABULARY)]
    for smaller, larger in itertools.pairwise(values):
        assert (larger >= smaller - 1e-12).all()  # fp64 rounding
    case = Case()
    log_p = torch.log_softmax(case.logits / case.temperature[:, None], -1)
    torch.testing.assert_close(values[-1], (case.log_q.exp() * (case.log_q - log_p)).sum(1), **EXACT)


def test_input_is_not_changed():
    case = Case(dtype=torch.float32)
    logits = case.logits.clone().requires_grad_(True)
    before = logits.detach().clone()
    sum(x.sum() for x in head(logits, case.labels, target=case.target)).backward()
    assert torch.equal(logits.detach(), before) and logits._version == 0


@pytest.mark.parametrize("some_rows", [False, True])
def test_gradient_in_place_of_the_logits_is_the_same_and_cannot_be_taken_twice(some_rows):
    case = Case()
    rows = torch.arange(ROWS) % 3 != 1 if some_rows else None
    _, want = case.run(rows=rows)
    leaf = case.logits.clone().requires_grad_(True)
    logits = leaf * 1.0  # a result, as a model's logits are
    with chunks_of(3):
        out = head(
            logits, case.labels, temperature=case.temperature, target=case.target, rows=rows, gradient_in_place=True
        )
        loss = sum((w * x).sum() for w, x in zip(case.weights, out))
        loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, want) and torch.equal(logits.detach(), want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_target_without_mass_gives_no_kl_and_no_gradient():
    case = Case()
    empty = Target(case.target.ids, torch.full((ROWS, K), -torch.inf), torch.full((ROWS,), -torch.inf))
    out, gradient = case.run(target=empty)
    alone, want = case.run(target=None)
    assert (out.forward_kl == 0).all()
    torch.testing.assert_close(out.log_prob, alone.log_prob, **EXACT)
    torch.testing.assert_close(gradient, want, **EXACT)


# --- invariance ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_and_micro_batches_change_nothing(dtype):
    case = Case(dtype=dtype)
    whole = case.run(chunk_rows=ROWS)
    for chunk in (1, 2, 4, 100):
        for a, b in zip((*case.run(chunk_rows=chunk)[0], case.run(chunk_rows=chunk)[1]), (*whole[0], whole[1])):
            assert torch.equal(a, b)  # rows are computed alone: bit for bit
    first, second = (
        head(case.logits[part], case.labels[part], temperature=case.temperature[part],
             target=Target(*(x[part] for x in case.target)))
        for part in (slice(0, 4), slice(4, None))
    )  # fmt: skip
    for a, b, c in zip(first, second, whole[0]):
        assert torch.equal(torch.cat([a, b]), c)


def test_rows_left_out_may_hold_nan_and_get_no_gradient():
    case = Case()
    rows = torch.arange(ROWS) % 3 != 1
    want = case.run(weights=case.weights * rows)
    case.logits[~rows] = torch.nan
    case.labels[~rows] = -100
    case.temperature[~rows] = 0
    case.target.log_prob[~rows] = torch.nan
    case.target.ids[~rows] = 0  # named five times
    out, gradient = case.run(rows=rows, chunk_rows=2)
    for a, b in zip(out, want[0]):
        assert (a[~rows] == 0).all()
        torch.testing.assert_close(a[rows], b[rows], **EXACT)
    torch.testing.assert_close(gradient, want[1], **EXACT)
    assert (gradient[~rows] == 0).all()
    nothing, gradient = case.run(rows=torch.zeros(ROWS, dtype=torch.bool))
    assert all((x == 0).all() for x in (*nothing, gradient))


def test_autocast_changes_no_bit():
    case = Case(dtype=torch.bfloat16)
    want = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run()
    assert all(torch.equal(a, b) for a, b in zip((*got[0], got[1]), (*want[0], want[1])))


# --- precision ---


def test_bf16_logits_are_computed_in_fp32():
    case = Case(dtype=torch.bfloat16)
    out, gradient = case.run()
    want, want_gradient = by_autograd(case)
    assert all(x.dtype == torch.float32 for x in out) and gradient.dtype == torch.bfloat16
    for a, b in zip(out, want):
        torch.testing.assert_close(a.double(), b, **SINGLE)
    # The gradient alone is rounded to bf16: 8 bits.
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=2**-8, atol=1e-6)


def test_log_prob_of_a_rare_token_keeps_fp32():
    # Elsewhere: log-probs rounded to bf16 are off by 0.03 at -12.
    logits = torch.zeros(1, 100)
    logits[0, 0] = 12.3456
    got = head(logits, torch.tensor([7])).log_prob
    want = torch.log_softmax(logits.double(), -1)[0, 7]
    assert abs(float(got - want)) < 2e-6


@pytest.mark.parametrize("gap", [10.0, 14.0, 18.0])
def test_small_tail_is_a_masked_sum(gap):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 4096, generator=generator)
    logits[:, :8] += gap
    reference = torch.log_softmax(torch.randn(64, 4096, dtype=torch.float64, generator=generator), -1)
    ids = torch.arange(8).expand(64, 8)
    target = Target(ids, reference.gather(1, ids), off(reference, ids))
    got = head(logits, ids[:, 0], target=target).forward_kl.double()
    log_p = torch.log_softmax(logits.double(), -1)
    named = (target.log_prob.exp() * (target.log_prob - log_p.gather(1, ids))).sum(1)
    want = named + target.log_tail.exp() * (target.log_tail - off(log_p, ids))
    # One minus the rest would be off by 33 % in the tail's mass at 1e-5, which is 0.3 nats here.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert off(log_p, ids).exp().mean() < 0.05


def test_sharp_policy_under_a_flat_reference_has_an_exact_gradient():
    # The tail's Q / P is about 1e12 here; a gradient that adds it to a named column and takes it off again is noise.
    logits = torch.zeros(1, 50)
    logits[0, :3] = torch.tensor([30.0, 29.0, 31.0])
    case = Case(rows=1)
    case.logits, case.labels = torch.nn.functional.pad(logits, (0, VOCABULARY - 50)), torch.tensor([1])
    reference = torch.full((1, VOCABULARY), -torch.log(torch.tensor(float(VOCABULARY))), dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2]])
    case.target, case.temperature = Target(ids, reference.gather(1, ids), off(reference, ids)), torch.ones(1).double()
    case.weights = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    _, got = case.run()
    torch.testing.assert_close(got.double(), by_autograd(case)[1], **SINGLE)


def test_tail_below_the_smallest_number_stays_finite():
    logits = torch.zeros(1, 10)
    logits[0, 0] = 500.0
    target = Target(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    logits.requires_grad_(True)
    out = head(logits, torch.tensor([0]), target=target)
    out.forward_kl.sum().backward()
    assert 0 < out.forward_kl < 100 and torch.isfinite(logits.grad).all()


# --- faults known elsewhere ---


def test_a_target_that_misses_mass_scales_the_softmax_by_the_mass_it_has():
    # Elsewhere: p - q whatever mass q has. Here a target of 0.3 without a tail: 0.3 p - q.
    case = Case()
    q = case.target.log_prob - case.target.log_prob.logsumexp(1, keepdim=True) + math.log(0.3)
    case.target = Target(case.target.ids, q, torch.full((ROWS,), -torch.inf, dtype=torch.float64))
    case.weights = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64).expand(3, ROWS)
    _, got = case.run(temperature=1.0)
    want = 0.3 * torch.softmax(case.logits, -1)
    want.scatter_add_(1, case.target.ids.long(), -q.exp())
    torch.testing.assert_close(got, want, **EXACT)


def test_entropy_has_a_gradient():
    # Elsewhere: dropped in silence. Descent of -H flattens: the largest logit falls.
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    (-head(logits, torch.tensor([2])).entropy).sum().backward()
    assert logits.grad[0, 0] > 0.05 and logits.grad[0, 2] < -0.05


def test_logits_changed_between_forward_and_backward_are_an_error_and_not_a_wrong_gradient():
    # Elsewhere: an in-place cross-entropy turns the saved logits into its gradient.
    case = Case()
    leaf = case.logits.clone().requires_grad_(True)
    logits = leaf * 1.0
    out = head(logits, case.labels, target=case.target)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.forward_kl.sum().backward()


def test_two_outputs_of_one_head_share_one_backward():
    case = Case()
    leaf = case.logits.clone().requires_grad_(True)
    out = head(leaf, case.labels, temperature=case.temperature, target=case.target)
    (case.weights[0] * out.log_prob).sum().backward(retain_graph=True)
    (case.weights[1] * out.entropy + case.weights[2] * out.forward_kl).sum().backward()
    torch.testing.assert_close(leaf.grad, by_autograd(case)[1], **EXACT)


# --- memory ---


@pytest.mark.parametrize(
    ("dtype", "in_place", "backward"),
    [(torch.float32, False, 1.15), (torch.bfloat16, False, 0.65), (torch.float32, True, 0.15)],
)
@pytest.mark.parametrize("some_rows", [False, True])
def test_memory_stays_within_its_budget(dtype, in_place, backward, some_rows):
    from benchmarks.head import Memory

    n, vocabulary, k = 2048, 4096, 8
    logits = torch.randn(n, vocabulary).to(dtype).requires_grad_(True)
    logits = logits * 1.0 if in_place else logits
    top = torch.log_softmax(torch.randn(n, vocabulary), -1).topk(k, -1)
    target = Target(top.indices, top.values, (1 - top.values.exp().sum(1)).log())
    labels = torch.randint(0, vocabulary, (n,))
    rows = torch.arange(n) % 5 > 0 if some_rows else None
    with Memory() as memory, chunks_of(n // 32):
        out = head(logits, labels, target=target, rows=rows, gradient_in_place=in_place)
        forward, saved = memory.peak, memory.live
        memory.peak = memory.live
        torch.autograd.grad(sum(x.sum() for x in out), logits)
    unit = n * vocabulary * 4
    assert forward / unit <= 0.10 and saved / unit <= 0.01 and memory.peak / unit <= backward


def test_chunk_size_keeps_to_a_share_of_the_tokens():
    for n, columns in ((4096, 38016), (8192, 152064), (5, 100), (10**6, 30)):
        assert 1 <= chunk_size(n, columns, torch.device("cuda")) <= max(1, n // 32)


# --- errors ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.full((ROWS,), VOCABULARY)}, "row 0 has a label outside the vocabulary of 38"),
        ({"labels": torch.zeros(ROWS)}, "labels has dtype torch.float32; allowed: int"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must have 11 rows as the logits, got shape \(3,\)"),
        ({"temperature": torch.zeros(ROWS)}, "row 0 has a temperature that is not positive"),
        ({"temperature": torch.ones(2)}, "temperature must have 11 rows"),
        ({"rows": torch.ones(ROWS)}, "rows has dtype torch.float32; allowed: bool"),
        ({"logits": torch.zeros(ROWS)}, "logits must be float"),
        ({"logits": torch.zeros(ROWS, VOCABULARY, dtype=torch.long)}, "logits must be float"),
    ],
)
def test_bad_input_is_refused(change, said):
    case = Case()
    arguments = {"logits": case.logits, "labels": case.labels, "target": case.target} | change
    with pytest.raises(ValueError, match=said):
        head(**arguments)


@pytest.mark.parametrize(
    ("field", "row", "value", "said"),
    [
        ("ids", 4, VOCABULARY, "row 4 has a target id outside the vocabulary of 38"),
        ("ids", 2, -1, "row 2 has a target id outside"),
        ("log_prob", 3, torch.nan, "row 3 has a target log-probability that is NaN"),
        ("log_tail", 9, torch.inf, "row 9 has a target log-probability"),
    ],
)
def test_bad_target_is_refused_with_its_row(field, row, value, said):
    case = Case()
    bad = getattr(case.target, field).clone()
    bad[row] = value
    with pytest.raises(ValueError, match=said):
        case.run(target=case.target._replace(**{field: bad}))
    kept = torch.arange(ROWS) != row
    case.run(target=case.target._replace(**{field: bad}), rows=kept)


def test_duplicate_target_id_is_refused_with_its_row():
    case = Case()
    ids = case.target.ids.clone()
    ids[6, 1] = ids[6, 4]
    with pytest.raises(ValueError, match="row 6 has a target id twice"):
        case.run(target=case.target._replace(ids=ids))


def test_more_names_than_tokens_are_refused():
    ids = torch.arange(40).expand(2, 40)
    target = Target(ids, torch.zeros(2, 40), torch.zeros(2))
    with pytest.raises(ValueError, match="names 40 tokens of a vocabulary of 38"):
        head(torch.zeros(2, 38), torch.zeros(2, dtype=torch.long), target=target)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits_are_refused_with_their_row(bad):
    case = Case()
    case.logits[5, 17] = bad
    with pytest.raises(ValueError, match="logits of row 5 hold NaN or infinity"):
        case.run(chunk_rows=2)


# --- two processes ---


def sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        case = edge_case()
        half = VOCABULARY // 2
        out, gradient = case.run(
            case.logits[:, rank * half : (rank + 1) * half], group=dist.group.WORLD, rows=edge_rows(), chunk_rows=4
        )
        torch.save((tuple(out), gradient), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def edge_case() -> Case:
    """Return a case that names the first and last column of either shard, and column 0 in some rows only."""
    case = Case()
    half = VOCABULARY // 2
    ids = case.target.ids.long()
    for row in range(ROWS):
        ids[row] = torch.tensor([[half - 1, half, VOCABULARY - 1, 3, 0], [half, half + 1, half + 2, half + 3, 0],
                                 [1, 2, 3, 4, half - 1], [half, 37, 36, 35, 34]][row % 4])  # fmt: skip
    case.target = Target(ids, case.log_q.gather(1, ids), off(case.log_q, ids))
    case.labels[:4] = torch.tensor([0, half - 1, half, VOCABULARY - 1])
    return case


def edge_rows() -> torch.Tensor:
    return torch.arange(ROWS) != 6


def test_two_vocabulary_shards_are_one_head():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(sharded, (folder,), nprocs=2, start_method="fork")
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    case = edge_case()
    case.weights = case.weights * edge_rows()
    want, gradient = case.run(rows=edge_rows())
    for part in parts:
        for a, b in zip(part[0], want):
            torch.testing.assert_close(a, b, **EXACT)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), gradient, **EXACT)
    assert_same(case.run(), by_autograd(case))
