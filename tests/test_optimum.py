"""The closed-form optima: their first-order conditions, gradient descent, and what they say of support."""

import math

import numpy as np
import pytest
import torch
from scipy.special import xlogy

from rapo_verl.theory.optimum import forward_kl_optimum, rapo_optimum, reverse_kl_optimum

CASES = [(6, 0.5, 0.1), (40, 0.1, 0.02), (40, 1.0, 1.0), (200, 0.05, 1e-3), (200, 1e-3, 0.05), (1000, 0.3, 1e-4)]


def landscape(n: int, seed: int = 0, zeros: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards and a reference, a share of whose items is exactly zero."""
    rng = np.random.default_rng(seed)
    reward = rng.integers(0, 2, n) + 0.1 * rng.normal(size=n)
    reference = rng.dirichlet(np.full(n, 0.3)) * (rng.random(n) >= zeros)
    return reward, reference / reference.sum()


def objective(policy, r, p, *, alpha: float, beta: float = 0.0) -> float:
    """Return E_pi[r] - alpha KL(pi_ref ‖ pi) + beta H(pi); -inf where the policy lacks an item of the reference."""
    with np.errstate(divide="ignore"):
        kl, entropy = (xlogy(p, p) - xlogy(p, policy)).sum(), -xlogy(policy, policy).sum()
    return float((policy * r).sum() - alpha * kl + beta * entropy)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize(("n", "alpha", "beta"), CASES)
def test_rapo_optimum_meets_its_first_order_condition(n, alpha, beta, zeros):
    reward, reference = landscape(n, zeros=zeros)
    policy, multiplier = rapo_optimum(reward, reference, alpha=alpha, beta=beta)
    assert (policy > 0).all() or beta * 700 < np.ptp(reward) + alpha  # below e^-745 fp64 has no number
    seen = policy > 0
    slack = reward + alpha * reference / np.where(seen, policy, 1) - beta * (np.log(np.where(seen, policy, 1)) + 1)
    # fp64: terms of the size of lambda, each with a few roundings.
    np.testing.assert_allclose(slack[seen], multiplier, rtol=0, atol=1e-10 * (1 + abs(multiplier)))
    assert policy.sum() == pytest.approx(1, abs=1e-14)
    entropy = -(policy[seen] * np.log(policy[seen])).sum()
    assert multiplier == pytest.approx(policy @ reward + alpha + beta * (entropy - 1), abs=1e-10)


@pytest.mark.parametrize(("n", "alpha", "beta"), [(6, 0.5, 0.1), (40, 0.3, 0.1)])
def test_gradient_descent_ends_at_the_rapo_optimum(n, alpha, beta):
    reward, reference = landscape(n, zeros=0.3)
    policy, _ = rapo_optimum(reward, reference, alpha=alpha, beta=beta)
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    r, p = torch.tensor(reward), torch.tensor(reference)

    def closure():
        optimizer.zero_grad()
        log_pi = torch.log_softmax(logits, 0)
        loss = -((log_pi.exp() * r).sum() + alpha * (p * log_pi).sum() - beta * (log_pi.exp() * log_pi).sum())
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    optimizer.step(closure)
    found = torch.softmax(logits.detach(), 0).numpy()
    assert 0.5 * np.abs(found - policy).sum() < 1e-6  # total variation
    best, numerical = (objective(x, reward, reference, alpha=alpha, beta=beta) for x in (policy, found))
    assert best >= numerical - 1e-13


@pytest.mark.parametrize("alpha", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_forward_kl_optimum_meets_its_conditions(alpha, zeros):
    reward, reference = landscape(300, seed=1, zeros=zeros)
    policy, multiplier = forward_kl_optimum(reward, reference, alpha=alpha)
    on = reference > 0
    np.testing.assert_allclose(policy[on] * (multiplier - reward[on]), alpha * reference[on], rtol=1e-9, atol=1e-15)
    assert (reward[~on] <= multiplier + 1e-12).all() and policy.sum() == pytest.approx(1, abs=1e-12)
    assert ((policy[~on] == 0) | (np.abs(reward[~on] - multiplier) < 1e-12)).all()


def test_forward_kl_optimum_is_the_limit_of_the_rapo_optimum():
    reward, reference = landscape(50, seed=2)
    limit = forward_kl_optimum(reward, reference, alpha=0.1).policy
    near = rapo_optimum(reward, reference, alpha=0.1, beta=1e-7).policy
    assert 0.5 * np.abs(limit - near).sum() < 1e-4


@pytest.mark.parametrize(("correct", "alpha"), [(0.01, 0.1), (0.5, 1.0), (0.999, 0.02), (1e-9, 0.3)])
def test_binary_reward_has_the_known_multiplier(correct, alpha):
    policy, multiplier = forward_kl_optimum([1, 0], [correct, 1 - correct], alpha=alpha)
    want = ((1 + alpha) + math.sqrt((1 + alpha) ** 2 - 4 * alpha * (1 - correct))) / 2
    assert multiplier == pytest.approx(want, rel=1e-12)
    assert policy[0] == pytest.approx(alpha * correct / (want - 1), rel=1e-6)  # want - 1 cancels


def test_reverse_kl_optimum_is_the_tilted_reference_and_keeps_its_support():
    reward, reference = landscape(30, zeros=0.4)
    policy, multiplier = reverse_kl_optimum(reward, reference, alpha=0.2)
    tilted = reference * np.exp(reward / 0.2)
    np.testing.assert_allclose(policy, tilted / tilted.sum(), rtol=1e-12)
    assert ((policy > 0) == (reference > 0)).all()
    on = reference > 0
    slack = reward[on] - 0.2 * (np.log(policy[on] / reference[on]) + 1)
    np.testing.assert_allclose(slack, multiplier, atol=1e-12)  # fp64
    np.testing.assert_allclose(reverse_kl_optimum([800.0, 0], [0.5, 0.5], alpha=1e-3).policy, [1, 0])


def test_mass_off_the_support_as_the_paper_says():
    reward, reference = [1.0, 1.0, 0.0], [0.2, 0.0, 0.8]
    assert reverse_kl_optimum(reward, reference, alpha=0.3).policy[1] == 0
    assert forward_kl_optimum(reward, reference, alpha=0.3).policy[1] == 0
    assert rapo_optimum(reward, reference, alpha=0.3, beta=0.1).policy[1] > 0.05


def test_forward_kl_leaves_the_support_where_the_best_reward_is_off_it():
    # lambda = 2, pi_0 = 0.3 * 1 / (2 - 1); the rest to the two best, in equal shares.
    policy, multiplier = forward_kl_optimum([1, 2, 2, 0], [1, 0, 0, 0], alpha=0.3)
    np.testing.assert_allclose(policy, [0.3, 0.35, 0.35, 0], atol=1e-15)
    assert multiplier == 2
    # With a large alpha nothing is left for them.
    assert forward_kl_optimum([1, 2, 2, 0], [1, 0, 0, 0], alpha=3.0).policy[1] == 0


@pytest.mark.parametrize("optimum", [forward_kl_optimum, rapo_optimum])
def test_random_policies_are_no_better(optimum):
    reward, reference = landscape(8, seed=3)
    beta = {"beta": 0.05} if optimum is rapo_optimum else {}
    best = objective(optimum(reward, reference, alpha=0.2, **beta).policy, reward, reference, alpha=0.2, **beta)
    rng = np.random.default_rng(0)
    for policy in rng.dirichlet(np.full(8, 0.5), 2000):
        assert objective(policy, reward, reference, alpha=0.2, **beta) <= best


def test_single_item_has_all_the_mass():
    for found in (
        reverse_kl_optimum([2.0], [1.0], alpha=0.1),
        forward_kl_optimum([2.0], [1.0], alpha=0.1),
        rapo_optimum([2.0], [1.0], alpha=0.1, beta=0.1),
    ):
        np.testing.assert_allclose(found.policy, [1.0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1, 0], [0.5, 0.6], 0.1, 0.1), "sum to one"),
        (([1, 0], [1.5, -0.5], 0.1, 0.1), "must be >= 0"),
        (([1, 0], [np.nan, 1.0], 0.1, 0.1), "must be >= 0"),
        (([1, np.inf], [0.5, 0.5], 0.1, 0.1), "reward of item 1 is inf"),
        (([1, 0, 0], [0.5, 0.5], 0.1, 0.1), "one shape"),
        (([], [], 0.1, 0.1), "one shape"),
        (([1, 0], [0.5, 0.5], 0.0, 0.1), "alpha is 0.0"),
        (([1, 0], [0.5, 0.5], 0.1, -1.0), "beta is -1.0"),
        (([1, 0], [0.5, 0.5], np.nan, 0.1), "alpha is nan"),
    ],
)
def test_impossible_input_is_refused(arguments, said):
    reward, reference, alpha, beta = arguments
    with pytest.raises(ValueError, match=said):
        rapo_optimum(reward, reference, alpha=alpha, beta=beta)
    if "beta" not in said:
        for optimum in (reverse_kl_optimum, forward_kl_optimum):
            with pytest.raises(ValueError, match=said):
                optimum(reward, reference, alpha=alpha)
