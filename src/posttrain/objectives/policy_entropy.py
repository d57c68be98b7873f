"""Keeping a policy from making up its mind too early: an entropy bonus, its controller, and the forking tokens.

N tokens that the policy wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.metric import Metric, mean


def entropy_bonus(
    entropy_N: Tensor, *, coef: float, denominator: float, weights_N: Tensor | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """Minus coef times the entropy, to be added to a loss: loss = − coef · Σ_n weights_n · H_n / denominator.

    Args:
        entropy_N: entropy of the distribution at each token, nats; rank 1, differentiable.
        coef: weight of the bonus.
        denominator: what the sum is divided by; the step's tokens make it the mean entropy per token.
        weights_N: weight of each token; all 1 if None.

    Returns:
        The loss, rank 0, and the metric `entropy`.

    Source: Williams & Peng, 1991; PPO, https://arxiv.org/abs/1707.06347, equation 9.
    """
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    weighted_N = entropy_N if weights_N is None else entropy_N * weights_N
    return -coef * weighted_N.sum() / denominator, {"entropy": mean(entropy_N)}


def adapt_entropy_coef(
    coef: float, entropy: float, *, target: float, delta: float = 0.005, low: float = 0.0, high: float = 1.0
) -> float:
    """The next step's entropy coefficient: delta more where the entropy is at most its target, else delta less.

    The coefficient is used only while the entropy is at most the target; see `active_entropy_coef`.

    Args:
        coef: of this step.
        entropy: measured in this step, mean nats per token.
        target: the entropy that must not be undercut.
        delta: how much the coefficient changes.
        low: its lower bound.
        high: its upper bound.

    Source: Skywork-OR1, https://arxiv.org/abs/2505.22312, section 4 (adaptive entropy control).
    """
    return min(coef + delta, high) if entropy <= target else max(coef - delta, low)


def active_entropy_coef(coef: float, entropy: float | None, *, target: float) -> float:
    """The coefficient as it is used: 0 while the last measured entropy is above its target (or none was measured)."""
    return coef if entropy is not None and entropy <= target else 0.0


def high_entropy_mask(entropy_N: Tensor, share: float) -> Tensor:
    """Keep the tokens at which the policy was least sure: those from the (1 − share) quantile of the entropies on.

    Args:
        entropy_N: entropy at each token of the whole step; rank 1.
        share: ρ, of the tokens that are kept; in [0, 1]. 0 keeps the largest alone.

    Returns:
        mask_N, boolean.

    Source: Wang et al., "Beyond the 80/20 Rule", https://arxiv.org/abs/2506.01939, section 5 (ρ = 0.2).
    """
    assert 0 <= share <= 1, f"the share is {share}, not in [0, 1]"
    entropy_N = entropy_N.detach()
    if not len(entropy_N):
        return torch.zeros_like(entropy_N, dtype=torch.bool)
    ordered_N = entropy_N.sort().values
    place = (1 - share) * (len(ordered_N) - 1)
    below = int(place)
    above = min(below + 1, len(ordered_N) - 1)
    threshold = ordered_N[below] + (place - below) * (ordered_N[above] - ordered_N[below])
    return entropy_N >= threshold
