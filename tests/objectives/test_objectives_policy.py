"""The clipped surrogate, with numbers worked by hand, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objectives import (
    combine,
    importance_weights,
    policy_surrogate,
    sampling_metrics,
    sequence_weights,
)

LOG2 = math.log(2.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def surrogate(logprobs, old, advantages, **options):
    options.setdefault("denominator", 1.0)
    loss, metrics = policy_surrogate(logprobs, old, advantages, **options)
    return loss, combine([metrics])


def gradient(logprobs, *args, **options):
    logprobs = logprobs.clone().requires_grad_()
    loss, _ = surrogate(logprobs, *args, **options)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return grad


def test_four_corners_of_the_clip_by_hand():
    # ratio 2, 2, 1/2, 1/2 with advantages 1, −1, 1, −1 and clip [0.8, 1.2]:
    # min(2, 1.2) = 1.2; min(−2, −1.2) = −2; min(0.5, 0.8) = 0.5; min(−0.5, −0.8) = −0.8. Sum −1.1, loss 1.1 / 4.
    logprobs, old, advantages = tensor(LOG2, LOG2, -LOG2, -LOG2), tensor(0, 0, 0, 0), tensor(1, -1, 1, -1)
    loss, metrics = surrogate(logprobs, old, advantages, denominator=4.0)
    assert loss.item() == pytest.approx(1.1 / 4)
    assert metrics["clip_ratio/high_mean"] == 0.25
    assert metrics["clip_ratio/low_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.5
    assert metrics["ratio/mean"] == pytest.approx(1.25)
    assert (metrics["ratio/min"], metrics["ratio/max"]) == pytest.approx((0.5, 2.0))
    # Only the corners that are not clipped pull: d(−r·A)/d log π = −r·A.
    grad = gradient(logprobs, old, advantages, denominator=4.0)
    assert grad.tolist() == pytest.approx([0.0, 0.5, -0.125, 0.0])


def test_asymmetric_clip_by_hand():
    # clip [0.9, 1.5]: min(2, 1.5) = 1.5 and min(−0.5, −0.9) = −0.9
    loss, _ = surrogate(tensor(LOG2, -LOG2), tensor(0, 0), tensor(1, -1), clip_low=0.1, clip_high=0.5)
    assert loss.item() == pytest.approx(-(1.5 - 0.9))


def test_dual_clip_by_hand():
    # ratio 4, advantage −1: plain −4, bounded by 3 · −1. A positive advantage is untouched: min(4, 1.2) = 1.2.
    args = (tensor(2 * LOG2, 2 * LOG2), tensor(0, 0), tensor(-1, 1))
    assert surrogate(*args)[0].item() == pytest.approx(4 - 1.2)
    assert surrogate(*args, dual_clip=3.0)[0].item() == pytest.approx(3 - 1.2)
    assert gradient(*args, dual_clip=3.0).tolist() == [0.0, 0.0]


def test_sequence_ratio_by_hand():
    # Sequence 0: log-ratios log 4 and 0, mean log 2: ratio 2. Sequence 1: one token, ratio 1/2.
    # Advantages 1 and −1, clip [0.8, 1.2]: 1.2 and −0.8. Mean over sequences: 0.2.
    logprobs, old = tensor(2 * LOG2, 0, -LOG2), tensor(0, 0, 0)
    sequence_N = torch.tensor([0, 0, 1])
    options = {
        "sequence_N": sequence_N,
        "num_sequences": 2,
        "weights_N": sequence_weights(sequence_N, 2, logprobs),
        "denominator": 2.0,
    }
    loss, metrics = surrogate(logprobs, old, tensor(1, 1, -1), **options)
    assert loss.item() == pytest.approx(-0.2)
    assert metrics["clip_ratio/region_mean"] == 1.0
    # Not clipped: ratio 2, advantage −1. d(2)/d log π_t = 2 · (1/2) per token, and half the loss is this sequence's.
    grad = gradient(logprobs, old, tensor(-1, -1, -1), **options)
    assert grad.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_importance_weights_scale_the_surrogate_but_not_the_kl_by_hand():
    # surrogate −1 · 0.5 · 1; k1 of log 2 against 0 is log 2
    loss, metrics = surrogate(
        tensor(LOG2),
        tensor(LOG2),
        tensor(1),
        importance_weights_N=tensor(0.5),
        ref_logprobs_N=tensor(0),
        kl_coef=0.1,
        kl_estimator="k1",
    )
    assert loss.item() == pytest.approx(-0.5 + 0.1 * LOG2)
    assert metrics["kl"] == pytest.approx(LOG2)


def test_truncated_importance_weights_by_hand():
    weights = importance_weights(tensor(LOG2, 0, -LOG2), tensor(-LOG2, 0, 0), cap=2.0)
    assert weights.tolist() == pytest.approx([2.0, 1.0, 0.5])  # 4 is cut to 2
    metrics = combine([sampling_metrics(tensor(LOG2, 0, -LOG2), tensor(-LOG2, 0, 0), weights)])
    assert metrics == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": LOG2,
            "sampling/sampling_logp_difference/max": 2 * LOG2,
            "sampling/importance_sampling_ratio/min": 0.5,
            "sampling/importance_sampling_ratio/mean": 3.5 / 3,
            "sampling/importance_sampling_ratio/max": 2.0,
        }
    )


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gradient_against_finite_differences(sequence, estimator, dual_clip):
    generator = torch.Generator().manual_seed(3)
    logprobs, old, ref = (torch.randn(9, generator=generator, dtype=torch.float64) * 0.4 - 2 for _ in range(3))
    advantages = torch.randn(9, generator=generator, dtype=torch.float64)
    sequence_N = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    options = {
        "denominator": 7.0,
        "weights_N": torch.rand(9, generator=generator, dtype=torch.float64),
        "importance_weights_N": torch.rand(9, generator=generator, dtype=torch.float64),
        "ref_logprobs_N": ref,
        "kl_coef": 0.3,
        "kl_estimator": estimator,
        "dual_clip": dual_clip,
        "sequence_N": sequence_N if sequence else None,
        "num_sequences": 3,
    }
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_surrogate(x, old, advantages, **options)[0], (logprobs,), eps=1e-7)


@given(st.lists(st.floats(-200, 5, width=32), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_zero_advantage_gives_exactly_zero_gradient(values):
    logprobs = tensor(*values)
    zeros = torch.zeros_like(logprobs)
    assert gradient(logprobs, zeros, zeros).tolist() == [0.0] * len(values)


def test_on_policy_gradient_is_reinforce():
    logprobs, advantages = tensor(-1.0, -3.0, -0.2), tensor(0.5, -2.0, 1.0)
    grad = gradient(logprobs, logprobs, advantages, denominator=3.0)
    torch.testing.assert_close(grad, -advantages / 3)


def test_extreme_ratios_overflow_nothing():
    loss, metrics = surrogate(torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0]), torch.tensor([-1.0, 1.0]))
    assert math.isfinite(loss.item())
    assert math.isfinite(metrics["ratio/max"])


def test_accumulated_is_whole_for_every_normalisation():
    generator = torch.Generator().manual_seed(5)
    logprobs, old = (torch.randn(8, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    sequence_N = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    parts = [slice(0, 4), slice(4, 8)]
    for weights, denominator in [
        (None, 8.0),
        (sequence_weights(sequence_N, 3, logprobs), 3.0),
        (None, 3.0 * 16),
    ]:

        def grads(part, weights=weights, denominator=denominator):
            weights_N = None if weights is None else weights[part]
            return gradient(logprobs[part], old[part], advantages[part], denominator=denominator, weights_N=weights_N)

        torch.testing.assert_close(torch.cat([grads(part) for part in parts]), grads(slice(None)))


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="ref_logprobs_N"):
        surrogate(tensor(0), tensor(0), tensor(1), kl_coef=0.1)
    with pytest.raises(AssertionError, match="advantages_N"):
        surrogate(tensor(0, 0), tensor(0, 0), tensor(1))
    with pytest.raises(AssertionError, match="denominator"):
        surrogate(tensor(0), tensor(0), tensor(1), denominator=0.0)
