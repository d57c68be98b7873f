from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import pytest

from posttrain.core import ConfigError, Grade, GradeError, Task, Trajectory
from posttrain.grade import Exact, Function, Length, Weighted, trajectory_from_text
from posttrain.grade.combine import in_daemon_thread

GradeText = Callable[..., Grade]


def _broken(trajectory: Trajectory) -> float:
    raise RuntimeError("no")


async def _asynchronous(trajectory: Trajectory) -> float:
    await asyncio.sleep(0)
    return 0.5


class _Callable:
    async def __call__(self, trajectory: Trajectory) -> float:
        return 0.25


def _graded(trajectory: Trajectory) -> Grade:
    return Grade(score=0.75, grader="inner", parts={"a": 1.0}, rationale="because", cost=0.01)


@pytest.mark.parametrize(
    ("fn", "score"),
    [
        (lambda trajectory: True, 1.0),
        (lambda trajectory: len(trajectory.text), 4.0),
        (lambda trajectory: _asynchronous(trajectory), 0.5),
        (_asynchronous, 0.5),
        (_Callable(), 0.25),
        (_graded, 0.75),
    ],
)
def test_functions_of_every_kind(grade_text: GradeText, fn: Callable[..., float], score: float) -> None:
    grade = grade_text(Function(fn, name="mine"), "text")
    assert (grade.score, grade.grader) == (score, "mine")
    assert grade.seconds > 0


def test_a_function_runs_beside_the_event_loop(grade_text: GradeText) -> None:
    names: list[str] = []
    grade_text(Function(lambda trajectory: bool(names.append(threading.current_thread().name))), "x")
    assert names
    assert names != [threading.main_thread().name]


def test_what_a_function_raises_or_returns_wrongly_is_raised(grade_text: GradeText) -> None:
    assert Function(_broken).name == "_broken"
    with pytest.raises(RuntimeError, match="no"):
        grade_text(Function(_broken), "x")
    with pytest.raises(GradeError, match="returned str"):
        grade_text(Function(lambda trajectory: "good", name="f"), "x")  # type: ignore[arg-type,return-value]
    with pytest.raises(GradeError, match="StopIteration"):
        grade_text(Function(lambda trajectory: next(iter(())), name="f"), "x")


def test_a_function_that_never_returns_holds_up_nothing() -> None:
    released = threading.Event()

    async def wait_briefly() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_daemon_thread(released.wait), 0.05)

    started_s = time.perf_counter()
    asyncio.run(wait_briefly())  # with asyncio.to_thread, run() would wait for the thread here
    assert time.perf_counter() - started_s < 5
    released.set()


def test_weighted_by_hand(grade_text: GradeText) -> None:
    grader = Weighted({Exact(): 2.0, Length(max=1, unit="words", slope=0.25): -0.5, Function(_graded, "g"): 1.0})
    grade = grade_text(grader, "Paris is it", "Paris is it")
    # 2 × 1 − 0.5 × (1 − 0.25 × 2) + 0.75 = 2.5
    assert grade.score == pytest.approx(2.5)
    assert grade.parts == {"exact": 1.0, "length": 0.5, "g": 0.75, "g/a": 1.0}
    assert grade.cost == pytest.approx(0.01)
    assert "g: because" in grade.rationale


def test_weighted_keeps_the_parts_of_parts(grade_text: GradeText) -> None:
    inner = Weighted([(Exact(), 1.0), (Function(_graded, "g"), 1.0)], name="inner")
    grade = grade_text(Weighted([(inner, 1.0)]), "x", "x")
    assert grade.parts == {"inner": 1.75, "inner/exact": 1.0, "inner/g": 0.75, "inner/g/a": 1.0}


def test_a_failing_part_fails_the_sum_unless_it_may_be_skipped(grade_text: GradeText) -> None:
    strict = grade_text(Weighted([(Exact(), 1.0), (Function(_broken, "b"), 1.0)]), "x", "x")
    assert strict.score is None
    assert strict.error == "b: RuntimeError: no"
    lenient = grade_text(Weighted([(Exact(), 1.0), (Function(_broken, "b"), 1.0)], on_error="skip"), "x", "x")
    assert lenient.score == 1.0
    assert lenient.parts == {"exact": 1.0, "b/failed": 1.0}
    assert grade_text(Weighted([(Function(_broken, "b"), 1.0)], on_error="skip"), "x", "x").score is None


def test_weighted_refuses_what_cannot_be_told_apart() -> None:
    for graders in ([], [(Exact(), 1.0), (Exact(), 2.0)]):
        with pytest.raises(ConfigError, match="different names"):
            Weighted(graders)
    with pytest.raises(ConfigError, match="on_error"):
        Weighted([(Exact(), 1.0)], on_error="ignore")  # type: ignore[arg-type]


def test_weighted_is_as_wide_as_its_narrowest_part() -> None:
    narrow, wide = Function(_graded, "narrow"), Function(_graded, "wide")
    assert Weighted([(narrow, 1.0), (wide, 1.0)]).max_concurrency is None
    narrow.max_concurrency, wide.max_concurrency = 2, 7  # type: ignore[attr-defined]
    assert Weighted([(narrow, 1.0), (wide, 1.0)]).max_concurrency == 2


def test_a_score_that_is_no_number_stays_visible(grade_text: GradeText) -> None:
    grade = grade_text(Weighted([(Function(lambda trajectory: math.nan, "n"), 1.0)]), "x")
    assert grade.score is None
    assert grade.error == "n: its score is nan"
    assert grade.parts == {"n/failed": 1.0, "n/invalid": 1.0}


def test_weights_order_is_kept() -> None:
    task = Task(id="t", prompt="?", answer="x")
    grade = asyncio.run(Weighted([(Length(max=9), 1.0), (Exact(), 1.0)]).grade(trajectory_from_text(task, "x")))
    assert list(grade.parts) == ["length", "exact"]
