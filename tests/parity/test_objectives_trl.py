"""The policy objective against TRL's documented GRPO formulas, computed here in float64 NumPy, padded, from scratch.

TRL documentation, "GRPO Trainer" (loss types grpo, bnpo/dapo, dr_grpo; importance sampling level token and sequence;
delta; truncated importance sampling): https://huggingface.co/docs/trl/grpo_trainer.
"""

import numpy as np
import pytest
import torch

from posttrain.objectives import (
    combine,
    group_advantages,
    importance_weights,
    policy_surrogate,
    sampling_metrics,
    sequence_weights,
)

B, T, MAX = 6, 7, 9


@pytest.fixture(params=range(3))
def padded(request):
    rng = np.random.default_rng(request.param)
    lengths = rng.integers(1, T + 1, size=B)
    mask = np.arange(T)[None] < lengths[:, None]
    arrays = {name: rng.normal(-2, 0.5, size=(B, T)) for name in ("new", "old", "ref", "sampler")}
    return {**arrays, "mask": mask, "advantages": rng.normal(size=B)}


def reference(data, loss_type, level, *, beta=0.0, low=0.2, high=0.28, delta=None, cap=None):
    """Loss and metrics as TRL documents them, in padded form."""
    mask, advantages = data["mask"].astype(float), data["advantages"][:, None]
    log_ratio = data["new"] - data["old"]
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None]
    ratio = np.exp(log_ratio) * np.ones((B, T))
    capped = ratio if delta is None else np.minimum(ratio, delta)
    per_token = -np.minimum(capped * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    if cap is not None:
        per_token = per_token * np.minimum(np.exp(data["old"] - data["sampler"]), cap)
    difference = data["ref"] - data["new"]
    kl = np.exp(difference) - difference - 1
    per_token = per_token + beta * kl
    loss = {
        "grpo": ((per_token * mask).sum(1) / mask.sum(1)).mean(),
        "dapo": (per_token * mask).sum() / mask.sum(),
        "dr_grpo": (per_token * mask).sum() / (B * MAX),
    }[loss_type]

    def average(values):
        return float((values * mask).sum() / mask.sum())

    is_low, is_high = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    return loss, {
        "clip_ratio/low_mean": average(is_low),
        "clip_ratio/high_mean": average(is_high),
        "clip_ratio/region_mean": average(is_low | is_high),
        "kl": average(kl),
    }


def ours(data, loss_type, level, *, beta=0.0, low=0.2, high=0.28, delta=None, cap=None):
    mask = data["mask"]
    flat = {name: torch.tensor(data[name][mask]) for name in ("new", "old", "ref", "sampler")}
    sequence_N = torch.tensor(np.nonzero(mask)[0])
    weights = sequence_weights(sequence_N, B, flat["new"]) if loss_type == "grpo" else None
    loss, metrics = policy_surrogate(
        flat["new"],
        flat["old"],
        torch.tensor(data["advantages"])[sequence_N],
        denominator={"grpo": B, "dapo": int(mask.sum()), "dr_grpo": B * MAX}[loss_type],
        weights_N=weights,
        sequence_N=sequence_N if level == "sequence" else None,
        num_sequences=B,
        clip_low=low,
        clip_high=high,
        dual_clip=delta,
        importance_weights_N=None if cap is None else importance_weights(flat["old"], flat["sampler"], cap=cap),
        ref_logprobs_N=flat["ref"],
        kl_coef=beta,
    )
    return loss.item(), combine([metrics])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.04}, {"delta": 1.5}, {"cap": 1.1, "beta": 0.1}])
def test_loss_and_metrics(padded, loss_type, level, options):
    expected_loss, expected_metrics = reference(padded, loss_type, level, **options)
    loss, metrics = ours(padded, loss_type, level, **options)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_advantages_and_sampling_ratio():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(3, 4))
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(torch.tensor(rewards), std=True).numpy(), expected, rtol=1e-12)
    old, sampler = rng.normal(size=50), rng.normal(size=50)
    weights = importance_weights(torch.tensor(old), torch.tensor(sampler), cap=2.0)
    ratio = np.minimum(np.exp(old - sampler), 2.0)
    np.testing.assert_allclose(weights.numpy(), ratio, rtol=1e-12)
    metrics = combine([sampling_metrics(torch.tensor(old), torch.tensor(sampler), weights)])
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(ratio.mean(), rel=1e-6)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(np.abs(old - sampler).max(), rel=1e-6)
