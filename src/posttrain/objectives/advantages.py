"""Advantages from the rewards of siblings: how much better an answer is than the others to the same prompt.

P prompts, G siblings sampled from each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_PG: Tensor, *, std: bool, valid_PG: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages: reward minus the mean of the group, over its standard deviation if `std`.

        A_i = (r_i − mean_j r_j) / (std_j r_j + eps)      std=True: GRPO
        A_i =  r_i − mean_j r_j                           std=False: Dr. GRPO, which removes the bias towards
                                                          prompts that are almost always or almost never solved

    Mean and standard deviation (of a sample: n − 1) are taken over the valid siblings only. A sibling that is not
    valid (its rollout or grade failed) has advantage 0, and so has every sibling of a group with fewer than two valid
    ones: there is nothing to compare with. The values of invalid rewards are not looked at and may be NaN.

    Args:
        rewards_PG: rank 2.
        std: divide by the standard deviation.
        valid_PG: rank 2, boolean; all True if None.
        eps: added to the standard deviation.

    Returns:
        advantages_PG, no gradient.

    Source: DeepSeekMath (GRPO), https://arxiv.org/abs/2402.03300, section 4.1.2;
    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.
    """
    rewards_PG, valid_PG, num_P1 = _valid_rewards(rewards_PG, valid_PG)
    mean_P1 = rewards_PG.sum(dim=1, keepdim=True) / num_P1.clamp(min=1)
    advantages_PG = torch.where(valid_PG & (num_P1 >= 2), rewards_PG - mean_P1, 0.0)
    if not std:
        return advantages_PG
    std_P1 = (advantages_PG.square().sum(dim=1, keepdim=True) / (num_P1 - 1).clamp(min=1)).sqrt()
    return advantages_PG / (std_P1 + eps)


def leave_one_out(rewards_PG: Tensor, *, valid_PG: Tensor | None = None) -> Tensor:
    """RLOO advantages: reward minus the mean of the other siblings.

        A_i = r_i − mean_{j ≠ i} r_j = (r_i − mean_j r_j) · n / (n − 1)

    The baseline of a sibling does not depend on its own reward, so the policy gradient stays unbiased.

    Args:
        rewards_PG: rank 2.
        valid_PG: rank 2, boolean; as for `group_advantages`.

    Returns:
        advantages_PG, no gradient.

    Source: Ahmadian et al., "Back to Basics", https://arxiv.org/abs/2402.14740, equation 8.
    """
    centred_PG = group_advantages(rewards_PG, std=False, valid_PG=valid_PG)
    _, _, num_P1 = _valid_rewards(rewards_PG, valid_PG)
    return centred_PG * num_P1 / (num_P1 - 1).clamp(min=1)


def _valid_rewards(rewards_PG: Tensor, valid_PG: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    assert rewards_PG.ndim == 2, f"rewards_PG has rank {rewards_PG.ndim}, not 2"
    if valid_PG is None:
        valid_PG = torch.ones_like(rewards_PG, dtype=torch.bool)
    assert valid_PG.shape == rewards_PG.shape, f"valid_PG is {valid_PG.shape}, rewards_PG {rewards_PG.shape}"
    valid_PG = valid_PG.bool()
    return torch.where(valid_PG, rewards_PG.detach(), 0.0), valid_PG, valid_PG.sum(dim=1, keepdim=True)
