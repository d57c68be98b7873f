"""Calibration and reports of reward models, with numbers worked by hand and properties."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import EvaluateError
from posttrain.evaluate import (
    RewardReport,
    ScoredPair,
    ScoredSteps,
    StepReport,
    as_eval_report,
    calibration,
    compare,
    reward_report,
    step_report,
    wilson,
)


def pair(number: int, chosen: float, rejected: float, **fields: object) -> ScoredPair:
    return ScoredPair(id=f"p{number}", chosen=chosen, rejected=rejected, **fields)


# Calibration


def test_calibration_by_hand() -> None:
    # bin 0.2–0.4: forecasts 0.3, 0.3, one of two true; bin 0.8–1: 0.9, 0.9, both true
    found = calibration([0.3, 0.3, 0.9, 0.9], [1, 0, 1, 1], num_bins=5)
    assert found.ece == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)
    assert found.max_error == pytest.approx(0.2)
    assert found.brier.value == pytest.approx((0.49 + 0.09 + 0.01 + 0.01) / 4)
    assert found.log_loss == pytest.approx(-(math.log(0.3) + math.log(0.7) + 2 * math.log(0.9)) / 4)
    assert [(each.low, each.high) for each in found.bins] == [pytest.approx((0.2, 0.4)), pytest.approx((0.8, 1.0))]
    assert found.bins[1].frequency == wilson(2, 2)
    assert len(found.table().splitlines()) == 3


def test_the_edges_belong_somewhere() -> None:
    found = calibration([0.0, 1.0, 0.5, 0.1], [0, 1, 1, 0], num_bins=10)
    assert sum(each.frequency.n for each in found.bins) == 4
    assert found.ece == pytest.approx((0 + 0 + 0.5 + 0.1) / 4)
    assert math.isfinite(calibration([0.0, 1.0], [1, 0]).log_loss)


def test_honest_forecasts_are_calibrated_and_boasts_are_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, 20_000)
    y = (rng.uniform(0, 1, 20_000) < p).astype(float)
    assert calibration(p.tolist(), y.tolist()).ece < 0.02
    boast = np.where(p > 0.5, 0.99, 0.01)
    assert calibration(boast.tolist(), y.tolist()).ece > 0.2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_calibration_stays_within_its_bounds(rows: list[tuple[float, int]]) -> None:
    found = calibration([p for p, _ in rows], [y for _, y in rows])
    assert 0 <= found.ece <= found.max_error <= 1
    assert 0 <= found.brier.value <= 1
    assert sum(each.frequency.n for each in found.bins) == len(rows)


def test_what_is_no_forecast_is_refused() -> None:
    for p, y in ([0.5], [1]), ([0.5, 1.2], [1, 0]), ([0.5, math.nan], [1, 0]), ([0.5, 0.5], [1, 2]), ([0.5, 0.4], [1]):
        with pytest.raises(EvaluateError, match="calibration"):
            calibration(p, y)
    with pytest.raises(EvaluateError, match=r"\[0.5, 1\]"):
        calibration([0.4, 0.6], [1, 0], low=0.5)


# Preferences


def test_reward_report_by_hand() -> None:
    log3 = math.log(3.0)
    pairs = [
        pair(0, log3, 0.0, chosen_length=5, rejected_length=2, tags=("kind:a",)),
        pair(1, 2 * log3, log3, chosen_length=1, rejected_length=4, tags=("kind:a",)),
        pair(2, 0.0, log3, chosen_length=2, rejected_length=6, tags=("kind:b",)),
        pair(3, 1.0, 1.0, chosen_length=3, rejected_length=3, tags=("kind:b",)),
    ]
    report = reward_report(pairs)
    assert report.accuracy == wilson(2.5, 4)
    assert report.by_tag == {"kind:a": wilson(2, 2), "kind:b": wilson(0.5, 2)}
    assert report.margin.value == pytest.approx(log3 / 4)
    assert report.mean_chosen == pytest.approx((3 * log3 + 1) / 4)
    assert report.mean_reward == pytest.approx((5 * log3 + 2) / 8)
    # three forecasts of 3/4, two of them true; one of 1/2 that half came true
    assert report.calibration.ece == pytest.approx(3 / 4 * (3 / 4 - 2 / 3))
    assert report.calibration.brier.value == pytest.approx((2 * 0.0625 + 0.5625 + 0) / 4)
    assert report.length is not None
    assert report.length.longer_is_better.value == pytest.approx(1 / 3)
    assert report.length.longer_wins.value == pytest.approx(2 / 3)
    assert report.length.accuracy_when_longer == wilson(1, 1)
    assert report.length.accuracy_when_shorter == wilson(1, 2)
    expected = np.corrcoef([3, -3, -4, 0], [log3, log3, -log3, 0])[0, 1]
    assert report.length.correlation.value == pytest.approx(expected)
    assert RewardReport.from_json(report.to_json()) == report
    assert "accuracy 0.625" in report.summary()


def test_a_model_that_counts_words_is_seen_through() -> None:
    rng = random.Random(0)
    pairs = []
    for number in range(400):
        lengths = rng.randint(1, 99), rng.randint(1, 99)
        if rng.random() < 0.7:  # the longer answer is better in 70 % of pairs
            lengths = max(lengths), min(lengths)
        pairs.append(
            pair(
                number,
                lengths[0] / 10,
                lengths[1] / 10,
                chosen_length=lengths[0],
                rejected_length=lengths[1],
            )
        )
    watch = reward_report(pairs).length
    assert watch is not None
    assert watch.correlation.value == pytest.approx(1.0)
    assert watch.longer_wins.value == 1.0
    assert watch.accuracy_when_longer is not None
    assert watch.accuracy_when_shorter is not None
    assert (watch.accuracy_when_longer.value, watch.accuracy_when_shorter.value) == (1.0, 0.0)


def test_answers_of_equal_length_leave_nothing_to_watch() -> None:
    assert reward_report([pair(0, 1.0, 0.0), pair(1, 1.0, 0.0)]).length is None


def test_pairs_of_one_list_do_not_count_as_independent() -> None:
    rng = random.Random(1)
    rows, lists = [], []
    for number in range(60):
        hit = rng.random() < 0.6
        for place in range(3):
            rows.append(pair(3 * number + place, float(hit), 0.5))
            lists.append(pair(3 * number + place, float(hit), 0.5, cluster=f"list-{number}"))
    alone, clustered = reward_report(rows).accuracy, reward_report(lists).accuracy
    assert clustered.value == pytest.approx(alone.value)
    assert clustered.n == 60
    assert clustered.high - clustered.low > 1.6 * (alone.high - alone.low)
    same = [pair(number, 1.0, 0.0, cluster="c" + str(number // 2)) for number in range(10)]
    assert reward_report(same).accuracy == wilson(5, 5)  # no spread was seen; the interval is not empty


def test_reports_that_mean_nothing_are_refused() -> None:
    with pytest.raises(EvaluateError, match="at least 2"):
        reward_report([pair(0, 1.0, 0.0)])
    with pytest.raises(EvaluateError, match="not finite, first 'p1'"):
        reward_report([pair(0, 1.0, 0.0), pair(1, math.nan, 0.0)])


def test_two_reward_models_are_compared_by_a_paired_test() -> None:
    good = [pair(number, 1.0, 0.0, prompt=f"q{number}") for number in range(40)]
    poor = [pair(number, float(number % 2), 0.5, prompt=f"q{number}") for number in range(40)]
    first, last = (as_eval_report(each, suite="s", model=name) for each, name in ((poor, "poor"), (good, "good")))
    found = compare(last, first)
    assert (found.wins, found.losses, found.ties) == (20, 0, 20)
    assert found.better
    assert last.metrics["accuracy"].value == 1.0


# Steps


def test_step_report_by_hand() -> None:
    answers = [
        ScoredSteps(id="a", scores=(1.0, -1.0, 2.0), labels=(1.0, 0.0, 0.0)),  # first error found
        ScoredSteps(id="b", scores=(-1.0, -1.0), labels=(1.0, 0.0)),  # a false alarm before it
        ScoredSteps(id="c", scores=(1.0, 1.0), labels=(1.0, 1.0)),  # all right, no alarm
        ScoredSteps(id="d", scores=(1.0, -1.0), labels=(1.0, None)),  # an alarm at a step without label
    ]
    report = step_report(answers)
    assert (report.num_answers, report.num_steps) == (4, 8)
    assert report.positive_rate == pytest.approx(5 / 8)
    assert report.accuracy.value == pytest.approx(6 / 8)
    assert report.accuracy.n == 4  # answers
    assert report.accuracy_right is not None
    assert report.accuracy_right.value == pytest.approx(4 / 5)
    assert report.accuracy_wrong is not None
    assert report.accuracy_wrong.value == pytest.approx(2 / 3)
    assert report.first_error == wilson(1, 2)
    assert report.all_right == wilson(1, 2)
    assert report.f1 == pytest.approx(0.5)
    assert StepReport.from_json(report.to_json()) == report
    assert "first error found 0.500" in report.summary()


def test_always_saying_right_finds_no_error() -> None:
    answers = [ScoredSteps(id=str(n), scores=(3.0,) * 4, labels=(1.0, 1.0, 1.0, float(n % 2))) for n in range(20)]
    report = step_report(answers)
    assert report.accuracy.value == report.positive_rate == pytest.approx(7 / 8)
    assert report.accuracy_wrong is not None
    assert report.accuracy_wrong.value == 0.0
    assert report.f1 == 0.0


def test_steps_that_mean_nothing_are_refused() -> None:
    with pytest.raises(EvaluateError, match="1 scores for 2 steps"):
        step_report([ScoredSteps(id="a", scores=(1.0,), labels=(1.0, 0.0))])
    with pytest.raises(EvaluateError, match="not finite"):
        step_report([ScoredSteps(id="a", scores=(math.inf, 1.0), labels=(1.0, 0.0))])
    with pytest.raises(EvaluateError, match="say nothing"):
        step_report([ScoredSteps(id="a", scores=(1.0, 1.0), labels=(None, 0.0))])
