"""Distances between policies, and entropy.

N tokens (target positions), V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0  # e^20 ≈ 5e8: beyond it a ratio says no more, and e^89 is infinite in float32


def kl_estimate(logprobs_N: Tensor, ref_logprobs_N: Tensor, estimator: KlEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from tokens that the policy sampled.

    With d = log reference − log policy, at the sampled token:

        k1 = −d               unbiased, may be negative, high variance
        k2 = d² / 2           biased, low variance; as a loss on samples of the policy its gradient is that of the KL
        k3 = e^d − 1 − d      unbiased, never negative, low variance; the one of GRPO

    As a loss, k1 is useless: its gradient has expectation zero. In e^d, d is clamped to ±20.

    Args:
        logprobs_N: log-probability of each token under the policy; rank 1, differentiable.
        ref_logprobs_N: the same under the reference; rank 1, no gradient.
        estimator: which one.

    Returns:
        kl_N, in nats, differentiable in `logprobs_N`.

    Source: J. Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html;
    k3 as a loss: DeepSeekMath, https://arxiv.org/abs/2402.03300, equation 4.
    """
    difference_N = ref_logprobs_N.detach() - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    if estimator == "k3":
        return difference_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1() - difference_N
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def entropy(logits_NV: Tensor) -> Tensor:
    """Shannon entropy of the distribution that each row of logits stands for: − Σ_v p_v · log p_v.

    Args:
        logits_NV: rank 2, unnormalised; −inf marks an impossible token.

    Returns:
        entropy_N, in nats: 0 (certain) to log V (uniform). Differentiable.
    """
    assert logits_NV.ndim == 2, f"logits_NV has rank {logits_NV.ndim}, not 2"
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    possible_NV = logprobs_NV.clamp(min=-1e30)  # 0 · −inf would be NaN
    return -(logprobs_NV.exp() * possible_NV).sum(dim=-1)
