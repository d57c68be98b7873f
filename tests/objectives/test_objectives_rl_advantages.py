"""Advantages over the batch and of several rewards: numbers worked by hand, and what leaves them alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objectives import (
    batch_scaled_advantages,
    decoupled_advantages,
    leave_one_out,
    max_rl_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
)

NAN = math.nan
rewards = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=4)

OF_ONE_REWARD = {
    "batch": batch_scaled_advantages,
    "reinforce": reinforce_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "reinforce_pp_baseline": lambda r, **o: reinforce_pp_advantages(r, group_baseline=True, **o),
    "max_rl": max_rl_advantages,
    "rloo": leave_one_out,
    "decoupled": lambda r, **o: decoupled_advantages(torch.stack([r, r.square()]), torch.ones(2), **o),
}


def test_batch_scaled_by_hand():
    # All rewards 0, 2, 4, 2: mean 2, sample variance 8/3. Groups' means 1 and 3.
    found = batch_scaled_advantages(torch.tensor([[0.0, 2.0], [4.0, 2.0]]), eps=0.0)
    each = 1 / math.sqrt(8 / 3)
    assert found.flatten().tolist() == pytest.approx([-each, each, each, -each])


def test_reinforce_by_hand():
    rewards_PG = torch.tensor([[1.0, NAN], [2.0, 6.0]])
    valid_PG = ~rewards_PG.isnan()
    assert reinforce_advantages(rewards_PG, valid_PG=valid_PG).tolist() == [[-2.0, 0.0], [-1.0, 3.0]]  # mean 3
    assert reinforce_advantages(rewards_PG, baseline=False, valid_PG=valid_PG).tolist() == [[1.0, 0.0], [2.0, 6.0]]


def test_reinforce_pp_by_hand():
    # 0, 2, 2, 4: mean 2, variance over n 2
    rewards_PG = torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    root = math.sqrt(2)
    assert reinforce_pp_advantages(rewards_PG).flatten().tolist() == pytest.approx([-root, 0.0, 0.0, root])
    # With the groups' means off: −1, 1, −1, 1, whose variance is 1
    found = reinforce_pp_advantages(rewards_PG, group_baseline=True)
    assert found.flatten().tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0])


def test_max_rl_by_hand():
    # One right in four: mean 1/4, so (1 − 1/4)/(1/4) = 3 and −1; all right: 0; all wrong: 0, not NaN.
    rewards_PG = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert max_rl_advantages(rewards_PG).tolist() == [[3.0, -1.0, -1.0, -1.0], [0.0] * 4, [0.0] * 4]
    with pytest.raises(ValueError, match="at least 0"):
        max_rl_advantages(-rewards_PG)


@pytest.mark.parametrize(("p", "size"), [(0.3, 4), (0.05, 6), (0.9, 2)])
def test_max_rl_estimates_the_gradient_of_the_truncated_log_likelihood(p, size):
    """A coin that is right with probability p, all groups enumerated: the mean gradient over groups is that of
    −Σ_{k < G} (1−p)^k / k, the expansion of log p to order G − 1."""
    expected = sum((1 - p) ** (k - 1) for k in range(1, size))
    total = 0.0
    for outcome in range(2**size):
        right = torch.tensor([float(outcome >> place & 1) for place in range(size)], dtype=torch.float64)
        chance = p ** int(right.sum()) * (1 - p) ** int(size - right.sum())
        scores = right / p - (1 - right) / (1 - p)  # d log P(own outcome) / dp
        total += chance * (max_rl_advantages(right[None])[0] * scores).mean().item()
    assert total == pytest.approx(expected, rel=1e-9)


def test_decoupled_by_hand():
    # First reward 0, 2: ∓1/√2 each (mean 1, sample deviation √2); second 10, 0: ±1/√2; weights 1 and 2: ∓1/√2 ± √2.
    rewards_KPG = torch.tensor([[[0.0, 2.0]], [[10.0, 0.0]]], dtype=torch.float64)
    # sums: −1/√2 + 2/√2 = 1/√2, and its negative; sample deviation of (1/√2, −1/√2) is 1
    found = decoupled_advantages(rewards_KPG, torch.tensor([1.0, 2.0]), eps=0.0)
    assert found.flatten().tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])


@pytest.mark.parametrize("name", OF_ONE_REWARD)
def test_failed_siblings_count_nowhere(name):
    plain = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    wider = torch.cat([plain, torch.full((2, 1), NAN, dtype=torch.float64)], dim=1)
    valid = ~wider.isnan()
    found = OF_ONE_REWARD[name](wider, valid_PG=valid)
    torch.testing.assert_close(found[:, :3], OF_ONE_REWARD[name](plain))
    assert found[:, 3].tolist() == [0.0, 0.0]


@given(rewards, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_siblings_and_prompts_does_not_matter(values, rng):
    rewards_PG = torch.tensor(values, dtype=torch.float64)
    siblings, prompts = list(range(3)), list(range(len(values)))
    rng.shuffle(siblings)
    rng.shuffle(prompts)
    for name, advantages in OF_ONE_REWARD.items():
        found = advantages(rewards_PG[prompts][:, siblings])
        torch.testing.assert_close(found, advantages(rewards_PG)[prompts][:, siblings], msg=name)


@given(rewards)
@settings(max_examples=30, deadline=None)
def test_shift_and_scale(values):
    rewards_PG = torch.tensor(values, dtype=torch.float64)
    for name in ("batch", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "rloo"):  # a shift changes nothing
        torch.testing.assert_close(
            OF_ONE_REWARD[name](rewards_PG + 3), OF_ONE_REWARD[name](rewards_PG), rtol=1e-6, atol=1e-6, msg=name
        )
    for name in ("reinforce_pp", "reinforce_pp_baseline", "max_rl"):  # nor does a scale
        torch.testing.assert_close(
            OF_ONE_REWARD[name](rewards_PG * 2), OF_ONE_REWARD[name](rewards_PG), rtol=1e-6, atol=1e-6, msg=name
        )


def test_equal_rewards_teach_nothing():
    rewards_PG = torch.full((2, 3), 0.7, dtype=torch.float64)
    for name, advantages in OF_ONE_REWARD.items():
        assert advantages(rewards_PG).abs().max() < 1e-6, name
