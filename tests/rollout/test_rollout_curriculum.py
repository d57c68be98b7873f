"""Prompts by epoch and by pass rate, and groups that are replaced: counts, shares, and the same after a resume."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from posttrain.core import CheckpointError, ConfigError, DataError, Grade, StopReason, Task, Trajectory
from posttrain.rollout import (
    Draw,
    Group,
    PassRateCurriculum,
    PromptSchedule,
    PromptStream,
    Rolled,
    fill_batch,
    has_variance,
    pass_rate,
)

TASKS = [Task(id=f"task-{number}", prompt="?") for number in range(10)]


def ids(draw: Draw) -> list[str]:
    return [task.id for task in draw.tasks]


def grades(*scores: float | None) -> list[Grade]:
    return [Grade(score=s, grader="toy", error=None if s is not None else "crashed") for s in scores]


# The stream


def test_equal_draws_are_the_steps_of_a_schedule() -> None:
    for size in (3, 4, 5, 20):
        schedule, stream = PromptSchedule(TASKS, 7, size), PromptStream(TASKS, 7)
        for step in range(9):
            draw = stream.draw(size)
            assert draw.tasks == schedule.tasks_at(step)
            assert (draw.number, draw.epoch) == (step, schedule.epoch(step))


def test_unequal_draws_see_every_task_once_per_epoch_and_never_cross_it() -> None:
    stream = PromptStream(TASKS, 0)
    by_epoch: dict[int, list[str]] = {}
    for size in (4, 3, 4, 1, 9, 2, 5, 5):
        draw = stream.draw(size)
        assert 1 <= len(draw.tasks) <= size
        by_epoch.setdefault(draw.epoch, []).extend(ids(draw))
    assert sorted(by_epoch[0]) == sorted(by_epoch[1]) == sorted(task.id for task in TASKS)
    assert by_epoch[0] != by_epoch[1]


@pytest.mark.parametrize("kind", ["stream", "curriculum"])
def test_a_restored_source_goes_on_as_if_nothing_had_happened(kind: str) -> None:
    def make() -> PromptStream | PassRateCurriculum:
        return PromptStream(TASKS, 3) if kind == "stream" else PassRateCurriculum(TASKS, 3)

    def go(source: PromptStream | PassRateCurriculum, rounds: range) -> list[tuple[list[str], int, int]]:
        drawn = []
        for number in rounds:
            draw = source.draw(3 + number % 2)
            source.record({name: (number * len(name) % 7) / 7 for name in ids(draw)})
            drawn.append((ids(draw), draw.number, draw.epoch))
        return drawn

    whole = make()
    expected = go(whole, range(12))
    first = make()
    assert go(first, range(5)) == expected[:5]
    second = make()
    second.restore(json.loads(json.dumps(first.to_dict())))
    assert go(second, range(5, 12)) == expected[5:]
    assert second.to_dict() == whole.to_dict()
    with pytest.raises(CheckpointError, match="index is missing"):
        make().restore({"position": 3})


# The curriculum


def test_running_pass_rates_by_hand() -> None:
    curriculum = PassRateCurriculum(TASKS, 0, decay=0.5, low=0.2, high=0.8, outside=0.1)
    curriculum.record({"task-0": 1.0, "task-1": 0.5})
    assert curriculum.weight("task-0") == 0.1
    assert curriculum.weight("task-1") == 1.0
    assert curriculum.weight("task-2") == 1.0  # not tried yet
    curriculum.record({"task-0": 0.0})  # 0.5 · 1 + 0.5 · 0
    assert curriculum.rates["task-0"] == 0.5
    assert curriculum.weight("task-0") == 1.0
    metrics = curriculum.metrics()
    assert metrics == {"curriculum/tried": 0.2, "curriculum/in_window": 0.2, "curriculum/pass_rate": 0.5}


def test_what_is_sometimes_solved_is_drawn_most() -> None:
    curriculum = PassRateCurriculum(TASKS, 0, outside=0.1)
    curriculum.record({f"task-{number}": (0.5 if number < 5 else 1.0 if number < 8 else 0.0) for number in range(10)})
    counts: Counter[str] = Counter()
    for _ in range(400):
        draw = curriculum.draw(1)
        counts.update(ids(draw))
    inside = sum(counts[f"task-{number}"] for number in range(5))
    # weights 5 · 1 and 5 · 0.1: an expected share of 10/11 of 400 draws, with a deviation of under 6 draws
    assert abs(inside - 400 * 10 / 11) < 24
    assert all(counts[f"task-{number}"] > 0 for number in range(5))
    assert sum(counts[f"task-{number}"] for number in range(5, 10)) > 10


def test_a_draw_never_repeats_a_task_and_weight_zero_only_fills_up() -> None:
    curriculum = PassRateCurriculum(TASKS, 0, outside=0.0)
    curriculum.record({f"task-{number}": 1.0 for number in range(7)})
    for _ in range(20):
        assert {*ids(curriculum.draw(3))} == {"task-7", "task-8", "task-9"}
    assert len(set(ids(curriculum.draw(8)))) == 8
    assert len(ids(curriculum.draw(99))) == 10


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="low ≤ high"):
        PassRateCurriculum(TASKS, 0, low=0.9, high=0.1)
    with pytest.raises(DataError, match="comes twice"):
        PassRateCurriculum([*TASKS, TASKS[0]], 0)
    with pytest.raises(ConfigError, match="at least 1"):
        PromptStream(TASKS, 0).draw(0)


# Replacing groups


def test_variance_and_pass_rate_by_hand() -> None:
    assert has_variance(grades(1.0, 0.0, None))
    assert not has_variance(grades(1.0, 1.0, None))
    assert not has_variance(grades(1.0, None))
    assert not has_variance(grades(None, None))
    assert pass_rate(grades(1.0, 0.0, None, 0.5)) == 0.5
    assert pass_rate(grades(10.0, 0.0), full_marks=10.0) == 0.5
    assert pass_rate(grades(-3.0, 7.0)) == 0.5  # within [0, 1]
    assert pass_rate(grades(None)) is None


class World:
    """Tasks whose answers are all right, all wrong, or mixed, by number; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def roll(self, draw: Draw) -> list[Rolled]:
        self.asked.append(ids(draw))
        return [Rolled(self.group(task, draw.number), self.grades(task)) for task in draw.tasks]

    def grades(self, task: Task) -> list[Grade]:
        number = int(task.id.split("-")[1])
        return grades(*((1.0, 0.0) if number % 3 == 0 else (1.0, 1.0) if number % 3 == 1 else (0.0, 0.0)))

    def group(self, task: Task, number: int) -> Group:
        siblings = tuple(
            Trajectory(
                id=f"{task.id}/{number}/{index}",
                task=task,
                tokens=(1, 2),
                mask=(False, True),
                logprobs=(0.0, -1.0),
                policy_logprobs=(0.0, -1.0),
                text="",
                stop_reason=StopReason.EOS,
                group=f"{task.id}/{number}",
                index=index,
            )
            for index in range(2)
        )
        return Group(task=task, trajectories=siblings)


def test_the_batch_is_filled_with_groups_that_vary_and_all_is_counted() -> None:
    world, stream = World(), PromptStream(TASKS, 0)
    filled = asyncio.run(fill_batch(stream.draw, world.roll, has_variance, num_groups=4, max_rounds=20))
    assert len(filled.kept) == 4
    assert all(has_variance(rolled.grades) for rolled in filled.kept)
    assert not any(has_variance(rolled.grades) for rolled in filled.dropped)
    asked = [name for names in world.asked for name in names]
    assert len(filled.sampled) == len(asked) == stream.position
    kept_so_far = 0
    for names in world.asked:  # each round asks for what is missing, and no more
        assert len(names) <= 4 - kept_so_far
        kept_so_far += sum(int(name.split("-")[1]) % 3 == 0 for name in names)
    assert filled.metrics() == {
        "resampling/rounds": float(len(world.asked)),
        "resampling/kept": 4.0,
        "resampling/dropped": float(len(asked) - 4),
    }
    again, anew = World(), PromptStream(TASKS, 0)
    assert asyncio.run(fill_batch(anew.draw, again.roll, has_variance, num_groups=4, max_rounds=20)) == filled


def test_rounds_are_bounded_and_nothing_may_be_kept() -> None:
    world, stream = World(), PromptStream([task for task in TASKS if task.id in ("task-1", "task-2")], 0)
    filled = asyncio.run(fill_batch(stream.draw, world.roll, has_variance, num_groups=2, max_rounds=3))
    assert not filled.kept
    assert len(filled.dropped) == 6
    assert len(filled.draws) == 3
    once = asyncio.run(
        fill_batch(PromptStream(TASKS, 0).draw, World().roll, lambda _: True, num_groups=5, max_rounds=1)
    )
    assert len(once.kept) == 5
    with pytest.raises(ConfigError, match="at least 1"):
        asyncio.run(fill_batch(stream.draw, world.roll, has_variance, num_groups=0, max_rounds=1))
