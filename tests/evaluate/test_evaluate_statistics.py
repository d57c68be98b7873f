"""Intervals and tests against published tables, scipy, hand calculation, and their own promise of coverage."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from posttrain import evaluate
from posttrain.core import EvaluateError
from posttrain.evaluate.quantiles import incomplete_beta, t_value, z_value


def test_quantiles_agree_with_tables_and_scipy() -> None:
    assert z_value(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert t_value(0.95, 9) == pytest.approx(2.262157, abs=1e-6)  # Student's table
    for degrees in (1, 2, 3, 7, 30, 500, 20_000):
        for confidence in (0.5, 0.9, 0.95, 0.99):
            expected = stats.t.ppf(0.5 + confidence / 2, degrees)
            assert t_value(confidence, degrees) == pytest.approx(expected, rel=1e-8)
    for a, b, x in [(0.5, 0.5, 0.3), (2, 5, 0.9), (10, 0.5, 0.999), (3000, 0.5, 0.9995)]:
        assert incomplete_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), rel=1e-9)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = evaluate.wilson(successes, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert (interval.value, interval.n, interval.method) == (successes / n, n, "wilson")


@given(n=st.integers(1, 400), data=st.data(), confidence=st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_wilson_agrees_with_scipy_and_is_symmetric(n: int, data: st.DataObject, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    ours = evaluate.wilson(k, n, confidence)
    theirs = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    mirrored = evaluate.wilson(n - k, n, confidence)
    assert mirrored.low == pytest.approx(1 - ours.high, abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_covers_as_promised() -> None:
    """Exact coverage, summed over the binomial: no simulation noise."""
    coverage = []
    for n in (20, 50, 100):
        low, high = np.array([(i.low, i.high) for i in (evaluate.wilson(k, n) for k in range(n + 1))]).T
        for p in np.linspace(0.02, 0.98, 97):
            inside = (low <= p) & (p <= high)
            coverage.append(stats.binom.pmf(np.arange(n + 1), n, p)[inside].sum())
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.85


def test_clustered_error_by_hand() -> None:
    # values 1 1 0 0 0, clusters a a b b c; mean 0.4; deviations .6 .6 -.4 -.4 -.4
    # sum of squares 1.2; s²/n = 1.2/4/5 = 0.06
    # cross terms, i≠j within a cluster: 2·.36 + 2·.16 + 0 = 1.04; /25 = 0.0416
    interval = evaluate.clustered([1, 1, 0, 0, 0], ["a", "a", "b", "b", "c"])
    error = math.sqrt(0.06 + 0.0416)
    assert interval.value == pytest.approx(0.4)
    assert interval.n == 3
    half = stats.t.ppf(0.975, 2) * error
    assert (interval.low, interval.high) == (pytest.approx(0.4 - half), pytest.approx(0.4 + half))


def test_clusters_of_one_give_the_ordinary_standard_error() -> None:
    values = [0.1, 0.7, 0.4, 0.9, 0.2]
    interval = evaluate.clustered(values, list("abcde"))
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.low, interval.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_repeating_every_answer_does_not_narrow_the_interval() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 5
    once = evaluate.clustered(values, range(30))
    tenfold = evaluate.clustered(values * 10, list(range(30)) * 10)
    assert tenfold.high - tenfold.low == pytest.approx(once.high - once.low, rel=0.03)
    naive = evaluate.clustered(values * 10, range(300))
    assert naive.high - naive.low < 0.4 * (once.high - once.low)


def test_bootstrap_agrees_with_theory_and_mirrors() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=300).tolist()
    interval = evaluate.bootstrap_mean(values, seed=1)
    half = 1.96 * np.std(values) / math.sqrt(300)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
    assert interval == evaluate.bootstrap_mean(values, seed=1)
    assert interval != evaluate.bootstrap_mean(values, seed=2)
    mirrored = evaluate.bootstrap_mean([-value for value in values], seed=1)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-interval.high), pytest.approx(-interval.low))


def test_bootstrap_of_clusters_draws_them_whole() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 5
    once = evaluate.bootstrap_mean(values, seed=0)
    tenfold = evaluate.bootstrap_mean(values * 10, seed=0, clusters=list(range(30)) * 10)
    assert (tenfold.low, tenfold.high) == (pytest.approx(once.low), pytest.approx(once.high))
    assert tenfold.n == 30


@pytest.mark.parametrize("clustered", [False, True])
def test_paired_bootstrap_covers_as_promised(clustered: bool) -> None:
    """600 simulated comparisons of two models with correlated answers: about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(11)
    trials, tasks, per_cluster = 600, 120, 3 if clustered else 1
    hits = 0
    for trial in range(trials):
        ease = np.repeat(rng.normal(size=tasks // per_cluster), per_cluster)
        shared = rng.normal(size=tasks)
        a = (ease + 0.7 * shared + 0.7 * rng.normal(size=tasks) + 0.3 > 0).astype(float)
        b = (ease + 0.7 * shared + 0.7 * rng.normal(size=tasks) > 0).astype(float)
        clusters = np.repeat(np.arange(tasks // per_cluster), per_cluster).tolist() if clustered else None
        interval = evaluate.paired_bootstrap(a, b, seed=trial, clusters=clusters, num_resamples=1000)
        truth = stats.norm.cdf(0.3 / math.sqrt(1 + 0.98)) - 0.5
        hits += interval.low <= truth <= interval.high
    # the binomial's own noise: 95 % ± 2 · √(.95·.05/600) = ± 1.8 points
    assert 0.932 <= hits / trials <= 0.968


def test_pairing_narrows_the_interval() -> None:
    rng = random.Random(5)
    b = [float(rng.random() < 0.5) for _ in range(200)]
    a = [1.0 if rng.random() < 0.1 else value for value in b]
    paired = evaluate.paired_bootstrap(a, b, seed=0)
    shuffled = evaluate.paired_bootstrap(a, rng.sample(b, len(b)), seed=0)
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


@given(wins=st.integers(0, 200), losses=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert evaluate.mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert evaluate.mcnemar(wins, losses) == evaluate.mcnemar(losses, wins)


def test_mcnemar_by_hand() -> None:
    assert evaluate.mcnemar(5, 0) == 2 / 32
    assert evaluate.mcnemar(6, 1) == 2 * (1 + 7) / 128
    assert evaluate.mcnemar(0, 0) == 1.0
    assert evaluate.mcnemar(4, 4) == 1.0


def test_pass_at_k_by_hand_and_by_enumeration() -> None:
    assert evaluate.pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert evaluate.pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 3 of 6 pairs hold the right one
    assert evaluate.pass_at_k(200, 0, 100) == 0.0
    assert evaluate.pass_at_k(3, 2, 2) == 1.0
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                expected = 1 - math.comb(n - c, k) / math.comb(n, k)
                assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_has_no_bias() -> None:
    rng = np.random.default_rng(0)
    right = rng.binomial(10, 0.2, size=20_000)
    mean = np.mean([evaluate.pass_at_k(10, int(c), 4) for c in right])
    assert mean == pytest.approx(1 - 0.8**4, abs=0.005)


def test_the_detectable_difference_is_detected_that_often() -> None:
    gap = evaluate.minimum_detectable_difference(400, 0.2)
    assert gap == pytest.approx((1.959964 + 0.841621) * math.sqrt(0.2 / 400), rel=1e-5)
    assert evaluate.tasks_needed(gap, 0.2) in (400, 401)
    rng = np.random.default_rng(2)
    cells = [(0.2 + gap) / 2, (0.2 - gap) / 2, 0.8]
    found = [evaluate.mcnemar(int(w), int(lost)) < 0.05 for w, lost, _ in rng.multinomial(400, cells, size=2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluate.wilson(1, 0),
        lambda: evaluate.wilson(3, 2),
        lambda: evaluate.wilson(1, 2, confidence=1.0),
        lambda: evaluate.clustered([1.0], ["a"]),
        lambda: evaluate.clustered([1.0, 0.0], ["a"]),
        lambda: evaluate.bootstrap_mean([], seed=0),
        lambda: evaluate.bootstrap_mean([1.0], seed=0),
        lambda: evaluate.bootstrap_mean([1.0, 0.0], seed=0, clusters=["a", "a"]),
        lambda: evaluate.bootstrap_mean([1.0, 0.0], seed=0, confidence=1.5),
        lambda: evaluate.bootstrap_mean([1.0, math.nan], seed=0),
        lambda: evaluate.paired_bootstrap([1.0], [1.0, 2.0], seed=0),
        lambda: evaluate.mcnemar(-1, 2),
        lambda: evaluate.pass_at_k(3, 4, 1),
        lambda: evaluate.pass_at_k(3, 1, 4),
        lambda: evaluate.tasks_needed(0.0, 0.2),
        lambda: evaluate.minimum_detectable_difference(0, 0.2),
    ],
)
def test_what_has_no_answer_is_an_error(call: object) -> None:
    with pytest.raises(EvaluateError):
        call()  # type: ignore[operator]
