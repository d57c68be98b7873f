"""The value model's loss.

N tokens that the policy wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.metric import Metric, mean


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    clip: float | None = 0.2,
) -> tuple[Tensor, dict[str, Metric]]:
    """Half the squared error, pessimistic about moving far from the values that the advantages were made with.

        V'_n = V_old,n + clip(V_n − V_old,n, −clip, clip)
        loss = Σ_n weights_n · ½ · max((V_n − R_n)², (V'_n − R_n)²) / denominator

    Args:
        values_N: what the value model says now; rank 1, differentiable.
        old_values_N: what it said before this round of updates; rank 1.
        returns_N: what it should have said; rank 1.
        denominator: what the sum is divided by; positive.
        weights_N: weight of each token; rank 1; all 1 if None.
        clip: how far a value may move; None does not clip.

    Returns:
        The loss, rank 0, and metrics: `val/clipfrac_avg` (share of tokens at which the clip stops the gradient),
        `val/mean`, `val/error` (mean absolute error).

    Source: PPO, https://arxiv.org/abs/1707.06347, equation 9 (squared error); value clipping: Schulman et al.'s
    implementation, as in Huang et al., https://arxiv.org/abs/2403.17031.
    """
    for name, given_N in [("old_values_N", old_values_N), ("returns_N", returns_N)]:
        assert given_N.shape == values_N.shape, f"{name} is {given_N.shape}, values_N {values_N.shape}"
    assert values_N.ndim == 1, f"values_N has rank {values_N.ndim}, not 1"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    old_values_N, returns_N = old_values_N.detach(), returns_N.detach()
    losses_N = (values_N - returns_N).square()
    stopped_N = torch.zeros_like(losses_N, dtype=torch.bool)
    if clip is not None:
        assert clip > 0, f"the clip is {clip}, not positive"
        near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        clipped_N = (near_N - returns_N).square()
        stopped_N = clipped_N > losses_N
        losses_N = torch.maximum(losses_N, clipped_N)
    losses_N = losses_N / 2
    metrics = {
        "val/clipfrac_avg": mean(stopped_N),
        "val/mean": mean(values_N),
        "val/error": mean((values_N - returns_N).abs()),
    }
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator, metrics
