"""Candidate against champion: pairing, signs, and when a difference counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import evaluate
from posttrain.core import EvalReport, EvaluateError

Make = Callable[..., EvalReport]


def test_wins_losses_ties_and_the_difference_by_hand(report_of: Make) -> None:
    candidate = report_of([1] * 8 + [0] * 2 + [1] * 30, model="new")
    champion = report_of([0] * 8 + [1] * 2 + [1] * 30, model="old")
    comparison = evaluate.compare(candidate, champion)
    assert (comparison.wins, comparison.losses, comparison.ties) == (8, 2, 30)
    assert comparison.difference.value == pytest.approx(6 / 40)
    assert comparison.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert (comparison.candidate, comparison.champion) == ("new", "old")
    assert comparison.difference.method == "paired bootstrap"


def test_a_handful_of_wins_is_not_enough(report_of: Make) -> None:
    comparison = evaluate.compare(report_of([1] * 40), report_of([0] * 5 + [1] * 35))
    assert comparison.difference.low > 0  # the bootstrap alone would have said yes
    assert comparison.p_value == 2 / 32
    assert not comparison.better
    assert evaluate.compare(report_of([1] * 40), report_of([0] * 6 + [1] * 34)).better


@given(scores=st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=2, max_size=60))
@settings(max_examples=40, deadline=None)
def test_compare_is_antisymmetric(scores: list[tuple[int, int]]) -> None:
    from conftest_sums import hand_made

    a, b = hand_made([x for x, _ in scores], "a"), hand_made([y for _, y in scores], "b")
    ab, ba = evaluate.compare(a, b), evaluate.compare(b, a)
    assert ab.difference.value == pytest.approx(-ba.difference.value)
    assert ab.difference.low == pytest.approx(-ba.difference.high)
    assert ab.difference.high == pytest.approx(-ba.difference.low)
    assert (ab.wins, ab.losses, ab.ties) == (ba.losses, ba.wins, ba.ties)
    assert ab.p_value == ba.p_value
    assert not (ab.better and ba.better)


def test_the_order_of_samples_does_not_matter(report_of: Make) -> None:
    candidate, champion = report_of([1, 0, 1, 1, 0] * 10), report_of([0, 0, 1, 0, 1] * 10)
    backwards = champion.replace(samples=champion.samples[::-1])
    assert evaluate.compare(candidate, backwards) == evaluate.compare(candidate, champion)


def test_margins(report_of: Make) -> None:
    candidate, champion = report_of([1] * 80 + [0] * 20), report_of([1] * 50 + [0] * 50)
    assert evaluate.compare(candidate, champion).better
    assert evaluate.compare(candidate, champion, margin=0.15).better
    assert not evaluate.compare(candidate, champion, margin=0.28).better
    assert not evaluate.compare(champion, champion).better
    assert evaluate.compare(champion, champion, margin=-0.01).better  # not worse
    assert not evaluate.compare(champion, candidate, margin=-0.01).better


def test_failed_grades_count_as_wrong(report_of: Make) -> None:
    comparison = evaluate.compare(report_of([None, 1, 1]), report_of([1, 1, 0]))
    assert (comparison.wins, comparison.losses) == (1, 1)


def test_several_samples_give_one_number_per_task(report_of: Make) -> None:
    candidate = report_of([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    champion = report_of([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
    comparison = evaluate.compare(candidate, champion)
    assert (comparison.wins, comparison.losses, comparison.ties) == (2, 0, 1)
    assert comparison.difference.value == pytest.approx((0.25 + 0 + 0.25) / 3)
    assert comparison.difference.n == 3


def test_clusters_are_drawn_whole(report_of: Make) -> None:
    names = [f"c{i // 5}" for i in range(50)]
    ours, theirs = [1] * 25 + [0] * 25, [0] * 50
    alone = evaluate.compare(report_of(ours), report_of(theirs)).difference
    together = evaluate.compare(report_of(ours, clusters=names), report_of(theirs, clusters=names)).difference
    assert together.n == 10
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_partial_scores(report_of: Make) -> None:
    candidate, champion = report_of([0.6, 0.7, 1.0, 0.9] * 10), report_of([0.5, 0.6, 1.0, 0.2] * 10)
    assert evaluate.compare(candidate, champion).difference.value == 0.0
    assert evaluate.compare(candidate, champion, measure="score").difference.value == pytest.approx(0.225)
    assert candidate.metrics["accuracy"].value == 0.25
    assert candidate.metrics["score"].value == pytest.approx(0.8)


def test_reports_that_do_not_compare_are_refused(report_of: Make) -> None:
    report = report_of([1, 0, 1])
    with pytest.raises(EvaluateError, match="not the same tasks"):
        evaluate.compare(report, report_of([1, 0, 1], suite_hash="other"))
    with pytest.raises(EvaluateError, match="evaluate both alike"):
        evaluate.compare(report, report_of([1, 0, 1], temperature=0.5))
    with pytest.raises(EvaluateError, match="'t2', sample 0 is in one report only"):
        evaluate.compare(report, report_of([1, 0]))
    assert evaluate.compare(report, report_of([1, 0, 1], seed=7)).ties == 3


def test_equal_models_are_seldom_called_better() -> None:
    """The whole decision under the null: two models of equal skill, 300 comparisons; at most 2.5 % should pass."""
    from conftest_sums import hand_made

    rng = np.random.default_rng(4)
    passed = 0
    for _ in range(300):
        ease = rng.random(80) * 0.9 + 0.05
        ours, theirs = (rng.random((2, 80)) < ease).astype(int)
        comparison = evaluate.compare(hand_made(ours.tolist(), "a"), hand_made(theirs.tolist(), "b"))
        passed += comparison.better
    assert passed / 300 <= 0.025 + 0.015
