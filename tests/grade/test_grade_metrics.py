from __future__ import annotations

import pytest

from posttrain.core import Grade
from posttrain.grade import reward_metrics


def _grade(score: float | None, **parts: float) -> Grade:
    return Grade(score=score, grader="g", parts=parts, error=None if score is not None else "x", seconds=0.5, cost=0.1)


def test_metrics_by_hand() -> None:
    grades = [_grade(1.0, a=1.0), _grade(0.0, a=0.5), _grade(2.0, a=0.0), _grade(2.0, a=0.0), _grade(None)]
    metrics = reward_metrics(grades, ["p", "p", "q", "q", "q"])
    assert metrics["reward"] == pytest.approx(1.25)
    # sample standard deviations: of (1, 0) √½, of (2, 2) 0
    assert metrics["reward_std"] == pytest.approx(0.5**0.5 / 2)
    assert metrics["frac_reward_zero_std"] == pytest.approx(0.5)
    assert metrics["rewards/g/mean"] == pytest.approx(1.25)
    # deviations of (1, 0, 2, 2) from 1.25: −¼, −5⁄4, ¾, ¾; squares 11⁄4, over 3
    assert metrics["rewards/g/std"] == pytest.approx((2.75 / 3) ** 0.5)
    assert metrics["rewards/a/mean"] == pytest.approx(0.375)
    assert (metrics["grade/graded"], metrics["grade/failed"], metrics["grade/not_rolled_out"]) == (4, 1, 0)
    assert metrics["grade/seconds"] == pytest.approx(0.5)
    assert metrics["grade/cost"] == pytest.approx(0.5)


def test_equal_rewards_are_told_from_learning_despite_rounding() -> None:
    same = [_grade(0.1 + 0.2), _grade(0.3)]
    assert reward_metrics(same, ["p", "p"])["frac_reward_zero_std"] == 1
    assert reward_metrics([_grade(0.3), _grade(0.31)], ["p", "p"])["frac_reward_zero_std"] == 0


def test_where_nothing_was_graded_there_is_no_reward() -> None:
    failed = Grade(score=None, grader="g", error="rollout failed: x")
    metrics = reward_metrics([failed, failed], ["p", "p"])
    assert "reward" not in metrics
    assert metrics["grade/not_rolled_out"] == 2
    assert metrics["grade/failed"] == 0
    assert reward_metrics([], [])["grade/graded"] == 0
    with pytest.raises(ValueError, match="zip"):
        reward_metrics([failed], [])
