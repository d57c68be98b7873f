"""Policy surrogates: PPO's clipped objective and what grew from it, and importance weights for off-policy samples.

N tokens (target positions) that the policy wrote, end to end; S sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.objectives.divergence import MAX_LOG_RATIO, KlEstimator, kl_estimate
from posttrain.objectives.metric import Metric, maximum, mean, minimum
from posttrain.objectives.segments import sequence_mean, sequence_sum

RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_product"]
"""Whose ratio a surrogate bounds. "token": each token's (PPO, GRPO). "sequence": the geometric mean over the sequence
(GSPO). "sequence_token": that number, but each token's own gradient, so that advantages may differ within a sequence
(GSPO-token). "sequence_product": the product over the sequence (PPO and RLOO with a whole answer as one action)."""


def policy_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    sequence_N: Tensor | None = None,
    num_sequences: int = 0,
    level: RatioLevel | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_weights_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
) -> tuple[Tensor, dict[str, Metric]]:
    """The clipped surrogate: raise the probability of tokens with positive advantage, but not far from the old policy.

    With r_n = π(n) / π_old(n) (per token: PPO, GRPO, DAPO) or, where `sequence_N` is given, the geometric mean of that
    ratio over the token's sequence (GSPO), and w_n the truncated importance weight of the sampler's mismatch:

        s_n  = min(r_n · A_n, clip(r_n, 1 − clip_low, 1 + clip_high) · A_n)
        s_n  = max(s_n, dual_clip · A_n)   where A_n < 0, if dual_clip
        loss = Σ_n weights_n · (− w_n · s_n + kl_coef · kl_n) / denominator

    Weights and denominator are the normalisation, over the whole step:

        token (DAPO)             weights 1, denominator = target tokens
        sequence (GRPO, GSPO)    weights `sequence_weights`, denominator = sequences
        constant (Dr. GRPO)      weights 1, denominator = sequences × maximal length

    log r is clamped to ±20, so that no ratio overflows; a token beyond that has no gradient.

    Args:
        logprobs_N: log-probability of each token under the policy; rank 1, differentiable.
        old_logprobs_N: the same under the policy before this round of updates; rank 1.
        advantages_N: advantage of each token; rank 1.
        denominator: what the sum is divided by; positive.
        weights_N: weight of each token; rank 1; all 1 if None.
        sequence_N, num_sequences, level: see `policy_ratio`; None: "sequence" where `sequence_N` is given.
        clip_low: how far a ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: bound on the ratio of tokens with negative advantage, above 1 + clip_high (usually 3).
        importance_weights_N: see `importance_weights`; rank 1.
        ref_logprobs_N: log-probability under the reference; rank 1. Its KL is reported even if `kl_coef` is 0.
        kl_coef: coefficient of the KL penalty.
        kl_estimator: see `kl_estimate`.

    Returns:
        The loss, rank 0, and metrics: `clip_ratio/{low,high,region}_mean` (fraction of tokens clipped),
        `ratio/{mean,min,max}`, and `kl` with a reference.

    Source: PPO, https://arxiv.org/abs/1707.06347, equation 7; dual clip, https://arxiv.org/abs/1912.09729, equation 5;
    GRPO, https://arxiv.org/abs/2402.03300; asymmetric clip, DAPO, https://arxiv.org/abs/2503.14476;
    Dr. GRPO, https://arxiv.org/abs/2503.20783; GSPO, https://arxiv.org/abs/2507.18071, equation 5.
    """
    for name, values_N in [("old_logprobs_N", old_logprobs_N), ("advantages_N", advantages_N)]:
        assert values_N.shape == logprobs_N.shape, f"{name} is {values_N.shape}, logprobs_N {logprobs_N.shape}"
    assert logprobs_N.ndim == 1, f"logprobs_N has rank {logprobs_N.ndim}, not 1"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    level = level or ("token" if sequence_N is None else "sequence")
    ratio_N = policy_ratio(logprobs_N, old_logprobs_N, sequence_N, num_sequences, level)
    advantages_N = advantages_N.detach()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if dual_clip is not None:
        assert dual_clip > 1 + clip_high, f"dual_clip {dual_clip} must be above 1 + clip_high"
        surrogate_N = torch.where(advantages_N < 0, surrogate_N.maximum(dual_clip * advantages_N), surrogate_N)
    losses_N = -surrogate_N if importance_weights_N is None else -surrogate_N * importance_weights_N.detach()
    metrics = _ratio_metrics(ratio_N.detach(), advantages_N, clip_low, clip_high)
    if ref_logprobs_N is not None:
        kl_N = kl_estimate(logprobs_N, ref_logprobs_N, kl_estimator)
        metrics["kl"] = mean(kl_N)
        if kl_coef:
            losses_N = losses_N + kl_coef * kl_N
    elif kl_coef:
        raise ValueError("a KL penalty needs ref_logprobs_N")
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator, metrics


def policy_ratio(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    sequence_N: Tensor | None = None,
    num_sequences: int = 0,
    level: RatioLevel = "token",
) -> Tensor:
    """How much likelier the policy makes what the old policy wrote: π / π_old of each token, or of its sequence.

    Args:
        logprobs_N: log-probability of each token under the policy; rank 1, differentiable.
        old_logprobs_N: the same under the old policy; rank 1.
        sequence_N: sequence of each token, for all levels but "token"; all tokens of a sequence must be here.
        num_sequences: S, with `sequence_N`.
        level: see `RatioLevel`.

    Returns:
        ratio_N, differentiable; log-ratios are clamped to ±20, and beyond have no gradient.

    Source: GSPO, https://arxiv.org/abs/2507.18071, equation 7; GSPO-token, equation 14.
    """
    log_ratio_N = logprobs_N - old_logprobs_N.detach()
    if level != "token":
        if sequence_N is None:
            raise ValueError(f"level {level!r} needs sequence_N")
        per_sequence = sequence_sum if level == "sequence_product" else sequence_mean
        log_ratio_N = per_sequence(log_ratio_N, sequence_N, num_sequences)[sequence_N]
        if level == "sequence_token":
            log_ratio_N = log_ratio_N.detach() + (logprobs_N - logprobs_N.detach())
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def importance_weights(old_logprobs_N: Tensor, sampler_logprobs_N: Tensor, *, cap: float) -> Tensor:
    """Truncated importance weights (TIS): corrects for a sampler whose probabilities differ from the trainer's.

        w_n = min(π_old(n) / π_sampler(n), cap)

    Args:
        old_logprobs_N: log-probability of each token by the trainer's forward pass; rank 1.
        sampler_logprobs_N: log-probability of the distribution that the token was sampled from; rank 1.
        cap: upper bound; positive. The truncation bounds the variance at the price of a small bias.

    Returns:
        weights_N in (0, cap], no gradient.

    Source: Ionides, "Truncated Importance Sampling", 2008; for sampler mismatch: Yao et al., "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl.
    """
    assert cap > 0, f"the cap is {cap}, not positive"
    log_ratio_N = (old_logprobs_N - sampler_logprobs_N).detach()
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


def sampling_metrics(
    old_logprobs_N: Tensor, sampler_logprobs_N: Tensor, weights_N: Tensor | None = None
) -> dict[str, Metric]:
    """How far sampler and trainer disagree on the tokens that were sampled. They should not.

    Args:
        old_logprobs_N: log-probability by the trainer's forward pass; rank 1.
        sampler_logprobs_N: log-probability by the sampler; rank 1.
        weights_N: importance weights as used, after the cap; None leaves their metrics out.

    Returns:
        `sampling/sampling_logp_difference/{mean,max}` (absolute, nats) and
        `sampling/importance_sampling_ratio/{min,mean,max}`.
    """
    difference_N = (old_logprobs_N - sampler_logprobs_N).abs()
    metrics = {
        "sampling/sampling_logp_difference/mean": mean(difference_N),
        "sampling/sampling_logp_difference/max": maximum(difference_N),
    }
    if weights_N is not None:
        prefix = "sampling/importance_sampling_ratio"
        metrics[f"{prefix}/min"] = minimum(weights_N)
        metrics[f"{prefix}/mean"] = mean(weights_N)
        metrics[f"{prefix}/max"] = maximum(weights_N)
    return metrics


def _ratio_metrics(ratio_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float) -> dict[str, Metric]:
    low_N = (ratio_N < 1 - clip_low) & (advantages_N < 0)
    high_N = (ratio_N > 1 + clip_high) & (advantages_N > 0)
    return {
        "clip_ratio/low_mean": mean(low_N),
        "clip_ratio/high_mean": mean(high_N),
        "clip_ratio/region_mean": mean(low_N | high_N),
        "ratio/mean": mean(ratio_N),
        "ratio/min": minimum(ratio_N),
        "ratio/max": maximum(ratio_N),
    }
