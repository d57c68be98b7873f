"""Weights and masks for tokens that another policy sampled: the sampler's mismatch, and samples that have gone stale.

N tokens that the policy wrote, end to end; S sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.objectives.divergence import MAX_LOG_RATIO
from posttrain.objectives.segments import sequence_mean, sequence_sum

Bound = Literal["truncate", "mask"]
WeightLevel = Literal["token", "sequence", "geometric"]


def bounded_importance_weights(
    old_logprobs_N: Tensor,
    sampler_logprobs_N: Tensor,
    *,
    low: float | None = None,
    high: float | None = None,
    bound: Bound = "truncate",
    level: WeightLevel = "token",
    sequence_N: Tensor | None = None,
    num_sequences: int = 0,
) -> Tensor:
    """Importance weights π_trainer / π_sampler within bounds.

    The ratio is taken of each token, or of the whole sequence (the product of its tokens' ratios, or, "geometric",
    their geometric mean, which does not grow with length). Outside [low, high] it becomes the bound that it passed
    ("truncate") or 0 ("mask": IcePop for tokens, masked importance sampling for sequences).

    Args:
        old_logprobs_N: log-probability by the trainer's forward pass; rank 1.
        sampler_logprobs_N: log-probability of the distribution that the token was sampled from; rank 1.
        low: lower bound; None: none.
        high: upper bound; None: none.
        bound: what happens outside.
        level: whose ratio.
        sequence_N: sequence of each token, for sequence levels; rank 1, integer.
        num_sequences: S, with `sequence_N`.

    Returns:
        weights_N, no gradient. Log-ratios are clamped to ±20.

    Source: IcePop: INTELLECT-3, https://arxiv.org/abs/2512.16144, equation 1 (bounds 0.5 and 5); truncated importance
    sampling at token and sequence level and masking: Yao et al., https://fengyao.notion.site/off-policy-rl, and Liu et
    al., "When Speed Kills Stability", https://richardli.xyz/rl-collapse.
    """
    log_ratio_N = (old_logprobs_N - sampler_logprobs_N).detach()
    if level != "token":
        if sequence_N is None:
            raise ValueError(f"level {level!r} needs sequence_N")
        per_sequence = sequence_sum if level == "sequence" else sequence_mean
        log_ratio_N = per_sequence(log_ratio_N, sequence_N, num_sequences)[sequence_N]
    ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if bound == "truncate":
        return ratio_N if low is None and high is None else ratio_N.clamp(low, high)
    outside_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    if low is not None:
        outside_N |= ratio_N < low
    if high is not None:
        outside_N |= ratio_N > high
    return ratio_N.masked_fill(outside_N, 0.0)


def stale_sequence_mask(
    advantages_N: Tensor,
    logprobs_N: Tensor,
    sampler_logprobs_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    *,
    threshold: float,
) -> Tensor:
    """Off-policy sequence masking: bad answers that the policy has left behind are not unlearned any further.

    A token is dropped where its advantage is negative and its sequence's mean of log π_sampler − log π is above the
    threshold.

    Args:
        advantages_N: rank 1.
        logprobs_N: log-probability under the policy as it is; rank 1.
        sampler_logprobs_N: log-probability under the policy that sampled; rank 1.
        sequence_N: sequence of each token; rank 1, integer. All tokens of a sequence must be here.
        num_sequences: S.
        threshold: δ, in nats per token.

    Returns:
        mask_N, 1 (keep) or 0, in the dtype of `logprobs_N`; no gradient.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, equation 9.
    """
    gap_N = (sampler_logprobs_N - logprobs_N).detach()
    gap_S = sequence_mean(gap_N, sequence_N, num_sequences)
    return ((advantages_N >= 0) | (gap_S <= threshold)[sequence_N]).to(logprobs_N.dtype)


def stale_version_mask(versions_S: Tensor, sequence_N: Tensor, *, version: int, max_staleness: int) -> Tensor:
    """Drop what weights too old have sampled.

    Args:
        versions_S: oldest weight version that wrote a token of each sequence.
        sequence_N: sequence of each token; rank 1, integer.
        version: of the weights that are to be updated.
        max_staleness: versions that may lie between the two; 0 keeps on-policy samples only.

    Returns:
        mask_N, 1 (keep) or 0, float32.
    """
    return (version - versions_S <= max_staleness).float()[sequence_N]
