"""Agreement beyond chance, against published numbers and other implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import EvaluateError
from posttrain.evaluate import bootstrap_tables, clustered, cohen_kappa, krippendorff_alpha, pair_agreement
from posttrain.evaluate.judge_agreement import agreeing_pairs

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: 4 observers, 12 units, 7 values missing.
OBSERVERS = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]
UNITS = list(zip(*[[None if v == "." else int(v) for v in line.split()] for line in OBSERVERS], strict=True))


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_alpha_of_krippendorffs_own_example(level: str, alpha: float) -> None:
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=5e-4)  # type: ignore[arg-type]


def test_alpha_of_krippendorffs_binary_example() -> None:
    # The same paper, example A: two observers, ten units, 0 and 1: α = 0.095.
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha(list(zip(first, second, strict=True))) == pytest.approx(0.095, abs=5e-4)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([None, 0, 1, 3])] * 3), min_size=2, max_size=12))
def test_alpha_is_the_ratio_of_disagreements_within_and_among_units(units: list[tuple[int | None, ...]]) -> None:
    # Its definition, pair by pair: D_o over pairs within units, D_e over all pairs of pairable values.
    kept = [[value for value in unit if value is not None] for unit in units]
    kept = [unit for unit in kept if len(unit) >= 2]
    if not kept:
        with pytest.raises(EvaluateError, match="nobody could agree"):
            krippendorff_alpha(units, "interval")
        return
    values = [value for unit in kept for value in unit]
    within = sum(sum((a - b) ** 2 for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in kept)
    among = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    found = krippendorff_alpha(units, "interval")
    assert math.isnan(found) if among == 0 else found == pytest.approx(1 - within / among)


def test_kappa_worked_by_hand() -> None:
    # Cohen's form: 20 both yes, 15 both no, 5 and 10 apart: p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5, κ = 0.4.
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(["x", "y"], ["x", "y"]) == 1.0
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    # Three ranks, weighted by distance: D_o = (1 + 2)/4; D_e = (2·2·1 + 1·2·1 + 1·2·2 + 1·2·1)/16 = 12/16; κ = 0.
    assert cohen_kappa([1, 1, 2, 3], [1, 2, 2, 1], weights="linear") == pytest.approx(0.0)
    with pytest.raises(EvaluateError):
        cohen_kappa([1], [1, 2])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_quadratic_kappa_is_the_concordance_correlation(pairs: list[tuple[int, int]]) -> None:
    # Weighted by squared distance κ = 2 cov / (var a + var b + (mean a − mean b)²), with variances over N.
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    if len({*a, *b}) < 4:  # the formula weighs values, κ their ranks: the same where all four ranks are there
        return
    expected = 2 * np.mean((a - a.mean()) * (b - b.mean())) / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
    assert cohen_kappa(a.tolist(), b.tolist(), weights="quadratic") == pytest.approx(expected)


def test_pair_agreement_weighs_units_alike() -> None:
    assert agreeing_pairs(["a", "a", "b"]) == (1, 3)
    assert agreeing_pairs(["a", None]) == (0, 0)
    assert pair_agreement([["a", "a", "b"], ["a", "a"], ["b"]]) == pytest.approx((1 / 3 + 1) / 2)


def test_intervals_resample_clusters() -> None:
    # For a plain mean the interval is close to the clustered standard error's.
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 5)
    values = (rng.random(60)[clusters] + rng.random(300) > 1).astype(float)
    tables = [np.array([value, 1.0]) for value in values]
    found = bootstrap_tables(tables, clusters.tolist(), lambda sums: sums[:, 0] / sums[:, 1], seed=1)
    other = clustered(values.tolist(), clusters.tolist())
    assert found.value == pytest.approx(other.value)
    assert found.n == 60
    assert found.high - found.low == pytest.approx(other.high - other.low, rel=0.1)
    alone = bootstrap_tables(tables, list(range(300)), lambda sums: sums[:, 0] / sums[:, 1], seed=1)
    assert alone.high - alone.low < 0.8 * (found.high - found.low)  # as if nothing hung together: too narrow
    again = bootstrap_tables(tables, clusters.tolist(), lambda sums: sums[:, 0] / sums[:, 1], seed=1)
    assert again == found


def test_intervals_that_cannot_be() -> None:
    with pytest.raises(EvaluateError, match="1 cluster"):
        bootstrap_tables([np.ones(2)], ["p"], lambda sums: sums[:, 0], seed=0)
    with pytest.raises(EvaluateError, match="undefined"):
        bootstrap_tables([np.zeros(2)] * 3, list("abc"), lambda sums: sums[:, 0] / np.nan, seed=0)
    with pytest.raises(EvaluateError, match="needs numbers"):
        krippendorff_alpha([["a", "b"]], "ordinal")
