"""Grading while batches are still being made."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pytest

from posttrain.core import ConfigError, Task, Trajectory
from posttrain.grade import Function, Panel, grade_while, trajectory_from_text

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """A selector that does not wait but says that the time has passed."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.passed_s += max(0.0, timeout or 0.0)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer: hours of waiting in no time, and exact on a busy machine."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.passed_s


def simulate(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """What the work gives, and the simulated seconds that it took."""
    loop = SimulatedLoop()
    try:
        result = loop.run_until_complete(work)
        return result, loop.time()
    finally:
        loop.close()


def batch_of(number: int, size: int = 2) -> list[Trajectory]:
    task = Task(id=str(number), prompt="?")
    return [trajectory_from_text(task, f"{number} {n}", id=f"{number}/{n}") for n in range(size)]


class Made:
    """Batches, one every `every_s`; remembers how many were made."""

    def __init__(self, num: int, every_s: float, size: int = 2) -> None:
        self.num, self.every_s, self.size, self.made = num, every_s, size, 0

    async def __aiter__(self) -> AsyncIterator[list[Trajectory]]:
        for number in range(self.num):
            await asyncio.sleep(self.every_s)
            self.made += 1
            yield batch_of(number, self.size)


def grader_of(latency_s: float) -> Function:
    async def give(trajectory: Trajectory) -> float:
        await asyncio.sleep(latency_s)
        return float(trajectory.text.split()[0])

    return Function(give, "slow")


def test_grading_overlaps_with_making_and_keeps_the_order() -> None:
    async def go() -> list[list[float | None]]:
        found = grade_while(Made(5, 2.0), grader_of(5.0), list)
        return [[grade.score for grade in graded.grades] async for graded in found]

    scores, seconds = simulate(go())
    assert scores == [[float(n)] * 2 for n in range(5)]
    assert seconds == pytest.approx(5 * 2.0 + 5.0)  # one after the other it would be 35


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_no_more_batches_are_taken_than_asked(ahead: int) -> None:
    async def go() -> list[int]:
        source = Made(4, 0.0)
        return [source.made async for _ in grade_while(source, grader_of(0.01), list, ahead=ahead)]

    assert simulate(go())[0] == [min(4, n + 1 + ahead) for n in range(4)]


def lognormal_panel(judges: int) -> Panel:
    """Judges with a median of 1 s and sigma 0.5: a tenth of their answers take longer than 1.9 s."""

    def judge(place: int) -> Function:
        clock = random.Random(place)

        async def give(trajectory: Trajectory) -> float:
            await asyncio.sleep(clock.lognormvariate(0.0, 0.5))
            return 1.0

        return Function(give, f"judge_{place}")

    return Panel([judge(place) for place in range(judges)], "mean")


def steps_seconds(grader: Function | Panel, *, ahead: int, group: bool) -> float:
    """Simulated seconds of 20 steps: 8 groups of 8, half a second of sampling each, 2 s of training a step."""

    async def go() -> None:
        source = Made(160, 0.5, size=8) if group else Made(20, 4.0, size=64)
        per_step, taken = (8 if group else 1), 0
        async for _ in grade_while(source, grader, list, ahead=ahead * per_step, concurrency=256):
            taken += 1
            if taken % per_step == 0:
                await asyncio.sleep(2.0)  # training; the judges go on

    return simulate(go())[1]


def test_ten_judges_of_a_second_cost_less_than_a_tenth_of_the_run() -> None:
    at_once = steps_seconds(Function(_at_once, "at_once"), ahead=0, group=False)
    assert at_once == pytest.approx(20 * 6.0)
    after = steps_seconds(lognormal_panel(10), ahead=0, group=False)
    while_sampling = steps_seconds(lognormal_panel(10), ahead=1, group=True)
    assert after > 1.4 * at_once  # each step waits for the slowest of 640 judgements
    assert while_sampling < 1.1 * at_once


async def _at_once(trajectory: Trajectory) -> float:
    return 1.0


def test_places_are_shared_by_all_batches() -> None:
    running, most = 0, 0

    async def give(trajectory: Trajectory) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return 1.0

    async def go() -> int:
        found = grade_while(Made(6, 0.0), Function(give, "counted"), list, concurrency=3)
        return len([graded async for graded in found])

    assert simulate(go())[0] == 6
    assert most == 3


def test_leaving_early_cancels_what_is_under_way() -> None:
    started: list[str] = []
    cancelled: list[str] = []

    async def give(trajectory: Trajectory) -> float:
        if trajectory.text.startswith("0"):
            return 0.0
        started.append(trajectory.id)
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            cancelled.append(trajectory.id)
            raise
        return 1.0

    async def go() -> None:
        found = grade_while(Made(3, 0.1), Function(give, "slow"), list, ahead=2)
        async for _ in found:
            break
        await found.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    simulate(go())
    assert {"1/0", "1/1"} <= set(started)
    assert sorted(cancelled) == sorted(started)


def test_settings_that_cannot_be() -> None:
    async def go() -> None:
        async for _ in grade_while(Made(1, 0.0), grader_of(0.0), list, concurrency=0):
            pass

    with pytest.raises(ConfigError, match="above 0"):
        simulate(go())
