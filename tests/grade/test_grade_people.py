"""Grades by people, from any source of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from posttrain.core import ConfigError, Grade, GradeError, Task, Trajectory
from posttrain.grade import HumanGrade, People, check_failures, grade_all, reward_metrics, trajectory_from_text

TASK = Task(id="t", prompt="?")


class Source:
    """People who have graded after so many looks."""

    def __init__(self, *scores: float, after: int = 0) -> None:
        self.scores, self.after, self.looks = scores, after, 0
        self.asked: list[str] = []

    async def grades_of(self, trajectory: Trajectory) -> Sequence[HumanGrade]:
        self.looks += 1
        if self.looks <= self.after:
            return []
        return [HumanGrade(score=score, person=f"p{n}", comment=f"c{n}") for n, score in enumerate(self.scores)]

    async def ask_for(self, trajectory: Trajectory) -> None:
        self.asked.append(trajectory.id)


def graded(source: Source, **options: Any) -> Grade:
    (grade,) = asyncio.run(grade_all(People(source, **options), [trajectory_from_text(TASK, "text")]))
    return grade


def test_the_mean_and_the_majority_of_people() -> None:
    grade = graded(Source(1.0, 0.0, 0.5))
    assert grade.score == 0.5
    assert grade.parts == {"num_people": 3.0, "spread": 1.0}
    assert grade.rationale == "p0: c0\np1: c1\np2: c2"
    assert graded(Source(1.0, 0.2, 0.9), combine="majority").score == 1.0
    assert graded(Source(1.0, 0.2), combine="majority").score == 0.5


def test_people_are_asked_once_and_waited_for() -> None:
    source = Source(1.0, after=3)
    grade = graded(source, wait_s=30.0, every_s=0.01)
    assert (grade.score, source.asked, source.looks) == (1.0, ["t"], 4)


def test_too_few_people_are_no_grade_and_no_failure() -> None:
    grade = graded(Source(1.0), min_people=2, wait_s=0.05, every_s=0.01)
    assert grade.score is None
    assert str(grade.error).startswith("ungraded: 1 of 2 people")
    check_failures([grade, grade, grade])
    metrics = reward_metrics([grade], ["t"])
    assert "reward" not in metrics


def test_other_failures_still_count() -> None:
    broken = Grade(score=None, grader="people", error="DataError: the store is gone")
    with pytest.raises(GradeError, match="the store is gone"):
        check_failures([broken, broken])


def test_settings_that_cannot_be() -> None:
    for wrong in ({"min_people": 0}, {"wait_s": -1.0}, {"every_s": 0.0}):
        with pytest.raises(ConfigError):
            People(Source(), **wrong)  # type: ignore[arg-type]
    assert People(Source(), wait_s=3600.0).deadline_s > 3600
