"""The table of estimators: each row's claim."""

import pytest
import torch
from verl.trainer.ppo.core_algos import kl_penalty

from rapo_verl.theory.estimator_table import (
    FAR,
    NEAR,
    forward_gradient,
    make_pair,
    moments,
    quality,
    reverse_gradient,
    sampled,
)  # fmt: skip

# Sums of 64 products in fp64, and rho up to 1e3.
EXACT = 1e-9


@pytest.mark.parametrize("distance", [NEAR, FAR])
def test_true_gradients_are_those_of_autograd(distance):
    pair = make_pair(distance, updates=4)
    for function, by_hand in (
        (lambda x: (pair.log_ref.exp() * (pair.log_ref - x)).sum(), forward_gradient(pair)),
        (lambda x: (x.exp() * (x - pair.log_ref)).sum(), reverse_gradient(pair)),
    ):
        leaf = pair.logits.clone().requires_grad_(True)
        function(torch.log_softmax(leaf, -1)).backward()
        torch.testing.assert_close(leaf.grad, by_hand, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["bounded", "paper", "low_var_kl", "k3+"])
def test_moments_are_those_of_samples_enumerated_one_by_one(name):
    pair = make_pair(FAR, updates=4)
    gradients = []
    for token in range(len(pair.logits)):
        leaf = pair.logits.clone().requires_grad_(True)
        log_pi = torch.log_softmax(leaf, -1)[token : token + 1]
        here = slice(token, token + 1)
        sampled(name)(log_pi, pair.log_old[here], pair.log_ref[here]).sum().backward()
        gradients.append(leaf.grad)
    weight = pair.log_old.exp()
    want = (weight[:, None] * torch.stack(gradients)).sum(0)
    mean, variance = moments(name, pair)
    torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-12)
    spread = sum(w * ((g - want) ** 2).sum() for w, g in zip(weight, gradients))
    assert variance == pytest.approx(float(spread), rel=1e-9)


@pytest.mark.parametrize("updates", [0, 1, 4, 16])
@pytest.mark.parametrize("distance", [NEAR, FAR])
def test_unbiased_and_full_descend_the_forward_kl_anywhere(distance, updates):
    pair = make_pair(distance, updates=updates)
    for name in ("unbiased", "full"):
        found = quality(name, pair)
        assert found.forward < EXACT and found.reverse > 0.1
    assert quality("full", pair).variance == 0


def test_verl_estimators_descend_what_the_table_says_near_the_reference():
    on, off = (make_pair(NEAR, updates=updates) for updates in (0, 4))
    assert quality("low_var_kl", on).forward < EXACT < 0.1 < quality("low_var_kl", on).reverse
    for name in ("k2", "k3+"):
        assert quality(name, on).reverse < EXACT < 0.1 < quality(name, on).forward
    assert moments("k1", on)[0].norm() < EXACT
    for name in ("low_var_kl", "k2", "k3+"):
        assert min(quality(name, off).forward, quality(name, off).reverse) > 0.1


def test_verl_clamp_loses_the_forward_gradient_far_from_the_reference():
    pair = make_pair(FAR)
    log_pi = torch.log_softmax(pair.logits, -1)
    clamped = kl_penalty(log_pi, pair.log_ref, "low_var_kl") == 10
    assert clamped.any()
    found = quality("low_var_kl", pair)
    assert found.forward > 0.1 > EXACT > quality("unbiased", pair).forward
    lost = moments("low_var_kl", pair)[0] - forward_gradient(pair)
    assert lost[clamped].norm() > 0.5 * lost.norm()  # it is those tokens that lose it


def test_paper_is_half_the_squared_log_ratio_under_the_reference():
    pair = make_pair(FAR)
    leaf = pair.logits.clone().requires_grad_(True)
    (0.5 * pair.log_ref.exp() * (torch.log_softmax(leaf, -1) - pair.log_ref) ** 2).sum().backward()
    torch.testing.assert_close(moments("paper", pair)[0], leaf.grad, rtol=1e-9, atol=1e-12)
    assert quality("paper", pair).forward > 0.2 > quality("paper", make_pair(1e-3)).forward


def test_bounded_trades_variance_for_bias_and_topk_has_none_of_the_first():
    near, far = (make_pair(distance) for distance in (NEAR, FAR))
    assert quality("bounded", near).forward < EXACT
    bounded, unbiased, paper = (quality(name, far) for name in ("bounded", "unbiased", "paper"))
    assert bounded.variance < unbiased.variance / 3 < paper.variance and 0 < bounded.forward < 0.7
    topk = quality("topk", far)
    assert topk.variance == 0 and 0 < topk.forward < 0.2


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown estimator 'k9'"):
        sampled("k9")
