from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

import pytest

from posttrain.core import ConfigError, Grade, GradeError, StopReason, Task, Trajectory
from posttrain.grade import Exact, Function, check_failures, grade_all, trajectory_from_text


def _trajectories(*texts: str) -> list[Trajectory]:
    task = Task(id="t", prompt="?", answer="right")
    return [trajectory_from_text(task, text, id=f"t/{place}") for place, text in enumerate(texts)]


class _Grader:
    """A grader made of one method."""

    def __init__(self, method: Callable[[Trajectory], object], name: str = "odd") -> None:
        self.name = name
        self.grade = method


def _run(grader: object, trajectories: list[Trajectory], **settings: float) -> list[Grade]:
    return asyncio.run(grade_all(grader, trajectories, **settings))  # type: ignore[arg-type]


def test_grades_come_in_order() -> None:
    async def backwards(trajectory: Trajectory) -> Grade:
        await asyncio.sleep(0.02 / (1 + int(trajectory.text)))
        return Grade(score=float(trajectory.text), grader="odd")

    grades = _run(_Grader(backwards), _trajectories(*map(str, range(20))))
    assert [grade.score for grade in grades] == [float(n) for n in range(20)]
    assert all(grade.seconds > 0 for grade in grades)


def test_one_bad_grade_spoils_no_other() -> None:
    async def sometimes(trajectory: Trajectory) -> object:
        match trajectory.text:
            case "hangs":
                await asyncio.sleep(3600)
            case "raises":
                raise ValueError("bad text")
            case "nan":
                return Grade(score=math.nan, grader="odd")
            case "infinite":
                return Grade(score=-math.inf, grader="odd")
            case "nan part":
                return Grade(score=1.0, grader="odd", parts={"a": math.nan})
            case "number":
                return 1.0
            case "cancels":
                raise asyncio.CancelledError
            case "says so":
                return Grade(score=None, grader="odd", error="cannot tell")
        return Grade(score=1.0, grader="odd")

    texts = [*"fine hangs raises nan infinite number cancels fine".split(), "nan part", "says so"]
    grades = _run(_Grader(sometimes), _trajectories(*texts), deadline_s=0.2)
    by_text = dict(zip(texts, grades, strict=True))
    assert [grade.score for grade in grades] == [1.0, None, None, None, None, None, None, 1.0, None, None]
    assert by_text["hangs"].error == "no grade within 0.2 s"
    assert by_text["raises"].error == "ValueError: bad text"
    assert by_text["nan"].error == "its score is nan"
    assert by_text["infinite"].error == "its score is -inf"
    assert by_text["nan part"].error == "its part 'a' is nan"
    assert by_text["number"].error == "returned float, not a Grade"
    assert by_text["cancels"].error == "the grader cancelled itself"
    assert by_text["says so"].error == "cannot tell"


def test_a_plain_function_that_sleeps_for_ever_is_an_error() -> None:
    started_s = time.perf_counter()
    grader = Function(lambda trajectory: time.sleep(30) or 1.0 if trajectory.text == "slow" else 1.0, name="f")
    grades = _run(grader, _trajectories("quick", "slow", "quick"), deadline_s=0.3)
    assert [grade.score for grade in grades] == [1.0, None, 1.0]
    assert time.perf_counter() - started_s < 15


def test_a_grader_that_ignores_its_cancellation_does_not_hold_up_the_batch() -> None:
    async def stubborn(trajectory: Trajectory) -> Grade:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)  # goes on although it was told to stop
        return Grade(score=1.0, grader="odd")

    async def timed() -> float:
        started_s = time.perf_counter()
        grades = await grade_all(_Grader(stubborn), _trajectories("a", "b"), deadline_s=0.05)  # type: ignore[arg-type]
        assert [grade.score for grade in grades] == [None, None]
        return time.perf_counter() - started_s

    assert asyncio.run(timed()) < 0.45


def test_a_grade_method_that_is_not_async_works_too() -> None:
    grades = _run(_Grader(lambda trajectory: Grade(score=0.5, grader="odd")), _trajectories("a"))
    assert grades[0].score == 0.5


def test_failed_rollouts_are_not_graded() -> None:
    graded: list[str] = []

    def fn(trajectory: Trajectory) -> float:
        graded.append(trajectory.id)
        return 1.0

    good, bad, silent = _trajectories("a", "b", "c")
    bad = bad.replace(stop_reason=StopReason.ERROR, error="sampler: out of memory")
    silent = silent.replace(stop_reason=StopReason.CANCELLED)
    clipped = good.replace(id="clipped", stop_reason=StopReason.LENGTH)
    grades = _run(Function(fn), [good, bad, silent, clipped])
    assert [grade.score for grade in grades] == [1.0, None, None, 1.0]
    assert grades[1].error == "rollout failed: sampler: out of memory"
    assert grades[2].error == "rollout failed: cancelled"
    assert sorted(graded) == ["clipped", good.id]


@pytest.mark.parametrize(("own", "asked", "most"), [(None, 3, 3), (2, 32, 2), (9, 4, 4)])
def test_no_more_grades_are_under_way_than_allowed(own: int | None, asked: int, most: int) -> None:
    running, peak = 0, 0

    async def counts(trajectory: Trajectory) -> Grade:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002)
        running -= 1
        return Grade(score=1.0, grader="odd")

    grader = _Grader(counts)
    if own is not None:
        grader.max_concurrency = own  # type: ignore[attr-defined]
    _run(grader, _trajectories(*"abcdefghijkl"), concurrency=asked)
    assert peak == most


def test_waiting_for_a_place_is_no_part_of_the_deadline() -> None:
    async def slow(trajectory: Trajectory) -> Grade:
        await asyncio.sleep(0.1)
        return Grade(score=1.0, grader="odd")

    grades = _run(_Grader(slow), _trajectories(*"abcdef"), concurrency=1, deadline_s=0.4)
    assert [grade.score for grade in grades] == [1.0] * 6


def test_preparing_is_no_part_of_the_deadline_and_may_fail() -> None:
    class Prepared(_Grader):
        async def prepare(self) -> None:
            await asyncio.sleep(0.3)

    class Unprepared(_Grader):
        async def prepare(self) -> None:
            raise OSError("no such program")

    async def quick(trajectory: Trajectory) -> Grade:
        return Grade(score=1.0, grader="odd")

    assert _run(Prepared(quick), _trajectories("a"), deadline_s=0.1)[0].score == 1.0
    bad = _trajectories("b")[0].replace(stop_reason=StopReason.ERROR, error="x")
    errors = [grade.error for grade in _run(Unprepared(quick), [*_trajectories("a"), bad])]
    assert errors == ["could not be prepared: OSError: no such program", "rollout failed: x"]


def test_grade_all_refuses_limits_that_mean_nothing() -> None:
    for settings in ({"concurrency": 0}, {"deadline_s": 0}):
        with pytest.raises(ConfigError):
            _run(Exact(), _trajectories("a"), **settings)
    assert _run(Exact(), []) == []


def _grades(good: int, bad: int, rollouts: int = 0) -> list[Grade]:
    return [
        *[Grade(score=0.0, grader="g") for _ in range(good)],
        *[Grade(score=None, grader="g", error="crashed" if n % 2 else "hung") for n in range(bad)],
        *[Grade(score=None, grader="g", error="rollout failed: x") for _ in range(rollouts)],
    ]


@pytest.mark.parametrize(
    ("good", "bad", "rollouts", "stops"),
    [
        (100, 0, 0, False),
        (95, 5, 0, False),
        (94, 6, 0, True),
        (7, 1, 0, False),  # a single failure in a small batch
        (6, 2, 0, True),
        (0, 1, 0, True),  # everything failed
        (10, 0, 90, False),  # those are the rollout's failures
        (0, 0, 0, False),
    ],
)
def test_too_many_failures_stop_the_run(good: int, bad: int, rollouts: int, stops: bool) -> None:
    grades = _grades(good, bad, rollouts)
    if stops:
        with pytest.raises(GradeError, match="grades failed"):
            check_failures(grades)
    else:
        check_failures(grades)


def test_the_causes_are_named_most_frequent_first() -> None:
    with pytest.raises(GradeError) as caught:
        check_failures(_grades(1, 5))
    message = str(caught.value)
    assert "5 of 6 grades failed (83%, at most 5% may)" in message
    assert message.index("3 × g: hung") < message.index("2 × g: crashed")
