"""Advantages, with numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objectives import group_advantages, leave_one_out

rewards = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


def test_group_advantages_by_hand():
    # Group 1: mean 2/4 = 0.5; squares 4 × 0.25 = 1; sample variance 1/3.  Group 2: all equal.
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    plain = group_advantages(rewards_PG, std=False)
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    scaled = group_advantages(rewards_PG, std=True, eps=0.0001)
    expected = 0.5 / (math.sqrt(1 / 3) + 0.0001)
    assert scaled[0].tolist() == pytest.approx([expected, -expected, -expected, expected])
    assert scaled[1].tolist() == [0.0] * 4


def test_leave_one_out_by_hand():
    # 6 − (1 + 2)/2 = 4.5; 1 − (6 + 2)/2 = −3; 2 − (6 + 1)/2 = −1.5
    assert leave_one_out(torch.tensor([[6.0, 1.0, 2.0]])).tolist() == [[4.5, -3.0, -1.5]]


def test_failed_siblings_are_left_out_of_mean_and_std():
    nan = math.nan
    rewards_PG = torch.tensor([[4.0, nan, 0.0, 2.0], [1.0, nan, nan, nan], [nan, nan, nan, nan]])
    valid_PG = ~rewards_PG.isnan()
    # Group 1: valid 4, 0, 2: mean 2, sample std 2. Group 2 has one valid sibling, group 3 none.
    assert group_advantages(rewards_PG, std=False, valid_PG=valid_PG).tolist() == [
        [2.0, 0.0, -2.0, 0.0],
        [0.0] * 4,
        [0.0] * 4,
    ]
    scaled = group_advantages(rewards_PG, std=True, valid_PG=valid_PG, eps=0.0)
    assert scaled[0].tolist() == [1.0, 0.0, -1.0, 0.0]
    # Leave one out: 4 − 1 = 3; 0 − 3 = −3; 2 − 2 = 0.
    assert leave_one_out(rewards_PG, valid_PG=valid_PG).tolist() == [[3.0, 0.0, -3.0, 0.0], [0.0] * 4, [0.0] * 4]


@given(rewards, st.floats(-100, 100, width=32))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_all_rewards_changes_nothing(values, shift):
    rewards_PG = torch.tensor(values, dtype=torch.float64)
    for advantages in (
        lambda r: group_advantages(r, std=True),
        lambda r: group_advantages(r, std=False),
        leave_one_out,
    ):
        torch.testing.assert_close(advantages(rewards_PG + shift), advantages(rewards_PG), rtol=1e-6, atol=1e-6)


@given(rewards)
@settings(max_examples=50, deadline=None)
def test_advantages_of_a_group_sum_to_zero(values):
    rewards_PG = torch.tensor(values, dtype=torch.float64)
    assert group_advantages(rewards_PG, std=True).sum(dim=1).abs().max() < 1e-6
    assert leave_one_out(rewards_PG).sum(dim=1).abs().max() < 1e-6


def test_leave_one_out_baseline_does_not_depend_on_own_reward():
    first = leave_one_out(torch.tensor([[1.0, 5.0, 3.0]]))
    second = leave_one_out(torch.tensor([[100.0, 5.0, 3.0]]))
    assert second[0, 0] - first[0, 0] == 99.0  # only the reward itself moved


def test_a_wrong_rank_is_refused():
    with pytest.raises(AssertionError, match="rank 1"):
        group_advantages(torch.zeros(3), std=False)
