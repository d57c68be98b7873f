"""Grades by people, read from wherever people leave them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, Protocol

import msgspec

from posttrain.core import ConfigError, Grade, GradeCase, Trajectory
from posttrain.grade.batch import UNGRADED


class HumanGrade(msgspec.Struct, frozen=True, kw_only=True):
    """What one person says of an answer, as a score from 0 to 1."""

    score: float
    person: str
    comment: str = ""


class HumanGrades(Protocol):
    """Where people's grades are. `posttrain.recipes.people.StoreGrades` reads a feedback store."""

    async def grades_of(self, trajectory: Trajectory) -> Sequence[HumanGrade]:
        """The latest grade of each person who has graded this answer; none yet: empty. Quick; asked repeatedly."""
        ...

    async def ask_for(self, trajectory: Trajectory) -> None:
        """Put an answer where people find it. Called once for each answer before the first look."""
        ...


class People:
    """The mean or the majority of what people say, waiting for them until a deadline.

    An answer that too few people have graded by then is ungraded: an error that begins with `ungraded: `, which is
    masked out of the loss but is no failure of a grader.

    Args:
        source: where the grades are.
        min_people: how many must have graded.
        combine: "mean" of their scores; "majority": 1 where more give ½ or more than less, 0 where fewer, else ½.
        wait_s: seconds to wait for them; 0 looks once.
        every_s: seconds between two looks.
        cases: gold answers and near misses, for sources that know what people would say of them.
        name: the grader's name.
    """

    max_concurrency: int | None = None  # waiting costs nothing
    waits = True

    def __init__(
        self,
        source: HumanGrades,
        *,
        min_people: int = 1,
        combine: Literal["mean", "majority"] = "mean",
        wait_s: float = 0.0,
        every_s: float = 1.0,
        cases: Sequence[GradeCase] = (),
        name: str = "people",
    ) -> None:
        self.name = name
        self._source, self._min_people, self._combine = source, min_people, combine
        self._wait_s, self._every_s = wait_s, every_s
        self._cases = tuple(cases)
        if min_people < 1 or wait_s < 0 or every_s <= 0:
            raise ConfigError(f"grader {name!r}: min_people must be at least 1, wait_s 0 or more, every_s above 0")

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take: the wait, and the last look."""
        return self._wait_s + 10.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Wait for enough people."""
        started_s = time.monotonic()
        await self._source.ask_for(trajectory)
        while True:
            grades = await self._source.grades_of(trajectory)
            left_s = self._wait_s - (time.monotonic() - started_s)
            if len(grades) >= self._min_people or left_s <= 0:
                break
            await asyncio.sleep(min(self._every_s, left_s))
        seconds = time.monotonic() - started_s
        parts = {"num_people": float(len(grades))}
        if len(grades) < self._min_people:
            error = f"{UNGRADED}{len(grades)} of {self._min_people} people graded it within {self._wait_s:g} s"
            return Grade(score=None, grader=self.name, parts=parts, error=error, seconds=seconds)
        scores = [grade.score for grade in grades]
        if len(scores) > 1:
            parts["spread"] = max(scores) - min(scores)
        rationale = "\n".join(f"{grade.person}: {grade.comment}" for grade in grades if grade.comment)
        return Grade(score=self._combined(scores), grader=self.name, parts=parts, rationale=rationale, seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given."""
        return self._cases

    def _combined(self, scores: Sequence[float]) -> float:
        if self._combine == "mean":
            return fmean(scores)
        lead = sum(1 if score >= 0.5 else -1 for score in scores)
        return 0.5 if lead == 0 else float(lead > 0)
