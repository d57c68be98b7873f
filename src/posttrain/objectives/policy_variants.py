"""Surrogates beside the clipped one: the same arguments, another way to bound what stale samples may do.

N tokens (target positions) that the policy wrote, end to end; S sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posttrain.objectives.divergence import MAX_LOG_RATIO, KlEstimator, kl_estimate
from posttrain.objectives.metric import Metric, mean
from posttrain.objectives.policy import RatioLevel, policy_ratio
from posttrain.objectives.segments import sequence_sum


def cispo_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    num_sequences: int = 0,
    level: RatioLevel = "token",
    clip_low: float | None = None,
    clip_high: float = 4.0,
    importance_weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """CISPO: clip the importance weight, not the token. Every token keeps its gradient.

        w_n  = sg(clip(r_n, 1 − clip_low, 1 + clip_high))
        loss = − Σ_n weights_n · w_n · A_n · log π(n) / denominator

    Arguments as for `policy_surrogate`.

    Args:
        clip_low: how far a weight may fall below 1; None does not bound it from below, as its authors do.
        clip_high: how far it may rise above 1: ScaleRL's bound of 5 on the ratio is 4 here.

    Returns:
        The loss, rank 0, and `cispo_clip_ratio`: the share of tokens above the bound with positive advantage.

    Source: MiniMax-M1, https://arxiv.org/abs/2506.13585, equations 4 and 5; ScaleRL, https://arxiv.org/abs/2510.13786.
    """
    advantages_N = advantages_N.detach()
    ratio_N = policy_ratio(logprobs_N, old_logprobs_N, sequence_N, num_sequences, level).detach()
    bounded_N = ratio_N.clamp(None if clip_low is None else 1 - clip_low, 1 + clip_high)
    metrics = {"cispo_clip_ratio": mean((ratio_N > 1 + clip_high) & (advantages_N > 0))}
    losses_N = -bounded_N * advantages_N * logprobs_N
    return _summed(losses_N, importance_weights_N, weights_N, denominator), metrics


def sapo_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    num_sequences: int = 0,
    level: RatioLevel = "token",
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    importance_weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """SAPO: a soft gate in place of the clip, whose slope is 1 at ratio 1 and fades on both sides.

        f_n  = σ(τ_n · (r_n − 1)) · 4 / τ_n    with τ the positive temperature where A_n > 0, else the negative one
        loss = − Σ_n weights_n · f_n · A_n / denominator

    Arguments as for `policy_surrogate`.

    Args:
        temperature_positive: how fast the gate closes for tokens with positive advantage.
        temperature_negative: the same for the others; larger, because their gradients spread over the vocabulary.

    Returns:
        The loss, rank 0, and `ratio/mean`.

    Source: Gao et al., "Soft Adaptive Policy Optimization", https://arxiv.org/abs/2511.20347.
    """
    advantages_N = advantages_N.detach()
    ratio_N = policy_ratio(logprobs_N, old_logprobs_N, sequence_N, num_sequences, level)
    positive_N = torch.full_like(advantages_N, temperature_positive)
    tau_N = torch.where(advantages_N > 0, positive_N, torch.full_like(advantages_N, temperature_negative))
    gate_N = torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N
    losses_N = -gate_N * advantages_N
    return _summed(losses_N, importance_weights_N, weights_N, denominator), {"ratio/mean": mean(ratio_N)}


def vespo_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    denominator: float,
    sequence_N: Tensor,
    num_sequences: int,
    weights_N: Tensor | None = None,
    level: RatioLevel = "token",
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    importance_weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """VESPO: every sequence weighted by a Gamma-shaped function of its whole ratio, which is 1 at ratio 1.

        w    = Π_t π / π_old (times the importance weights, whose place is here)
        φ(w) = e^λ · w^k · e^(−λ·w)      with (k, λ) by the sign of the advantage
        loss = − Σ_n weights_n · sg(φ) · A_n · log π(n) / denominator

    log w is clamped to [log 1e-8, 20]. Arguments as for `policy_surrogate`; `level` is not looked at, and all tokens
    of a sequence must be here.

    Args:
        positive: k and λ for sequences with advantages of at least 0.
        negative: k and λ for the others.

    Returns:
        The loss, rank 0, and `vespo/phi_seq_mean`, the mean weight over tokens.

    Source: "Variational Sequence-Level Soft Policy Optimization", https://arxiv.org/abs/2602.10693.
    """
    advantages_N = advantages_N.detach()
    floor = math.log(1e-8)
    log_ratio_N = (logprobs_N - old_logprobs_N).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if importance_weights_N is not None:
        log_ratio_N = log_ratio_N + importance_weights_N.detach().log().clamp(floor, MAX_LOG_RATIO)
    log_w_N = sequence_sum(log_ratio_N, sequence_N, num_sequences).clamp(floor, MAX_LOG_RATIO)[sequence_N]
    good_N = advantages_N >= 0
    k_N = torch.where(good_N, positive[0], negative[0])
    lam_N = torch.where(good_N, positive[1], negative[1])
    phi_N = (lam_N + k_N * log_w_N - lam_N * log_w_N.exp()).exp()
    losses_N = -phi_N * advantages_N * logprobs_N
    return _summed(losses_N, None, weights_N, denominator), {"vespo/phi_seq_mean": mean(phi_N)}


def reinforce_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    num_sequences: int = 0,
    level: RatioLevel = "token",
    importance_weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """REINFORCE: loss = − Σ_n weights_n · A_n · log π(n) / denominator. No ratio, no clip: for samples of the policy
    itself. Arguments as for `policy_surrogate`.

    Source: Williams, "Simple statistical gradient-following algorithms …", 1992.
    """
    losses_N = -advantages_N.detach() * logprobs_N
    return _summed(losses_N, importance_weights_N, weights_N, denominator), {}


def kl_penalty(
    logprobs_N: Tensor,
    ref_logprobs_N: Tensor,
    *,
    coef: float,
    denominator: float,
    weights_N: Tensor | None = None,
    estimator: KlEstimator = "k3",
    ratio_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """coef times the estimated KL to the reference: loss = coef · Σ_n weights_n · ρ_n · kl_n / denominator.

    Args:
        logprobs_N: log-probability under the policy; rank 1, differentiable.
        ref_logprobs_N: the same under the reference; rank 1.
        coef: weight of the penalty.
        denominator: what the sum is divided by; positive.
        weights_N: weight of each token; all 1 if None.
        estimator: see `kl_estimate`.
        ratio_N: ρ, π / π_old of each token, differentiable (`policy_ratio`): makes the gradient of k3 that of the
            reverse KL without bias, off policy and on. 1 and no gradient if None.

    Returns:
        The loss, rank 0, and the metric `kl` (mean per token, without ρ).

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, equation 7 (unbiased KL estimate).
    """
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    kl_N = kl_estimate(logprobs_N, ref_logprobs_N, estimator)
    metrics = {"kl": mean(kl_N)}
    losses_N = coef * kl_N if ratio_N is None else coef * kl_N * ratio_N
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator, metrics


def _summed(
    losses_N: Tensor, importance_weights_N: Tensor | None, weights_N: Tensor | None, denominator: float
) -> Tensor:
    assert losses_N.ndim == 1, f"rank {losses_N.ndim}, not 1"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    if importance_weights_N is not None:
        losses_N = losses_N * importance_weights_N.detach()
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator
