"""pass@k against exact rationals, its bootstrap against known worlds, the sign test against scipy."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from rapo_verl.method import passk
from rapo_verl.report import solved


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


def test_band_surrounds_estimate_at_half_of_n():
    # Without recentring the band would be about 0.394 +- 0.08 here and miss its own estimate.
    band = passk.bootstrap_curve(np.ones(60, dtype=int), 2048, [1024])
    assert band.mean[0] == pytest.approx(0.5)
    assert (band.low[0] + band.high[0]) / 2 == pytest.approx(0.5, abs=0.02)


def test_band_covers_the_truth_as_often_as_it_says():
    def rates(rng: np.random.Generator, size: int) -> np.ndarray:
        return np.where(rng.random(size) < 0.5, 10 ** rng.uniform(-5, -1, size), rng.beta(2, 2, size))

    truth = (1 - (1 - rates(np.random.default_rng(1), 400_000)) ** 32).mean()
    hits = 0
    for world in range(250):
        rng = np.random.default_rng([7, world])
        band = passk.bootstrap_curve(rng.binomial(64, rates(rng, 50)), 64, [32], draws=300, seed=world)
        hits += band.low[0] <= truth <= band.high[0]
    # Nominal 0.95; four standard errors of 250 worlds are 0.055.
    assert 0.895 <= hits / 250 <= 0.995


def test_wider_level_gives_wider_band_and_a_seed_repeats():
    c = np.random.default_rng(0).integers(0, 65, 40)
    narrow, wide = (passk.bootstrap_curve(c, 64, [1, 8], level=level, seed=3) for level in (0.5, 0.99))
    assert (wide.low < narrow.low).all()
    assert (wide.high > narrow.high).all()
    np.testing.assert_array_equal(wide.low, passk.bootstrap_curve(c, 64, [1, 8], level=0.99, seed=3).low)
    for fault in ({"level": 1.0}, {"level": 0.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="level must lie"):
            passk.bootstrap_curve(c, 64, [1], **fault)


def test_sixty_problems_twelve_ks_take_less_than_two_seconds():
    c = np.random.default_rng(0).integers(0, 4097, 60)
    start = time.process_time()
    passk.bootstrap_curve(c, 4096, passk.default_ks(4096), draws=2000)
    assert len(passk.default_ks(4096)) == 12
    assert time.process_time() - start < 2


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    rate = rng.beta(0.5, 0.5, 60) * 0.9
    a, b = rng.binomial(512, rate + 0.05), rng.binomial(512, rate)
    got = passk.paired_bootstrap_difference(a, b, 512, 1)
    single = passk.bootstrap_curve(a, 512, [1])
    assert got.difference == pytest.approx((a.mean() - b.mean()) / 512)
    assert 0 < got.low < got.difference < got.high
    assert got.high - got.low < 0.3 * (single.high[0] - single.low[0])


def test_difference_changes_sign_when_models_are_swapped():
    a, b = np.array([9, 8, 7, 16, 2] * 6), np.array([1, 2, 3, 4, 2] * 6)
    forth, back = passk.paired_bootstrap_difference(a, b, 16, 2), passk.paired_bootstrap_difference(b, a, 16, 2)
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.low > 0 > back.high
    with pytest.raises(ValueError, match="same problems"):
        passk.paired_bootstrap_difference(a, b[:-1], 16, 2)


@pytest.mark.parametrize(("a", "b", "p"), [(5, 0, 0.0625), (0, 6, 0.03125), (0, 0, 1.0), (3, 3, 1.0), (1, 0, 1.0)])
def test_sign_test_values(a, b, p):
    solved_a = np.array([True] * a + [False] * b + [True, False])
    solved_b = np.array([False] * a + [True] * b + [True, False])
    assert solved.sign_test(solved_a, solved_b) == (a, b, p)


def test_sign_test_equals_scipy():
    for a in range(1, 12):
        for b in range(12):
            solved_a, solved_b = np.array([1] * a + [0] * b), np.array([0] * a + [1] * b)
            want = stats.binomtest(a, a + b, 0.5).pvalue
            assert solved.sign_test(solved_a, solved_b).p_value == pytest.approx(want, rel=1e-12)


def test_coverage_difference_names_the_problems():
    a, b = [0, 3, 1, 0], [2, 1, 0, 0]
    assert solved.coverage_difference(a, b) == ((2,), (0,))
    assert solved.coverage_difference(a, b, ["w", "x", "y", "z"]) == (("y",), ("w",))
    with pytest.raises(ValueError, match="same problems"):
        solved.coverage_difference(a, b[:3])


def test_hard_is_what_the_base_never_solved():
    np.testing.assert_array_equal(solved.hard_mask([0, 1, 0, 5]), [True, False, True, False])


def test_clopper_pearson_equals_scipy_and_its_closed_ends():
    for n, c in ((1, 0), (1, 1), (64, 0), (64, 64), (64, 13), (2048, 1)):
        low, high = passk.clopper_pearson([c], n)
        want = stats.binomtest(c, n).proportion_ci(0.95, method="exact")
        # scipy solves for the bounds with a root finder.
        assert (low[0], high[0]) == (pytest.approx(want.low, abs=1e-8), pytest.approx(want.high, abs=1e-8))
    assert passk.clopper_pearson([0], 2048)[1][0] == pytest.approx(1 - 0.025 ** (1 / 2048), rel=1e-9)
    with pytest.raises(ValueError, match="level must lie"):
        passk.clopper_pearson([0], 4, level=1.0)
