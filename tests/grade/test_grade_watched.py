"""A grader that fails, hangs or lies is in the metrics and among the events of the very step in which it does."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from posttrain.core import ConfigError, Grade, GradeError, Grader, Task, Trajectory
from posttrain.grade import (
    Exact,
    Function,
    Gate,
    Panel,
    WatchBounds,
    WatchedGrader,
    Weighted,
    answer_text,
    failure_metrics,
    grade_all,
    right,
    trajectory_from_text,
    waits,
    wrong,
)

TASK = Task(id="sum", prompt="3 + 4?", answer="7")
TEXTS = ["7", "8", "seven", "9", "10", "7", "1", "0"]


class Run:
    """A run in memory; `tracker` is itself."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.rows: list[dict[str, float]] = []

    @property
    def tracker(self) -> Run:
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.append({"step": step, **metrics})

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def signs(self) -> list[str]:
        return [fields["sign"] for kind, fields in self.events if kind == "alarm"]


def _answers(texts: Sequence[str] = TEXTS) -> list[Trajectory]:
    return [trajectory_from_text(TASK, text) for text in texts]


def _right(trajectory: Trajectory) -> float:
    return float(answer_text(trajectory) == "7")


def _step(watched: WatchedGrader, step: int = 1, texts: Sequence[str] = TEXTS, **more: Any) -> dict[str, float]:
    async def whole() -> dict[str, float]:
        await grade_all(watched, _answers(texts), deadline_s=0.3)
        return await watched.step(step, **more)

    return asyncio.run(whole())


def _raises_at_8(trajectory: Trajectory) -> float:
    if answer_text(trajectory) == "8":
        raise ZeroDivisionError("no")
    return _right(trajectory)


async def _hangs_at_8(trajectory: Trajectory) -> float:
    await asyncio.sleep(30 if answer_text(trajectory) == "8" else 0)
    return _right(trajectory)


def _blocks_at_8(trajectory: Trajectory) -> float:
    time.sleep(3 if answer_text(trajectory) == "8" else 0)
    return _right(trajectory)


@pytest.mark.parametrize(
    ("fn", "failed", "timed_out", "invalid", "cause"),
    [
        (_raises_at_8, 1, 0, 0, "ZeroDivisionError: no"),
        (_hangs_at_8, 1, 1, 0, "no grade within 0.3 s"),
        (_blocks_at_8, 1, 1, 0, "no grade within 0.3 s"),
        (lambda t: math.nan if answer_text(t) == "8" else _right(t), 1, 0, 1, "its score is nan"),
        (lambda t: math.inf if answer_text(t) == "8" else _right(t), 1, 0, 1, "its score is inf"),
        (lambda t: 17.0 if answer_text(t) == "8" else _right(t), 1, 0, 1, "outside its range from 0 to 1"),
    ],
)
def test_a_failure_is_in_the_step_in_which_it_happens(
    fn: Callable[[Trajectory], Any], failed: int, timed_out: int, invalid: int, cause: str
) -> None:
    run = Run()
    watched = WatchedGrader(Function(fn, "g", score_range=(0, 1)), run, max_failed=0.5)
    before = _step(watched, 1, ["7", "9"])
    metrics = _step(watched, 2)
    assert [before[f"grader/g/{kind}"] for kind in ("failed", "timed_out", "invalid")] == [0, 0, 0]
    assert before["alarms"] == 0
    assert [metrics[f"grader/g/{kind}"] for kind in ("failed", "timed_out", "invalid")] == [failed, timed_out, invalid]
    assert metrics["alarms"] == 1
    ((kind, fields),) = run.events
    assert (kind, fields["sign"], fields["step"], fields["value"]) == ("alarm", "grader_failed", 2, 1 / 8)
    assert cause in fields["detail"]


@pytest.mark.parametrize(
    "make", [lambda *g: Weighted([(one, 1.0) for one in g]), lambda *g: Panel(g, "mean", quorum=2)]
)
def test_the_part_that_fails_is_named(make: Callable[..., Grader]) -> None:
    async def slow(_: Trajectory) -> float:
        await asyncio.sleep(30)
        return 1.0

    def grades(*parts: Grader) -> list[Grade]:
        return asyncio.run(grade_all(make(*parts), _answers(["7"]), deadline_s=0.3))

    nan = failure_metrics(grades(Exact(), Function(lambda _: math.nan, "liar")))
    assert (nan["grader/liar/failed"], nan["grader/liar/invalid"]) == (1, 1)
    late = grades(Exact(), Function(slow, "slow"))
    assert late[0].error == "no grade within 0.3 s (waited for slow)"
    found = failure_metrics(late)
    assert (found["grader/slow/failed"], found["grader/slow/timed_out"]) == (1, 1)
    assert "grader/exact/failed" not in found


def test_a_grader_that_pays_for_nothing_is_seen_at_once() -> None:
    run = Run()
    always = WatchedGrader(Function(lambda _: 1.0, "yes"), run)
    metrics = _step(always, 1, ["", "7", "8", "Let's solve this problem step by step."])
    assert metrics["watch/keys_rewarded"] == 0.5
    assert metrics["watch/constant"] == 1.0
    assert run.signs() == ["master_key"]
    assert run.events[0][1]["step"] == 1


def test_a_constant_grader_is_seen() -> None:
    run = Run()
    watched = WatchedGrader(Function(lambda _: 0.5, "half"), run, bounds=WatchBounds(constant_steps=3))
    counts = [_step(watched, step)["alarms"] for step in range(1, 5)]
    assert counts == [0, 0, 1, 1]
    assert run.signs() == ["constant", "constant"]


def test_a_grader_that_fails_its_own_cases_does_not_begin() -> None:
    run = Run()
    cases = [right(TASK, "7"), wrong(TASK, "8"), wrong(TASK, "")]
    generous = WatchedGrader(Function(lambda _: 1.0, "generous", cases=cases), run)
    with pytest.raises(GradeError, match=r"'generous' fails its own proof, so the run does not begin:\n.*'8'"):
        asyncio.run(generous.prove())
    assert run.signs() == ["proof"]
    asyncio.run(generous.prove("tell"))
    assert len(run.signs()) == 3
    asyncio.run(WatchedGrader(Exact(), run).prove())
    assert len(run.signs()) == 3
    asyncio.run(WatchedGrader(Function(_right, "bare"), run).prove())
    assert run.events[-1][0] == "warning"
    assert "bare: has no cases" in run.events[-1][1]["text"]


def test_a_grader_that_begins_to_lie_is_seen_in_that_step() -> None:
    lies = False

    def fickle(trajectory: Trajectory) -> float:
        return 1.0 if lies else _right(trajectory)

    run = Run()
    cases = [right(TASK, "7"), wrong(TASK, "8")]
    inner = Function(fickle, "fickle", cases=cases)
    watched = WatchedGrader(Gate(Function(lambda _: 1.0, "open"), inner, cases=[right(TASK, "7")]), run)
    asyncio.run(watched.prove())
    held = [_step(watched, step)["grader/cases_held"] for step in (1, 2)]
    lies = True
    later = [_step(watched, step) for step in (3, 4)]
    assert held == [1.0, 1.0]
    assert min(row["grader/cases_held"] for row in later) == 0.5
    (alarm,) = [fields for kind, fields in run.events if kind == "alarm"]
    assert (alarm["sign"], alarm["value"]) == ("proof", 1.0)
    assert "fickle: '8'" in alarm["detail"]


def test_the_step_at_which_a_run_stops_is_written_first() -> None:
    run = Run()
    watched = WatchedGrader(Function(_raises_at_8, "g"), run, step=4)

    async def whole() -> None:
        grades = await grade_all(watched, _answers(["8", "8", "7"]))
        watched.check(grades)

    with pytest.raises(GradeError, match="2 of 3 grades failed"):
        asyncio.run(whole())
    assert run.signs() == ["grader_failed"]
    (row,) = run.rows
    assert (row["step"], row["grader/g/failed"], row["reward"], row["alarms"]) == (5, 2, 1.0, 1)


def test_reward_up_while_held_out_falls_is_seen_also_by_a_resumed_run() -> None:
    run = Run()
    watched = WatchedGrader(Function(_right, "g"), run, bounds=WatchBounds(window=1))
    rows = [{"step": 1, "reward": 0.125, "eval/accuracy": 0.5, **_step(watched, 1, ["7"] + ["8"] * 7, held_out=0.5)}]
    assert run.signs() == []
    resumed = WatchedGrader(Function(_right, "g"), run, step=1, past=rows, bounds=WatchBounds(window=1))
    assert resumed.watch == watched.watch
    assert _step(resumed, 2, ["7"] * 4 + ["8"] * 4, held_out=0.3)["alarms"] >= 1
    assert "held_out" in run.signs()


def test_a_watched_grader_is_the_grader() -> None:
    inner = Weighted([(Exact(), 1.0)], cases=[right(TASK, "7")])
    watched = WatchedGrader(inner, Run())
    assert (watched.name, watched.graders, list(watched.cases())) == (inner.name, inner.graders, list(inner.cases()))
    assert watched.deadline_s == inner.deadline_s
    with pytest.raises(ConfigError, match="watched already"):
        WatchedGrader(watched, Run())
    with watched.paused():
        asyncio.run(grade_all(watched, _answers()))
    assert "watch/keys" not in asyncio.run(watched.step(1))
    assert not waits(watched)
    assert waits(Weighted([(Exact(), 1.0), (Function(_hangs_at_8, "s"), 1.0)]))
