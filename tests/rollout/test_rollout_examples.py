from __future__ import annotations

import math

import pytest

from posttrain import rollout
from posttrain.core import RolloutError, StopReason, Task, Trajectory
from posttrain.rollout import Group, example_metrics, rollout_metrics, to_examples

TASK = Task(id="a", prompt="?")


def _trajectory(index: int, num_new: int = 2, **changes: object) -> Trajectory:
    """A prompt of two tokens and `num_new` new ones; the first of three or more is a tool's, not the policy's."""
    wrote = [True] * num_new
    if num_new > 2:
        wrote[0] = False
    mask = (False, False, *wrote)
    trajectory = Trajectory(
        id=f"a/0/{index}",
        task=TASK,
        tokens=tuple(range(2 + num_new)),
        mask=mask,
        logprobs=tuple(-1.0 if new else 0.0 for new in mask),
        policy_logprobs=tuple(-0.5 if new else 0.0 for new in mask),
        text="",
        stop_reason=StopReason.EOS,
        group="a/0",
        index=index,
        weight_version=5,
        last_weight_version=6,
        seconds=float(index),
    )
    return trajectory.replace(**changes)


def _group(*trajectories: Trajectory) -> Group:
    return Group(task=TASK, trajectories=trajectories)


def test_columns_by_hand() -> None:
    (first, second) = to_examples([_group(_trajectory(0), _trajectory(1, 3))], [[0.5, -0.5]])
    assert (first.id, first.group) == ("a/0/0", "a/0")
    (sequence,) = first.sequences
    assert sequence.tokens == (0, 1, 2, 3)
    assert sequence.mask == (False, False, True, True)
    assert sequence.columns == {
        "advantages": (0.0, 0.0, 0.5, 0.5),
        "sampler_logprobs": (0.0, 0.0, -1.0, -1.0),
        "policy_logprobs": (0.0, 0.0, -0.5, -0.5),
    }
    assert second.sequences[0].columns["advantages"] == (0.0, 0.0, 0.0, -0.5, -0.5)  # none on the tool's token
    assert first.scalars == {"weight_version": 5.0}


def test_advantages_may_differ_by_token() -> None:
    (example,) = to_examples([_group(_trajectory(0))], [[(9.0, 9.0, 0.25, 0.75)]])
    assert example.sequences[0].columns["advantages"] == (0.0, 0.0, 0.25, 0.75)


def test_what_cannot_be_learned_from_is_left_out_and_counted() -> None:
    group = _group(
        _trajectory(0),
        _trajectory(1, stop_reason=StopReason.ERROR, error="lost"),
        _trajectory(2),
        _trajectory(3),
        _trajectory(4, 0),
        _trajectory(5, stop_reason=StopReason.LENGTH),
        _trajectory(6),
    )
    advantages = [[1.0, 1.0, None, math.nan, 1.0, 1.0, 0.0]]
    assert [example.id for example in to_examples([group], advantages)] == ["a/0/0", "a/0/5", "a/0/6"]
    assert example_metrics([group], advantages) == {
        "examples/taken": 3,
        "examples/left_out_failed": 1,
        "examples/left_out_ungraded": 2,
        "examples/left_out_empty": 1,
        "examples/left_out_clipped": 0,
        "examples/left_out_zero": 0,
    }
    strict = {"keep_clipped": False, "keep_zero": False}
    assert [example.id for example in to_examples([group], advantages, **strict)] == ["a/0/0"]
    counted = example_metrics([group], advantages, **strict)
    assert (counted["examples/taken"], counted["examples/left_out_clipped"]) == (1, 1)
    assert counted["examples/left_out_zero"] == 1
    assert sum(counted.values()) == 7


@pytest.mark.parametrize(
    ("advantages", "message"),
    [
        ([], "1 groups, but advantages for 0"),
        ([[1.0]], "2 siblings, 1 advantages"),
        ([[1.0, (1.0, 2.0)]], "4 tokens, 2 advantages"),
        ([[1.0, math.inf]], "not a finite number"),
        ([[1.0, (0.0, 0.0, 1.0, math.nan)]], "not a finite number"),
    ],
)
def test_advantages_that_do_not_fit_are_refused(advantages: list[list[object]], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        to_examples([_group(_trajectory(0), _trajectory(1))], advantages)  # type: ignore[arg-type]


def test_metrics_by_hand() -> None:
    group = _group(
        _trajectory(0, 1),
        _trajectory(1, 2),
        _trajectory(2, 7, stop_reason=StopReason.LENGTH, last_weight_version=8),  # six of the policy's
        _trajectory(3, 0, stop_reason=StopReason.TIMEOUT, error="late"),
    )
    assert rollout_metrics([group]) == {
        "completions/mean_length": 3.0,
        "completions/min_length": 1.0,
        "completions/max_length": 6.0,
        "completions/mean_terminated_length": 1.5,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 2.0,
        "completions/clipped_ratio": pytest.approx(1 / 3),
        "num_tokens": 3 + 4 + 9 + 2,
        "rollout/num": 4,
        "rollout/failed": 1,
        "rollout/seconds": 3.0,
        "rollout/weight_version_spread": 3,
    }


def test_metrics_where_all_are_clipped_or_failed_or_absent() -> None:
    clipped = rollout_metrics([_group(_trajectory(0, stop_reason=StopReason.LENGTH))])
    assert clipped["completions/clipped_ratio"] == 1
    assert clipped["completions/mean_terminated_length"] == 0
    failed = rollout_metrics([_group(_trajectory(0, stop_reason=StopReason.ERROR, error="x"))])
    assert failed["rollout/failed"] == 1
    assert "completions/mean_length" not in failed
    assert rollout_metrics([]) == {"num_tokens": 0, "rollout/num": 0, "rollout/failed": 0}


def test_the_door_is_sorted_and_whole() -> None:
    assert list(rollout.__all__) == sorted(rollout.__all__)
    assert all(hasattr(rollout, name) for name in rollout.__all__)
