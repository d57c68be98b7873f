"""From the rewards of several models to one.

M models, N answers.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Ensemble = Literal["mean", "worst_case", "uncertainty", "lower_bound"]


def ensemble_reward(rewards_MN: Tensor, how: Ensemble = "worst_case", *, coefficient: float = 1.0) -> Tensor:
    """One reward for each answer from those of an ensemble, so that no member's mistake is worth seeking.

        mean          mean_m r_m
        worst_case    min_m r_m                                  WCO
        uncertainty   mean_m r_m − coefficient · var_m r_m       UWO
        lower_bound   mean_m r_m − coefficient · std_m r_m

    Variance and standard deviation are those of the ensemble itself (divided by M). Members must be on one scale:
    whiten each by its own moments (`whiten`, or running ones), or train them with centring.

    Args:
        rewards_MN: rank 2.
        how: see above.
        coefficient: of the spread; 0 or more (Coste et al. use 0.1 to 1 for UWO).

    Returns:
        rewards_N.

    Source: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", https://arxiv.org/abs/2310.02743.
    """
    assert rewards_MN.ndim == 2, f"rewards_MN has rank {rewards_MN.ndim}, not 2"
    assert coefficient >= 0, f"the coefficient is {coefficient}, negative"
    if how == "worst_case":
        return rewards_MN.amin(0)
    mean_N = rewards_MN.mean(0)
    if how == "mean":
        return mean_N
    variance_N = (rewards_MN - mean_N).square().mean(0)
    if how == "uncertainty":
        return mean_N - coefficient * variance_N
    if how == "lower_bound":
        return mean_N - coefficient * variance_N.sqrt()
    raise ValueError(f"unknown ensemble {how!r}: choose mean, worst_case, uncertainty or lower_bound")
