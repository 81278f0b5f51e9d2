"""The forward-KL estimators by exact enumeration: a row holds the whole vocabulary, the weights are pi_old's."""

import math
from collections.abc import Callable

import pytest
import torch
from verl.trainer.ppo.core_algos import kl_penalty

from rapo_verl.method.forward_kl import LOG_RHO_CLAMP, ForwardKL, forward_kl_estimate

ESTIMATORS = ("paper", "unbiased", "bounded")
VOCABULARY = 40
RHO_MAX = 6.0
# Sums of 40 products near 1 in float64 (2.2e-16 each), and rho up to about 1e3 on the far pair.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(name="far")
def far_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits of pi, log ref and log pi_old, far apart, every |log rho| well inside the numerical clamp."""
    generator = torch.Generator().manual_seed(7)
    logits, ref, shift = torch.randn(3, VOCABULARY, dtype=torch.float64, generator=generator)
    theta = 1.5 * logits
    return theta, torch.log_softmax(1.5 * ref, -1), torch.log_softmax(theta + 0.7 * shift, -1)


def estimate(log_prob, old_log_prob, ref_log_prob, estimator, *, mask=None, rho_max=RHO_MAX) -> ForwardKL:
    mask = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
    return forward_kl_estimate(log_prob, old_log_prob, ref_log_prob, mask, estimator=estimator, rho_max=rho_max)


def expectation(theta, old, ref, estimator, rho_max=RHO_MAX) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E over y ~ pi_old of the loss, and its gradient with respect to the logits."""
    theta = theta.clone().requires_grad_(True)
    log_prob = torch.log_softmax(theta, -1)
    loss = estimate(log_prob[None], old[None], ref[None], estimator, rho_max=rho_max).loss[0]
    value = (old.exp() * loss).sum()
    value.backward()
    return value.detach(), theta.grad


def differentiated(theta, function: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a function of log pi and its gradient with respect to the logits, by autograd."""
    theta = theta.clone().requires_grad_(True)
    value = function(torch.log_softmax(theta, -1))
    value.backward()
    return value.detach(), theta.grad


def forward_kl(theta, ref):
    return differentiated(theta, lambda log_prob: (ref.exp() * (ref - log_prob)).sum())


def reverse_kl(theta, ref):
    return differentiated(theta, lambda log_prob: (log_prob.exp() * (log_prob - ref)).sum())


def token_gradient(log_prob, old, ref, estimator, rho_max=RHO_MAX) -> torch.Tensor:
    log_prob = log_prob.clone().requires_grad_(True)
    estimate(log_prob, old, ref, estimator, rho_max=rho_max).loss.sum().backward()
    return log_prob.grad


# --- values and gradients by enumeration ---


def test_unbiased_on_policy_is_the_forward_kl_and_its_gradient(far):
    theta, ref, _ = far
    value, gradient = expectation(theta, torch.log_softmax(theta, -1), ref, "unbiased")
    want_value, want_gradient = forward_kl(theta, ref)
    torch.testing.assert_close(value, want_value, **EXACT)
    torch.testing.assert_close(gradient, want_gradient, **EXACT)


def test_unbiased_off_policy_is_the_forward_kl_and_its_gradient(far):
    theta, ref, old = far
    value, gradient = expectation(theta, old, ref, "unbiased")
    want_value, want_gradient = forward_kl(theta, ref)
    torch.testing.assert_close(value, want_value, **EXACT)
    torch.testing.assert_close(gradient, want_gradient, **EXACT)


def test_unbiased_gradient_is_policy_minus_reference(far):
    theta, ref, old = far
    torch.testing.assert_close(expectation(theta, old, ref, "unbiased")[1], theta.softmax(-1) - ref.exp(), **EXACT)


def test_paper_on_policy_value_is_the_forward_kl(far):
    theta, ref, _ = far
    value, _ = expectation(theta, torch.log_softmax(theta, -1), ref, "paper")
    torch.testing.assert_close(value, forward_kl(theta, ref)[0], **EXACT)


def test_paper_gradient_is_half_the_squared_log_ratio_under_the_reference(far):
    theta, ref, _ = far
    _, gradient = expectation(theta, torch.log_softmax(theta, -1), ref, "paper")
    _, want = differentiated(theta, lambda log_prob: 0.5 * (ref.exp() * (log_prob - ref) ** 2).sum())
    torch.testing.assert_close(gradient, want, **EXACT)


def test_paper_gradient_is_not_the_forward_kl(far):
    theta, ref, _ = far
    _, gradient = expectation(theta, torch.log_softmax(theta, -1), ref, "paper")
    _, other = forward_kl(theta, ref)
    # Both the size (here by more than 20 %) and the direction differ, so no learning rate mends it.
    assert (gradient - other).norm() > 0.2 * other.norm()
    assert torch.cosine_similarity(gradient, other, dim=0) < 0.99


def test_paper_meets_the_forward_kl_near_the_reference(far):
    theta, ref, _ = far
    near = ref + 1e-4 * theta
    _, gradient = expectation(near, torch.log_softmax(near, -1), ref, "paper")
    _, want = forward_kl(near, ref)
    # First order: they part by a share of about the log-ratio, 1e-4 times logits of a few units.
    assert (gradient - want).norm() < 1e-3 * want.norm()


def test_paper_is_biased_off_policy(far):
    theta, ref, old = far
    value, gradient = expectation(theta, old, ref, "paper")
    on_value, on_gradient = expectation(theta, torch.log_softmax(theta, -1), ref, "paper")
    # It carries no ratio pi / pi_old: off by more than a twentieth on this pair.
    assert abs(value - on_value) > 0.05 * on_value
    assert (gradient - on_gradient).norm() > 0.05 * on_gradient.norm()


@pytest.mark.parametrize("old_is_policy", [True, False])
def test_bounded_expected_gradient_is_that_of_the_clipped_coefficient(far, old_is_policy):
    theta, ref, old = far
    log_prob = torch.log_softmax(theta, -1)
    old = log_prob if old_is_policy else old
    _, gradient = expectation(theta, old, ref, "bounded", rho_max=3.0)
    clipped = (ref - log_prob).exp().clamp(max=3.0)
    assert (clipped == 3.0).any()
    # E_old[w (1 - min(rho, rho_max)) grad log pi]: pi_old cancels, whoever sampled.
    _, want = differentiated(theta, lambda x: (log_prob.exp() * (1 - clipped) * x).sum())
    torch.testing.assert_close(gradient, want, **EXACT)


def test_bounded_gradient_approaches_the_forward_kl_as_the_bound_grows(far):
    theta, ref, old = far
    _, want = forward_kl(theta, ref)
    errors = [(expectation(theta, old, ref, "bounded", rho_max=b)[1] - want).norm() for b in (1.5, 3.0, 6.0, 1e6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 * want.norm()  # 1e6 clips nothing here; the rest is float64 rounding


def test_bounded_value_is_a_lower_estimate(far):
    theta, ref, old = far
    assert 0 < expectation(theta, old, ref, "bounded")[0] < expectation(theta, old, ref, "unbiased")[0]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_unnormalised_reference_gives_the_generalised_kl(far, factor):
    theta, ref, old = far
    ref = ref + math.log(factor)
    value, gradient = expectation(theta, old, ref, "unbiased")
    want_value, want_gradient = differentiated(
        theta, lambda log_prob: (ref.exp() * (ref - log_prob) - ref.exp() + log_prob.exp()).sum()
    )
    torch.testing.assert_close(value, want_value, **EXACT)
    torch.testing.assert_close(gradient, want_gradient, **EXACT)


# --- one token at a time ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_coefficient_is_w_times_one_minus_the_smaller_rho(dtype):
    log_rho = torch.tensor([[-50.0, -20.0, -3.0, 0.0, 1.0, math.log(RHO_MAX), 1.8, 5.0, 20.0, 25.0, 50.0]], dtype=dtype)
    log_prob, old = torch.full_like(log_rho, -60.0), torch.full_like(log_rho, -60.3)
    got = token_gradient(log_prob, old, log_prob + log_rho, "bounded")
    want = (log_prob - old).exp() * (1 - log_rho.exp().clamp(max=RHO_MAX))
    # fp32: log-probs of size 60 carry 4e-6, which is the relative error of w and of rho.
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_bounded_pull_never_vanishes_beyond_the_bound():
    log_rho = torch.linspace(math.log(RHO_MAX) + 1e-3, 500.0, 400, dtype=torch.float64)[None]
    log_prob = torch.full_like(log_rho, -600.0)
    got = token_gradient(log_prob, log_prob, log_prob + log_rho, "bounded")
    # w = 1 and the bound is exp(log 6): a rounding of 6.
    torch.testing.assert_close(got, torch.full_like(got, 1 - RHO_MAX), rtol=1e-14, atol=0)


def test_bounded_equals_unbiased_bit_for_bit_inside_the_bound():
    generator = torch.Generator().manual_seed(0)
    log_prob, old = -torch.rand(2, 1, 200, dtype=torch.float64, generator=generator)
    log_rho = torch.linspace(-15, math.log(RHO_MAX) - 1e-9, 200, dtype=torch.float64)[None]
    ref = log_prob + log_rho
    assert torch.equal(estimate(log_prob, old, ref, "bounded").loss, estimate(log_prob, old, ref, "unbiased").loss)
    assert torch.equal(token_gradient(log_prob, old, ref, "bounded"), token_gradient(log_prob, old, ref, "unbiased"))


def test_bounded_value_is_the_tangent_beyond_the_bound():
    log_rho = torch.tensor([[math.log(RHO_MAX), 2.0, 4.0, 10.0]], dtype=torch.float64)
    zero = torch.zeros_like(log_rho)
    got = estimate(zero, zero - 0.2, log_rho, "bounded").loss
    at_bound = RHO_MAX * math.log(RHO_MAX) - RHO_MAX + 1
    want = math.exp(0.2) * (at_bound + math.log(RHO_MAX) * (log_rho.exp() - RHO_MAX))
    torch.testing.assert_close(got, want, **EXACT)


def test_bounded_value_is_continuous_with_its_slope_at_the_bound():
    step, bound = 1e-6, math.log(RHO_MAX)
    log_rho = torch.tensor([[bound - step, bound, bound + step]], dtype=torch.float64)
    zero = torch.zeros_like(log_rho)
    below, at, above = estimate(zero, zero, log_rho, "bounded").loss[0].tolist()
    slope = RHO_MAX * bound  # d(rho log rho - rho + 1)/dlog rho
    # One-sided differences err by step/2 times the second derivative, here about 17: 1e-5 with room.
    assert (at - below) / step == pytest.approx(slope, abs=2e-5)
    assert (above - at) / step == pytest.approx(slope, abs=2e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_descent_raises_log_prob_where_the_reference_is_larger_and_lowers_it_elsewhere(far, estimator):
    theta, ref, old = far
    log_prob = torch.log_softmax(theta, -1)
    descent = -token_gradient(log_prob[None], old[None], ref[None], estimator)[0]
    assert torch.equal(descent > 0, ref > log_prob)
    assert torch.equal(descent < 0, ref < log_prob)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_step_brings_the_policy_closer_to_the_reference(far, estimator):
    theta, ref, _ = far
    _, gradient = expectation(theta, torch.log_softmax(theta, -1), ref, estimator)
    assert forward_kl(theta - 0.05 * gradient, ref)[0] < forward_kl(theta, ref)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_swapping_reference_and_policy_changes_the_value(far, estimator):
    theta, ref, _ = far
    log_prob = torch.log_softmax(theta, -1)
    value, _ = expectation(theta, log_prob, ref, estimator)
    swapped, _ = expectation(ref, ref, log_prob, estimator)
    # 25 % on this pair, 4 % where the bound takes the large ratios off both: far from any rounding.
    assert abs(value - swapped) > 0.02 * value


@pytest.mark.parametrize("estimator", ("paper", "unbiased"))
def test_value_is_the_forward_and_not_the_reverse_kl(far, estimator):
    theta, ref, _ = far
    value, _ = expectation(theta, torch.log_softmax(theta, -1), ref, estimator)
    assert abs(value - forward_kl(theta, ref)[0]) < 1e-11  # float64 sum of 40 terms
    assert abs(value - reverse_kl(theta, ref)[0]) > 0.05 * value


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_is_never_negative(estimator):
    log_rho = torch.linspace(-60, 60, 4001, dtype=torch.float64)[None]
    old = torch.linspace(-2, 2, 4001, dtype=torch.float64)[None]
    loss = estimate(torch.zeros_like(log_rho), old, log_rho, estimator).loss
    # rho log rho - rho + 1 near rho = 1 is a difference of numbers near 1, times w <= e^2.
    assert loss.min() >= -1e-14
    assert (loss[log_rho.abs() > 0.1] > 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_and_gradient_are_exactly_zero_at_equality(far, estimator):
    _, ref, old = far
    assert (estimate(ref[None], old[None], ref[None], estimator).loss == 0).all()
    assert (token_gradient(ref[None], old[None], ref[None], estimator) == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_derivative_equals_gradient(estimator):
    generator = torch.Generator().manual_seed(3)
    log_prob, old = -3 * torch.rand(2, 4, 9, dtype=torch.float64, generator=generator)
    # Inside the numerical clamp of |log rho|, and off the bound, where the second derivative jumps.
    ref = log_prob + torch.linspace(-8, 5, 36, dtype=torch.float64).view(4, 9)
    log_prob.requires_grad_(True)
    # eps 1e-6: central differences err by 1e-12 times the third derivative (up to e^5), and by 1e-16 / eps times
    # values up to 1e3; 1e-5 covers both.
    assert torch.autograd.gradcheck(
        lambda x: estimate(x, old, ref, estimator).loss, (log_prob,), eps=1e-6, atol=1e-5, rtol=1e-5
    )


# --- masks, dtypes, batches ---


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["log_prob", "old_log_prob", "ref_log_prob"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_positions_touch_neither_value_nor_gradient(estimator, argument, bad):
    generator = torch.Generator().manual_seed(1)
    inputs = list(-2 * torch.rand(3, 3, 8, generator=generator))
    mask = torch.rand(3, 8, generator=generator) > 0.4
    mask[1] = False
    results = []
    for filler in (0.0, bad):
        x = [torch.where(mask, t, filler) if i == argument else t for i, t in enumerate(inputs)]
        x[0] = x[0].clone().requires_grad_(True)
        result = estimate(*x, estimator, mask=mask)
        result.loss.sum().backward()
        results.append((result, x[0].grad))
    (clean, clean_gradient), (dirty, gradient) = results
    assert torch.equal(gradient, clean_gradient) and (gradient[~mask] == 0).all()
    for got, want in zip(dirty, clean):
        assert torch.equal(got.detach(), want.detach())
        assert (got[~mask] == 0).all()


def test_integer_mask_equals_boolean_mask(far):
    theta, ref, old = far
    log_prob = torch.log_softmax(theta, -1)[None]
    mask = (torch.arange(VOCABULARY) % 3 > 0)[None]
    a = estimate(log_prob, old[None], ref[None], "bounded", mask=mask)
    b = estimate(log_prob, old[None], ref[None], "bounded", mask=mask.long())
    assert all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_flows_to_log_prob_only(far, estimator):
    theta, ref, old = far
    inputs = [x.clone()[None].requires_grad_(True) for x in (torch.log_softmax(theta, -1), old, ref)]
    result = estimate(*inputs, estimator)
    result.loss.sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is None and inputs[2].grad is None
    assert not result.log_rho.requires_grad and not result.ratio.requires_grad


def test_inputs_are_not_mutated(far):
    theta, ref, old = far
    inputs = [torch.log_softmax(theta, -1)[None], old[None].clone(), ref[None].clone()]
    before = [x.clone() for x in inputs]
    estimate(*inputs, "bounded")
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batch_order_and_split_change_nothing(estimator):
    generator = torch.Generator().manual_seed(2)
    inputs = -4 * torch.rand(3, 6, 7, generator=generator)
    whole, gradient = estimate(*inputs, estimator).loss, token_gradient(*inputs, estimator)
    order = torch.randperm(6, generator=generator)
    # Bit for bit: every token is a computation of its own.
    assert torch.equal(estimate(*inputs[:, order], estimator).loss, whole[order])
    assert torch.equal(token_gradient(*inputs[:, order], estimator), gradient[order])
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        parts = inputs.split(sizes, dim=1)
        assert torch.equal(torch.cat([estimate(*part, estimator).loss for part in parts]), whole)
        assert torch.equal(torch.cat([token_gradient(*part, estimator) for part in parts]), gradient)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_fp32(estimator, dtype):
    generator = torch.Generator().manual_seed(4)
    inputs = (-5 * torch.rand(3, 2, 9, generator=generator)).to(dtype)
    got, want = estimate(*inputs, estimator), estimate(*inputs.float(), estimator)
    assert got.loss.dtype == got.log_rho.dtype == got.ratio.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    gradient = token_gradient(*inputs, estimator)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, token_gradient(*inputs.float(), estimator).to(dtype))


def test_fp32_loss_stays_finite_for_any_finite_log_prob():
    values = torch.tensor([-1e30, -1e4, -60.0, -1.0, 0.0])
    log_prob, old, ref = (x.reshape(1, -1) for x in torch.meshgrid(values, values, values, indexing="ij"))
    for estimator in ESTIMATORS:
        assert torch.isfinite(estimate(log_prob, old, ref, estimator).loss).all()
        assert torch.isfinite(token_gradient(log_prob, old, ref, estimator)).all()


# --- what is logged ---


@pytest.mark.parametrize(
    ("estimator", "bound"), [("paper", LOG_RHO_CLAMP), ("unbiased", LOG_RHO_CLAMP), ("bounded", math.log(RHO_MAX))]
)
def test_clipped_marks_unmasked_tokens_beyond_the_bound(estimator, bound):
    log_rho = torch.tensor([[-30.0, 0.0, bound - 1e-6, bound + 1e-6, 50.0, 50.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    zero = torch.zeros_like(log_rho)
    clipped = estimate(zero, zero, log_rho, estimator, mask=mask).clipped
    assert clipped.dtype == torch.bool
    assert clipped.tolist() == [[False, False, False, True, True, False]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_log_rho_and_ratio_are_what_they_are_called(estimator):
    log_prob, old, ref = (torch.tensor([x], dtype=torch.float64) for x in ([-1.0, -52.0], [-1.5, -51.0], [-0.3, -2.0]))
    result = estimate(log_prob, old, ref, estimator)
    torch.testing.assert_close(result.log_rho, torch.tensor([[0.7, 50.0]], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(result.ratio, torch.tensor([[0.5, -1.0]], dtype=torch.float64).exp(), **EXACT)


# --- errors ---


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_different_shapes_raise_and_are_named(argument):
    tensors = [torch.zeros(2, 3) for _ in range(4)]
    tensors[argument] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"one shape.*\(2, 1\)"):
        forward_kl_estimate(*tensors, estimator="unbiased")


def test_unknown_estimator_raises_with_the_allowed_names():
    with pytest.raises(ValueError, match=r"'k3'.*paper, unbiased, bounded"):
        forward_kl_estimate(*torch.zeros(4, 1, 1), estimator="k3")


@pytest.mark.parametrize("rho_max", [1.0, 0.5, -3.0, math.nan])
def test_rho_max_of_one_or_less_raises(rho_max):
    with pytest.raises(ValueError, match="rho_max"):
        forward_kl_estimate(*torch.zeros(4, 1, 1), estimator="bounded", rho_max=rho_max)


# --- what our documents say of veRL and of the bound ---


def verl_gradient(theta, ref, kind) -> torch.Tensor:
    """Return the expected gradient of veRL's KL term used as a loss on samples of the policy."""
    theta = theta.clone().requires_grad_(True)
    log_prob = torch.log_softmax(theta, -1)
    (log_prob.detach().exp() * kl_penalty(log_prob, ref, kind)).sum().backward()
    return theta.grad


@pytest.mark.parametrize(
    ("kind", "target"),
    [("low_var_kl", "forward"), ("k3", "forward"), ("k2", "reverse"), ("k3+", "reverse"), ("k1", "nothing")],
)
def test_verl_kl_loss_descends_what_our_table_says(far, kind, target):
    theta, ref, _ = far
    close = ref + 0.3 * theta  # no clamp of veRL's acts on this pair
    forward, reverse = forward_kl(close, ref)[1], reverse_kl(close, ref)[1]
    assert (forward - reverse).norm() > 0.05 * forward.norm()  # the pair tells them apart
    want = {"forward": forward, "reverse": reverse, "nothing": torch.zeros_like(forward)}[target]
    torch.testing.assert_close(verl_gradient(close, ref, kind), want, **EXACT)


def test_verl_low_var_kl_loses_an_uncovered_mode_and_bounded_keeps_it(far):
    _, ref, _ = far
    mode = int(ref.argmax())
    theta = ref.clone()
    theta[mode] -= 5.0
    log_prob = torch.log_softmax(theta, -1)
    assert (ref - log_prob)[mode] > math.log(13.7)
    true = forward_kl(theta, ref)[1][mode]
    assert true < -0.1  # descent should raise it
    bounded = expectation(theta, log_prob, ref, "bounded")[1][mode]
    assert abs(verl_gradient(theta, ref, "low_var_kl")[mode]) < 0.05 * abs(true)
    assert expectation(theta, log_prob, ref, "unbiased")[1][mode] == pytest.approx(float(true), rel=1e-10)  # rounding
    # Weaker than the true pull by the clipping, never absent: pi (1 - 6) at least from the token itself.
    assert bounded < 3 * float(log_prob[mode].exp()) * (1 - RHO_MAX) / 5 < 0


@pytest.mark.parametrize(
    ("log_rho", "verl_has_a_gradient"), [(math.log(13.5), True), (math.log(13.7), False), (-10.9, True), (-11.1, False)]
)
def test_verl_low_var_kl_gradient_ends_where_our_document_says(log_rho, verl_has_a_gradient):
    log_prob = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    ref = torch.full((1, 1), log_rho, dtype=torch.float64)
    kl_penalty(log_prob, ref, "low_var_kl").sum().backward()
    assert bool(log_prob.grad != 0) is verl_has_a_gradient
    zero = torch.zeros(1, 1, dtype=torch.float64)
    want = 1 - min(math.exp(log_rho), RHO_MAX)
    assert float(token_gradient(zero, zero, ref, "bounded")) == pytest.approx(want, rel=1e-12)  # one exp and one sum


def test_bound_of_six_keeps_the_gradient_noise_of_a_sharpened_policy_below_one():
    # The claim beside rho_max in rapo_verl/method/config.py: 20,000 tokens with a peaked head, policy at T = 0.6.
    generator = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(20_000, dtype=torch.float64, generator=generator)
    logits[:20] += torch.linspace(14, 6, 20, dtype=torch.float64)
    log_prob, ref = torch.log_softmax(logits / 0.6, -1)[None], torch.log_softmax(logits, -1)[None]
    policy = log_prob[0].exp()

    def trace_variance(estimator: str) -> float:
        coefficient = token_gradient(log_prob, log_prob, ref, estimator)[0]
        mean = policy * coefficient - policy * (policy * coefficient).sum()
        # |e_y - pi|^2 = 1 - 2 pi_y + sum pi^2
        second = (policy * coefficient**2 * (1 - 2 * policy + (policy**2).sum())).sum()
        return float(second - mean @ mean)

    assert trace_variance("bounded") < 1
    assert trace_variance("unbiased") > 50  # 150 with other logits of this kind; the claim is the order of magnitude
