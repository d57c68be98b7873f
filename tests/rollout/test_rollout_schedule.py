from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.core import ConfigError, DataError, Task
from posttrain.rollout import PromptSchedule


def _tasks(number: int) -> list[Task]:
    return [Task(id=str(place), prompt="?") for place in range(number)]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**31))
def test_every_task_comes_exactly_once_in_every_epoch(number: int, per_step: int, epoch: int, seed: int) -> None:
    schedule = PromptSchedule(_tasks(number), seed, per_step)
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    seen = [task.id for step in steps for task in schedule.tasks_at(step)]
    assert Counter(seen) == Counter(str(place) for place in range(number))
    assert {schedule.epoch(step) for step in steps} == {epoch}
    assert all(1 <= len(schedule.tasks_at(step)) <= per_step for step in steps)


@given(st.integers(5, 40), st.integers(1, 5), st.integers(0, 3))
def test_with_drop_last_every_step_is_full_and_nothing_comes_twice(number: int, per_step: int, epoch: int) -> None:
    schedule = PromptSchedule(_tasks(number), 0, per_step, drop_last=True)
    assert schedule.steps_per_epoch == number // per_step
    steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
    assert all(len(schedule.tasks_at(step)) == per_step for step in steps)
    seen = Counter(task.id for step in steps for task in schedule.tasks_at(step))
    assert set(seen.values()) == {1}


def test_a_step_needs_no_memory_of_the_steps_before() -> None:
    walked = PromptSchedule(_tasks(10), 3, 4)
    forward = [walked.tasks_at(step) for step in range(9)]
    for step in (8, 0, 5, 2):
        assert PromptSchedule(_tasks(10), 3, 4).tasks_at(step) == forward[step]
    assert [walked.tasks_at(step) for step in (7, 1, 7)] == [forward[7], forward[1], forward[7]]


def test_epochs_and_seeds_shuffle_differently() -> None:
    def epoch(schedule: PromptSchedule, number: int) -> list[str]:
        return [task.id for task in schedule.tasks_at(number)]

    schedule = PromptSchedule(_tasks(30), 0, 30)
    assert epoch(schedule, 0) != epoch(schedule, 1)
    assert epoch(schedule, 0) != epoch(PromptSchedule(_tasks(30), 1, 30), 0)
    assert epoch(schedule, 0) != [str(place) for place in range(30)]


def test_what_is_left_out_differs_by_epoch() -> None:
    schedule = PromptSchedule(_tasks(5), 0, 2, drop_last=True)
    left_out = {
        frozenset("01234") - {task.id for step in (2 * epoch, 2 * epoch + 1) for task in schedule.tasks_at(step)}
        for epoch in range(20)
    }
    assert len(left_out) == 5


def test_the_fingerprint_tells_other_data_and_settings() -> None:
    prints = [
        PromptSchedule(_tasks(5), 0, 2).fingerprint(),
        PromptSchedule(_tasks(6), 0, 2).fingerprint(),
        PromptSchedule(_tasks(5)[::-1], 0, 2).fingerprint(),
        PromptSchedule(_tasks(5), 1, 2).fingerprint(),
        PromptSchedule(_tasks(5), 0, 3).fingerprint(),
        PromptSchedule(_tasks(5), 0, 2, drop_last=True).fingerprint(),
    ]
    assert len(set(prints)) == 6
    assert PromptSchedule(_tasks(5), 0, 2).fingerprint() == prints[0]


def test_what_cannot_be_scheduled_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 tasks"):
        PromptSchedule([], 0, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        PromptSchedule(_tasks(3), 0, 0)
    with pytest.raises(ConfigError, match="never fill a step"):
        PromptSchedule(_tasks(3), 0, 4, drop_last=True)
    with pytest.raises(ConfigError, match="count from 0"):
        PromptSchedule(_tasks(3), 0, 2).tasks_at(-1)
    with pytest.raises(DataError, match="'1' comes twice, at 1 and 3"):
        PromptSchedule([*_tasks(3), Task(id="1", prompt="!")], 0, 2)
