"""pass@k against exact rationals, its bootstrap against known worlds, the sign test against scipy."""

import math
import time
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from rapo_verl.method import passk
from rapo_verl.report.statistics import sign_test


class Difference(NamedTuple):
    difference: float
    low: float
    high: float


def exact_pass_at_k(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def test_one_success_of_2048_at_k_1024_is_one_half():
    assert passk.pass_at_k([1], 2048, 1024)[0] == pytest.approx(0.5, abs=1e-14)


def test_estimate_equals_exact_rational():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 2049))
        c, k = int(rng.integers(0, n + 1)), int(rng.integers(1, n + 1))
        # 1e-12: up to 2048 float64 factors, each rounded to 1.1e-16.
        assert passk.pass_at_k([c], n, k)[0] == pytest.approx(float(exact_pass_at_k(n, c, k)), abs=1e-12), (n, c, k)


def test_small_counts_agree_everywhere():
    for n in range(1, 9):
        for k in range(1, n + 1):
            got = passk.pass_at_k(np.arange(n + 1), n, k)
            want = [float(exact_pass_at_k(n, c, k)) for c in range(n + 1)]
            np.testing.assert_allclose(got, want, atol=1e-15)


def test_n_per_problem_equals_one_problem_at_a_time():
    n, c = np.array([8, 2048, 8, 100, 33]), np.array([3, 7, 0, 100, 1])
    want = [passk.pass_at_k([ci], int(ni), 5)[0] for ni, ci in zip(n, c, strict=True)]
    np.testing.assert_array_equal(passk.pass_at_k(c, n, 5), want)


def test_verl_best_at_n_is_biased_where_ours_is_not():
    resampled_with_replacement = 1 - (1 - 1 / 2048) ** 1024
    assert resampled_with_replacement == pytest.approx(0.394, abs=5e-4)
    assert passk.pass_at_k([1], 2048, 1024)[0] - resampled_with_replacement > 0.1


def test_estimate_is_unbiased():
    n, k, p = 12, 5, 0.17
    c = np.arange(n + 1)
    mean = stats.binom.pmf(c, n, p) @ passk.pass_at_k(c, n, k)
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-13)


def test_curve_is_mean_over_problems():
    np.testing.assert_allclose(
        passk.pass_at_k_curve([0, 1, 4], 4, [1, 2, 4]), [5 / 12, (0.5 + 1) / 3, 2 / 3], atol=1e-15
    )


@pytest.mark.parametrize(
    ("correct", "n", "k", "words"),
    [
        ([1], 4, 5, "each k must lie in 1..4"),
        ([1, 1], [8, 4], 5, "each k must lie in 1..4"),
        ([1], 4, 0, "each k must lie"),
        ([5], 4, 1, "got correct 5, n 4 at problem 0"),
        ([0, -1], 4, 1, "got correct -1, n 4 at problem 1"),
        ([0], 0, 1, "n >= 1"),
        ([], 4, 1, "non-empty"),
        ([[1]], 4, 1, "vector"),
        ([0.5], 4, 1, "correct must hold integers"),
        ([1], 4.0, 1, "n must hold integers"),
        ([1, 1], [4, 4, 4], 1, "shape"),
    ],
)
def test_impossible_input_is_refused(correct, n, k, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        passk.pass_at_k(correct, n, k)


def test_default_ks_end_at_half():
    assert passk.default_ks(2048) == tuple(2**i for i in range(11))
    assert passk.default_ks(100) == (1, 2, 4, 8, 16, 32, 50)
    assert passk.default_ks(1) == passk.default_ks(3) == (1,)
    with pytest.raises(ValueError, match="at least 1"):
        passk.default_ks(0)


def test_exact_pass_at_k_keeps_tiny_and_certain_probabilities():
    # 1 - (1 - p)**k in float64 would be 0 for the first.
    np.testing.assert_allclose(passk.exact_pass_at_k([1e-20, 0.0, 1.0, 0.5], 4), [4e-20, 0, 1, 0.9375], rtol=1e-14)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        passk.exact_pass_at_k([1.1], 2)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        passk.exact_pass_at_k([math.nan], 2)


def test_band_of_zeros_and_ones_is_clopper_pearson():
    for solved in (0, 3, 30):
        band = passk.mean_band([64] * solved + [0] * (30 - solved), 64, [1, 32], draws=40_000)
        low, high = passk.clopper_pearson([solved], 30)
        # Quantiles of 40,000 draws: 4 standard errors are below 0.007 here.
        np.testing.assert_allclose(band.low, low[0], atol=0.007)
        np.testing.assert_allclose(band.high, high[0], atol=0.007)
    assert passk.clopper_pearson([0], 30)[1][0] == pytest.approx(1 - 0.025 ** (1 / 30))


def test_band_surrounds_its_estimate():
    band = passk.mean_band(np.ones(60, dtype=int), 2048, [1, 1024])
    assert band.mean == pytest.approx([1 / 2048, 0.5])
    assert (band.low < band.mean).all() and (band.mean < band.high).all()


WORLDS = {
    "beta": lambda rng, size: rng.beta(0.5, 0.5, size),
    "heavy tail": lambda rng, size: 10 ** rng.uniform(-5, 0, size),
    "heavier tail": lambda rng, size: rng.beta(0.05, 1, size),
    "one in twenty is easy": lambda rng, size: np.where(
        rng.random(size) < 0.95, 10 ** rng.uniform(-6, -3, size), rng.beta(5, 2, size)
    ),
    "one in ten is out of reach": lambda rng, size: np.where(rng.random(size) < 0.9, rng.beta(2, 2, size), 1e-7),
}


def coverage(rates, problems, worlds, draws=600):
    """Share of worlds whose band holds the truth at k = 1 and k = 1024 of n = 2048."""
    ks = (1, 1024)
    p = rates(np.random.default_rng(1), 1_000_000)
    truth = np.array([passk.exact_pass_at_k(p, k).mean() for k in ks])
    hits = np.zeros(2)
    for world in range(worlds):
        rng = np.random.default_rng([7, world, problems])
        band = passk.mean_band(rng.binomial(2048, rates(rng, problems)), 2048, ks, draws=draws, seed=world)
        hits += (band.low <= truth) & (truth <= band.high)
    return hits / worlds


def test_band_holds_the_truth_of_thirty_heavy_tailed_problems():
    # A bootstrap holds 77 % here at k = 1. 200 worlds: four standard errors at 0.98 are 0.04.
    assert coverage(WORLDS["one in twenty is easy"], 30, 200).min() >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize("problems", [5, 8, 30, 60])
@pytest.mark.parametrize("world", WORLDS)
def test_band_holds_the_truth_in_every_world(world, problems):
    # Nominal 0.95; three standard errors of 600 worlds are 0.027.
    assert coverage(WORLDS[world], problems, 600).min() >= 0.93


def test_wider_level_gives_wider_band_and_a_seed_repeats():
    c = np.random.default_rng(0).integers(0, 65, 40)
    narrow, wide = (passk.mean_band(c, 64, [1, 8], level=level, seed=3) for level in (0.5, 0.99))
    assert (wide.low < narrow.low).all()
    assert (wide.high > narrow.high).all()
    np.testing.assert_array_equal(wide.low, passk.mean_band(c, 64, [1, 8], level=0.99, seed=3).low)
    for fault in ({"level": 1.0}, {"level": 0.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="level must lie"):
            passk.mean_band(c, 64, [1], **fault)


def test_sixty_problems_twelve_ks_take_less_than_two_seconds():
    c = np.random.default_rng(0).integers(0, 4097, 60)
    start = time.process_time()
    passk.mean_band(c, 4096, passk.default_ks(4096), draws=2000)
    assert len(passk.default_ks(4096)) == 12
    assert time.process_time() - start < 2


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    rate = rng.beta(0.5, 0.5, 60) * 0.9
    a, b = rng.binomial(512, rate + 0.05), rng.binomial(512, rate)
    got = Difference(*(column[0] for column in passk.paired_difference(a, b, 512, [1])[1:]))
    single = passk.mean_band(a, 512, [1])
    assert got.difference == pytest.approx((a.mean() - b.mean()) / 512)
    assert 0 < got.low < got.difference < got.high
    assert got.high - got.low < 0.3 * (single.high[0] - single.low[0])


def test_difference_changes_sign_when_models_are_swapped():
    a, b = np.array([9, 8, 7, 16, 2] * 6), np.array([1, 2, 3, 4, 2] * 6)
    forth, back = (
        Difference(*(column[0] for column in passk.paired_difference(*x, 16, [2])[1:])) for x in ((a, b), (b, a))
    )
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.low > 0 > back.high
    with pytest.raises(ValueError, match="same problems"):
        passk.paired_difference(a, b[:-1], 16, [2])


def test_no_difference_seen_is_no_proof_of_none():
    for counts in ([0] * 30, [64] * 30, [0, 3, 64] * 10):
        band = passk.paired_difference(counts, counts, 64, [1, 32])
        assert band.mean.tolist() == [0, 0]
        # 30 problems that all agree: up to 11.6 % of those not asked may tell the two apart.
        bound = 1 - 0.025 ** (1 / 30)
        assert (band.low <= -bound + 1e-12).all() and (band.high >= bound - 1e-12).all()


@pytest.mark.parametrize(("a", "b", "p"), [(5, 0, 0.0625), (0, 6, 0.03125), (0, 0, 1.0), (3, 3, 1.0), (1, 0, 1.0)])
def test_sign_test_values(a, b, p):
    assert sign_test(a, b) == pytest.approx(p, rel=1e-12)


def test_clopper_pearson_equals_scipy_and_its_closed_ends():
    for n, c in ((1, 0), (1, 1), (64, 0), (64, 64), (64, 13), (2048, 1)):
        low, high = passk.clopper_pearson([c], n)
        want = stats.binomtest(c, n).proportion_ci(0.95, method="exact")
        # scipy solves for the bounds with a root finder.
        assert (low[0], high[0]) == (pytest.approx(want.low, abs=1e-8), pytest.approx(want.high, abs=1e-8))
    assert passk.clopper_pearson([0], 2048)[1][0] == pytest.approx(1 - 0.025 ** (1 / 2048), rel=1e-9)
    with pytest.raises(ValueError, match="level must lie"):
        passk.clopper_pearson([0], 4, level=1.0)
