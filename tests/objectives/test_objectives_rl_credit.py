"""Credit along a sequence and the value loss: numbers worked by hand, and an independent slow reference."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objectives import (
    adapt_kl_coef,
    combine,
    discounted_returns,
    explained_variance,
    gae,
    last_tokens,
    missing_eos_penalty,
    over_long_penalty,
    token_rewards,
    value_loss,
    whiten,
)

LOG2 = math.log(2.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# Generalised advantage estimation


def test_gae_by_hand():
    # One answer, rewards 0, 0, 1, values 0.5, 0.25, 0.75, γ = 1, λ = 0.5, worked from the end:
    #   δ = 0.25 − 0.5 = −0.25;  0.75 − 0.25 = 0.5;  1 + 0 − 0.75 = 0.25
    #   A₂ = 0.25;  A₁ = 0.5 + 0.5 · 0.25 = 0.625;  A₀ = −0.25 + 0.5 · 0.625 = 0.0625
    sequence_N = torch.tensor([0, 0, 0])
    advantages, returns = gae(tensor(0, 0, 1), tensor(0.5, 0.25, 0.75), sequence_N, 1, lam=0.5)
    assert advantages.tolist() == [0.0625, 0.625, 0.25]
    assert returns.tolist() == [0.5625, 0.875, 1.0]


def test_gae_discounts_and_bootstraps_by_hand():
    # γ = 0.5, λ = 1, rewards 1, 2, values 4, 8, cut off where the value is 16:
    #   δ₁ = 2 + 0.5 · 16 − 8 = 2;  δ₀ = 1 + 0.5 · 8 − 4 = 1;  A₀ = 1 + 0.5 · 2 = 2
    advantages, _ = gae(tensor(1, 2), tensor(4, 8), torch.tensor([0, 0]), 1, gamma=0.5, lam=1.0, bootstrap_S=tensor(16))
    assert advantages.tolist() == [2.0, 2.0]


def slow_gae(rewards, values, gamma, lam):
    """The definition as a double sum, one answer at a time."""
    after = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (later - now) * deltas[later] for later in range(now, len(deltas)))
        for now in range(len(deltas))
    ]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.sampled_from([0.9, 1.0]))
@settings(max_examples=40, deadline=None)
def test_gae_is_its_definition_whatever_the_order_of_answers(seed, lam, gamma):
    rng = random.Random(seed)
    lengths = [rng.randint(0, 6) for _ in range(5)]
    answers = [[(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(length)] for length in lengths]
    order = [index for index in range(5) for _ in answers[index]]
    if rng.random() < 0.5:  # tokens of different answers interleaved
        rng.shuffle(order)
    if not order:
        return
    place = [0] * 5
    rewards, values = [], []
    for index in order:
        reward, value = answers[index][place[index]]
        place[index] += 1
        rewards.append(reward)
        values.append(value)
    found, returns = gae(tensor(*rewards), tensor(*values), torch.tensor(order), 5, gamma=gamma, lam=lam)
    for index, answer in enumerate(answers):
        mine = [found[n].item() for n in range(len(order)) if order[n] == index]
        assert mine == pytest.approx(slow_gae([r for r, _ in answer], [v for _, v in answer], gamma, lam), abs=1e-9)
    torch.testing.assert_close(returns - found, tensor(*values))


def test_with_lambda_one_the_value_is_a_baseline_and_with_zero_its_own_target():
    rewards, values, sequence_N = tensor(0, 1, 2), tensor(3, 5, 7), torch.tensor([0, 0, 0])
    assert gae(rewards, values, sequence_N, 1, lam=1.0)[1].tolist() == [3.0, 3.0, 2.0]  # what is still to come
    assert gae(rewards, values, sequence_N, 1, lam=0.0)[0].tolist() == [2.0, 3.0, -5.0]  # r + V' − V


def test_discounted_returns_by_hand():
    sequence_N = torch.tensor([0, 0, 1, 0])
    assert discounted_returns(tensor(1, 2, 5, 4), sequence_N, 2, gamma=0.5).tolist() == [3.0, 4.0, 5.0, 4.0]


def test_a_perfect_value_model_leaves_no_advantage():
    rewards, sequence_N = tensor(0, 0, 1, 0, 2), torch.tensor([0, 0, 0, 1, 1])
    values = discounted_returns(rewards, sequence_N, 2)
    assert gae(rewards, values, sequence_N, 2, lam=0.95)[0].abs().max() < 1e-12
    assert explained_variance(values, values).item() == 1.0


def test_explained_variance_by_hand():
    # returns 0, 2 (variance 1); errors 0.5, −0.5 (variance 0.25)
    assert explained_variance(tensor(-0.5, 2.5), tensor(0, 2)).item() == 0.75
    assert explained_variance(tensor(1, 1), tensor(0, 2)).item() == 0.0
    assert explained_variance(tensor(1, 2), tensor(3, 3)).item() == 0.0  # nothing to explain


def test_whiten_by_hand():
    # 1, 3: mean 2, variance over n 1
    assert whiten(tensor(1, 3), eps=0.0).tolist() == [-1.0, 1.0]
    assert whiten(tensor(1, 3), shift_mean=False, eps=0.0).tolist() == [1.0, 3.0]
    # 0, 4, and a value that does not count: mean 2, deviation 2
    assert whiten(tensor(0, 4, math.nan), mask_N=torch.tensor([True, True, False]), eps=0.0).tolist() == [
        -1.0,
        1.0,
        0.0,
    ]
    assert whiten(tensor(5, 5, 5)).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8), st.floats(0.5, 4, width=32), st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_whitening_forgets_shift_and_scale(values, scale, shift):
    if max(values) - min(values) < 0.01:
        return
    x = tensor(*values)
    torch.testing.assert_close(whiten(scale * x + shift), whiten(x), rtol=1e-3, atol=1e-3)


# Rewards token by token


def test_token_rewards_by_hand():
    # Two answers of two tokens and one; scores 1 and −2. k1 = log π − log ref: log 2, 0, −log 2. β = 0.5.
    sequence_N = torch.tensor([0, 0, 1])
    rewards = token_rewards(
        tensor(1, -2),
        sequence_N,
        logprobs_N=tensor(LOG2, 0, 0),
        ref_logprobs_N=tensor(0, 0, LOG2),
        kl_coef=0.5,
    )
    assert rewards.tolist() == pytest.approx([-0.5 * LOG2, 1.0, -2.0 + 0.5 * LOG2])
    assert token_rewards(tensor(1, -2), sequence_N).tolist() == [0.0, 1.0, -2.0]
    # k2 = d²/2 and k3 = e^d − 1 − d with d = −log 2 at the first token, log 2 at the last
    for estimator, first, last in [("k2", LOG2**2 / 2, LOG2**2 / 2), ("k3", 0.5 - 1 + LOG2, 2 - 1 - LOG2)]:
        found = token_rewards(
            tensor(0, 0),
            sequence_N,
            logprobs_N=tensor(LOG2, 0, 0),
            ref_logprobs_N=tensor(0, 0, LOG2),
            kl_coef=1.0,
            kl_estimator=estimator,
        )
        assert found.tolist() == pytest.approx([-first, 0.0, -last])
    with pytest.raises(ValueError, match="needs logprobs_N"):
        token_rewards(tensor(1), torch.tensor([0]), kl_coef=0.1)


def test_last_tokens_by_hand():
    assert last_tokens(torch.tensor([0, 0, 2, 0, 2]), 4).tolist() == [3, -1, 4, -1]


def test_adaptive_kl_by_hand():
    # error 1 is clipped to 0.2: 1 + 0.1 · 0.2 = 1.02; −0.1 is not; −1 is clipped
    assert adapt_kl_coef(0.5, 12.0, target=6.0) == pytest.approx(0.5 * 1.02)
    assert adapt_kl_coef(0.5, 5.4, target=6.0) == pytest.approx(0.5 * 0.99)
    assert adapt_kl_coef(0.5, 0.0, target=6.0) == pytest.approx(0.5 * 0.98)
    assert adapt_kl_coef(0.5, 6.0, target=6.0) == 0.5
    coef = 0.1
    for _ in range(500):  # a policy whose KL falls as the coefficient rises settles on the target
        coef = adapt_kl_coef(coef, 1.0 / coef, target=4.0)
    assert 1.0 / coef == pytest.approx(4.0, rel=1e-3)


# Length


def test_over_long_penalty_by_hand():
    # L = 20, B = 5: free up to 15, then −1/5 per token, −1 from 20 on
    lengths = torch.tensor([1, 15, 16, 18, 20, 25])
    assert over_long_penalty(lengths, max_length=20, buffer=5).tolist() == pytest.approx([0, 0, -0.2, -0.6, -1, -1])


def test_missing_eos_penalty_by_hand():
    scores, ended = tensor(1, 1, 0.5), torch.tensor([True, False, False])
    assert missing_eos_penalty(scores, ended, 0.75).tolist() == [1.0, 0.25, -0.25]
    assert missing_eos_penalty(scores, ended, 10.0, replace=True).tolist() == [1.0, -10.0, -10.0]


# The value loss


def test_value_loss_by_hand():
    # V 1, 3, 0; old 0, 3, 0; R 2, 2, −1; clip 0.5.
    # 1: free (1 − 2)² = 1, clipped to 0.5: (0.5 − 2)² = 2.25, the worse counts. 2: 1 either way. 3: 1 either way.
    values = tensor(1, 3, 0).requires_grad_()
    loss, metrics = value_loss(values, tensor(0, 3, 0), tensor(2, 2, -1), denominator=3.0, clip=0.5)
    assert loss.item() == pytest.approx(0.5 * (2.25 + 1 + 1) / 3)
    numbers = combine([metrics])
    assert numbers["val/clipfrac_avg"] == pytest.approx(1 / 3)
    assert numbers["val/error"] == 1.0
    loss.backward()
    assert values.grad.tolist() == pytest.approx([0.0, 1 / 3, 1 / 3])  # the clipped one has moved far enough
    plain, _ = value_loss(values, values, tensor(2, 2, -1), denominator=1.0, clip=None, weights_N=tensor(1, 0, 2))
    assert plain.item() == pytest.approx(0.5 * (1 + 2))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_value_gradient_against_finite_differences(clip):
    generator = torch.Generator().manual_seed(0)
    values, old, returns, weights = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(4))
    values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old, returns, denominator=5.0, clip=clip, weights_N=weights)[0], (values,), eps=1e-7
    )


def test_a_value_that_is_right_has_no_gradient():
    values = tensor(1, 2).requires_grad_()
    value_loss(values, tensor(1, 2), tensor(1, 2), denominator=1.0)[0].backward()
    assert values.grad.tolist() == [0.0, 0.0]
