"""The forward KL from the reference's answers, by enumeration of every answer of a tiny vocabulary."""

import itertools
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from rapo_verl.method.reference_answers import answer_shares, drawn_shares, reference_answers_loss, token_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from ladder_losses import mixture_weights

LENGTH, VOCABULARY = 3, 3
ANSWERS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # all 27
RIGHT = (ANSWERS.sum(1) % 4 == 1).logical_or(ANSWERS[:, 0] == 2)
# Sums of 81 products near 1 in float64.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def logits(seed: int, scale: float = 1.5) -> torch.Tensor:
    """A policy whose every token has logits of its own: one table per position and previous token."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(LENGTH, VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator)


def token_log_prob(theta: torch.Tensor, answers: torch.Tensor = ANSWERS) -> torch.Tensor:
    previous = torch.cat([torch.zeros_like(answers[:, :1]), answers[:, :-1]], 1)
    table = theta.log_softmax(-1)
    return torch.stack([table[t, previous[:, t], answers[:, t]] for t in range(LENGTH)], 1)


def log_prob(theta: torch.Tensor) -> torch.Tensor:
    return token_log_prob(theta).sum(1)


def gradient(function) -> torch.Tensor:
    theta = logits(1).requires_grad_(True)
    function(theta).backward()
    return theta.grad


@pytest.mark.parametrize("weight_of_wrong", [0.0, 0.25, 1.0])
def test_gradient_is_the_forward_kls_to_the_reweighted_reference(weight_of_wrong):
    reference = log_prob(logits(2)).exp()
    # The reference in whole numbers, as counts of a sample that holds every answer in its proportion.
    shares = answer_shares(reference * 1e6, RIGHT, weight_of_wrong=weight_of_wrong)
    target = reference * torch.where(RIGHT, 1.0, weight_of_wrong)
    target = target / target.sum()
    torch.testing.assert_close(shares, target, **EXACT)
    weights = token_weights(shares, torch.full((27,), LENGTH), loss_agg_mode="seq-mean-token-sum")
    got = gradient(lambda theta: reference_answers_loss(token_log_prob(theta), torch.ones(27, LENGTH), weights))

    def forward_kl(theta):
        return (target * (target.clamp_min(1e-300).log() - log_prob(theta))).sum()

    torch.testing.assert_close(got, gradient(forward_kl), **EXACT)
    # And not the other KL's: the directions differ.
    other = gradient(lambda theta: (log_prob(theta).exp() * (log_prob(theta) - log_prob(logits(2)))).sum())
    assert not torch.allclose(got, other, rtol=0.1)


def test_its_minimum_keeps_the_references_proportions_among_right_answers():
    reference = log_prob(logits(2)).exp()
    theta = logits(1).requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)
    weights = answer_shares(reference, RIGHT)

    def closure():
        optimizer.zero_grad()
        loss = reference_answers_loss(token_log_prob(theta), torch.ones(27, LENGTH), weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    # Wrong answers go to zero only in the limit.
    torch.testing.assert_close(log_prob(theta).exp(), weights, rtol=0, atol=5e-3)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_draw_has_the_shares_for_expectation_and_at_most_k_answers(k):
    shares = answer_shares(torch.tensor([5, 1, 0, 3, 7, 1]), torch.tensor([True, True, True, False, True, True]))
    grid = (torch.arange(14000, dtype=torch.float64) + 0.5) / 14000  # 14 answers counted: ends fall on grid cells
    drawn = torch.stack([drawn_shares(shares, k, float(u)) for u in grid])
    torch.testing.assert_close(drawn.mean(0), shares, rtol=0, atol=1e-9)
    torch.testing.assert_close(drawn.sum(1), torch.ones(len(grid), dtype=torch.float64))
    assert int((drawn > 0).sum(1).max()) <= k and (drawn[:, [2, 3]] == 0).all()
    assert ((drawn * k - shares * k).abs() < 1).all()  # floor or ceil


def test_few_answers_are_taken_whole_and_a_prompt_without_any_gives_nothing():
    shares = answer_shares(torch.tensor([3, 1]), torch.tensor([True, True]))
    assert drawn_shares(shares, 2, 0.3).tolist() == [0.75, 0.25]
    for counts, right in (([], []), ([4, 2], [False, False])):
        none = answer_shares(torch.tensor(counts), torch.tensor(right, dtype=torch.bool))
        weights = token_weights(drawn_shares(none, 1, 0.5), torch.ones(len(counts)), loss_agg_mode="token-mean")
        assert weights.tolist() == [0.0] * len(counts)


def test_an_answer_given_twice_counts_as_two():
    one_by_one = answer_shares(torch.ones(3), torch.ones(3, dtype=torch.bool))
    merged = answer_shares(torch.tensor([2, 1]), torch.ones(2, dtype=torch.bool))
    assert merged.tolist() == pytest.approx([float(one_by_one[:2].sum()), float(one_by_one[2])])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Answers of 2 and 6 tokens, shares 3/4 and 1/4: a mean of 3 tokens an answer.
        ("token-mean", [0.75 / 3, 0.25 / 3]),
        ("seq-mean-token-mean", [0.75 / 2, 0.25 / 6]),
        ("seq-mean-token-sum", [0.75, 0.25]),
        ("seq-mean-token-sum-norm", [0.075, 0.025]),
    ],
)
def test_a_prompt_counts_once_in_every_mean(mode, expected):
    weights = partial(token_weights, loss_agg_mode=mode, horizon=10.0)
    shares, lengths = torch.tensor([0.75, 0.25]).double(), torch.tensor([2, 6])
    assert weights(shares, lengths).tolist() == pytest.approx(expected)
    # The same answers counted one by one: as many tokens, the same sum for each.
    split = weights(torch.full((4,), 0.25).double(), torch.tensor([2, 2, 2, 6]))
    assert float(split[:3].sum()) == pytest.approx(expected[0]) and float(split[3]) == pytest.approx(expected[1])


def test_a_sum_over_tokens_is_refused():
    for options in ({"loss_agg_mode": "token-sum"}, {"loss_agg_mode": "seq-mean-token-sum-norm"}):
        with pytest.raises(ValueError, match="no mean"):
            token_weights(torch.ones(1), torch.ones(1), **options)


def test_masked_tokens_and_weightless_rows_may_hold_nan():
    values = torch.tensor([[-1.0, float("nan")], [float("nan"), float("nan")], [-2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    loss = reference_answers_loss(values, mask, torch.tensor([0.5, 0.0, 2.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 1 + 2 * 5)
    assert values.grad.tolist() == [[-0.5, 0.0], [0.0, 0.0], [-2.0, -2.0]]


@pytest.mark.parametrize(("n", "m"), [(8, 8), (8, 1), (0, 4), (3, 32)])
@pytest.mark.parametrize("old_seed", [1, 3])  # 1: on-policy
def test_mixture_is_unbiased_in_value_and_gradient_on_and_off_policy_and_bounded(n, m, old_seed):
    ref, old = log_prob(logits(2)), log_prob(logits(old_seed))
    rho = mixture_weights(ref, old, n=n, m=m)
    assert float(rho.max()) <= (n + m) / m and not rho.requires_grad
    # n answers of the old policy and m of the reference, each set replaced by its expectation.
    sampled = (n * old.exp() + m * ref.exp()) / (n + m)

    def estimate(theta):
        return (sampled * rho * (ref - log_prob(theta))).sum()

    def forward_kl(theta):
        return (ref.exp() * (ref - log_prob(theta))).sum()

    torch.testing.assert_close(estimate(logits(1)), forward_kl(logits(1)), **EXACT)
    torch.testing.assert_close(gradient(estimate), gradient(forward_kl), **EXACT)


def test_mixture_needs_answers_of_the_reference_and_survives_what_it_never_says():
    never = mixture_weights(torch.tensor([-2000.0]), torch.tensor([-1.0]), n=8, m=8)
    assert never.tolist() == [0.0]
    with pytest.raises(ValueError, match="m >= 1"):
        mixture_weights(torch.zeros(1), torch.zeros(1), n=8, m=0)
