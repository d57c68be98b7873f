"""Advantages normalised by more, or by something else, than the siblings' standard deviation.

K rewards, P prompts, G siblings sampled from each. Invalid siblings (`valid_PG` False) have advantage 0, count nowhere,
and their rewards may be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.advantages import group_advantages


def batch_scaled_advantages(rewards_PG: Tensor, *, valid_PG: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """Reward minus the mean of the group, over the standard deviation of all the step's rewards.

    A group whose answers are nearly equal is not blown up, as it is by its own standard deviation.

    Args:
        rewards_PG: rank 2.
        valid_PG: rank 2, boolean; all True if None.
        eps: added to the standard deviation (of a sample: n − 1).

    Returns:
        advantages_PG, no gradient.

    Source: "Tricks or Traps?" (Lite PPO), https://arxiv.org/abs/2508.08221.
    """
    centred_PG = group_advantages(rewards_PG, std=False, valid_PG=valid_PG)
    values_M = _valid(rewards_PG, valid_PG)
    spread = values_M.std() if len(values_M) > 1 else values_M.new_zeros(())
    return centred_PG / (spread + eps)


def reinforce_advantages(rewards_PG: Tensor, *, baseline: bool = True, valid_PG: Tensor | None = None) -> Tensor:
    """REINFORCE: the reward itself, or the reward minus the mean of all rewards of the step.

    Args:
        rewards_PG: rank 2.
        baseline: take the mean off.
        valid_PG: rank 2, boolean; all True if None.

    Returns:
        advantages_PG, no gradient.

    Source: Williams, 1992; Ahmadian et al., https://arxiv.org/abs/2402.14740, section 2.2.
    """
    valid_PG = _all_valid(rewards_PG) if valid_PG is None else valid_PG.bool()
    values_M = _valid(rewards_PG, valid_PG)
    mean = values_M.mean() if baseline and len(values_M) else values_M.new_zeros(())
    return torch.where(valid_PG, rewards_PG.detach() - mean, 0.0)


def reinforce_pp_advantages(
    rewards_PG: Tensor, *, group_baseline: bool = False, valid_PG: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++: normalised over all of the step, not within the group.

        A_i = (a_i − mean a) / (std a + eps)    with a = r, or a = r − mean of the group if `group_baseline`

    Mean and standard deviation (over n) are of all valid rewards of the step. With a KL penalty token by token, use
    `discounted_returns` of `token_rewards` and `whiten` them instead.

    Args:
        rewards_PG: rank 2.
        group_baseline: REINFORCE++ with baseline, for several answers per prompt.
        valid_PG: rank 2, boolean; all True if None.
        eps: added to the standard deviation.

    Returns:
        advantages_PG, no gradient.

    Source: Hu et al., "REINFORCE++", https://arxiv.org/abs/2501.03262, section 3 (global advantage normalisation).
    """
    valid_PG = _all_valid(rewards_PG) if valid_PG is None else valid_PG.bool()
    raw_PG = group_advantages(rewards_PG, std=False, valid_PG=valid_PG) if group_baseline else rewards_PG.detach()
    if group_baseline:  # one sibling alone has no baseline
        valid_PG = valid_PG & (valid_PG.sum(dim=1, keepdim=True) >= 2)
    values_M = raw_PG[valid_PG]
    if not len(values_M):
        return torch.zeros_like(rewards_PG)
    return torch.where(valid_PG, (raw_PG - values_M.mean()) / (values_M.std(correction=0) + eps), 0.0)


def max_rl_advantages(rewards_PG: Tensor, *, valid_PG: Tensor | None = None) -> Tensor:
    """MaxRL: reward minus the mean of the group, over that mean.

        A_i = (r_i − r̄) / r̄        0 where r̄ = 0

    With rewards 0 and 1 the gradient is, on average, that of log P(right) expanded in P(wrong) to order G − 1, not of
    P(right): a prompt that is solved once in ten tries counts about ten times as much as with Dr. GRPO. (Without the
    mean in the numerator, which lowers the variance, it is order G.)

    Args:
        rewards_PG: rank 2, none below 0.
        valid_PG: rank 2, boolean; all True if None.

    Returns:
        advantages_PG, no gradient.

    Source: Tajwar et al., "Maximum Likelihood Reinforcement Learning", https://arxiv.org/abs/2602.02710, section 4
    (theorem 2 and its control variate).
    """
    valid_PG = _all_valid(rewards_PG) if valid_PG is None else valid_PG.bool()
    if (_valid(rewards_PG, valid_PG) < 0).any():
        raise ValueError("MaxRL needs rewards of at least 0: it divides by their mean")
    centred_PG = group_advantages(rewards_PG, std=False, valid_PG=valid_PG)
    known_PG = torch.where(valid_PG, rewards_PG.detach(), 0.0)
    mean_P1 = known_PG.sum(dim=1, keepdim=True) / valid_PG.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mean_P1 > 0, centred_PG / torch.where(mean_P1 > 0, mean_P1, 1.0), 0.0)


def decoupled_advantages(
    rewards_KPG: Tensor, weights_K: Tensor, *, valid_PG: Tensor | None = None, eps: float = 1e-4
) -> Tensor:
    """GDPO: several rewards, each normalised within its group before they are added up, so that none drowns another.

        a_i = Σ_k w_k · (r_ki − mean_group r_k) / (std_group r_k + eps)
        A_i = (a_i − mean a) / (std a + eps)        over all of the step

    Args:
        rewards_KPG: rank 3.
        weights_K: weight of each reward.
        valid_PG: rank 2, boolean; all True if None.
        eps: added to each standard deviation (of a sample: n − 1).

    Returns:
        advantages_PG, no gradient.

    Source: "GDPO: Group reward-Decoupled Normalization Policy Optimization", https://arxiv.org/abs/2601.05242.
    """
    assert rewards_KPG.ndim == 3, f"rewards_KPG has rank {rewards_KPG.ndim}, not 3"
    valid_PG = _all_valid(rewards_KPG[0]) if valid_PG is None else valid_PG.bool()
    each_KPG = torch.stack(
        [group_advantages(rewards_PG, std=True, valid_PG=valid_PG, eps=eps) for rewards_PG in rewards_KPG]
    )
    sums_PG = (each_KPG * weights_K.to(each_KPG)[:, None, None]).sum(dim=0)
    values_M = sums_PG[valid_PG]
    if len(values_M) < 2:
        return torch.zeros_like(sums_PG)
    return torch.where(valid_PG, (sums_PG - values_M.mean()) / (values_M.std() + eps), 0.0)


def _all_valid(rewards_PG: Tensor) -> Tensor:
    return torch.ones_like(rewards_PG, dtype=torch.bool)


def _valid(rewards_PG: Tensor, valid_PG: Tensor | None) -> Tensor:
    """The rewards that count, flat."""
    return rewards_PG.detach()[_all_valid(rewards_PG) if valid_PG is None else valid_PG.bool()]
