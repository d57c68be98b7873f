"""Reward models from preferences: Bradley–Terry with margin, centring and label smoothing, over pairs and longer ranks.

N pairs; S scored answers, of all lists; L lists: the ranked answers to one prompt, the best first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.metric import Metric, maximum, mean, minimum
from posttrain.objectives.segments import sequence_lengths, sequence_sum


def bradley_terry(
    chosen_N: Tensor,
    rejected_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    margins_N: Tensor | None = None,
    center: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Metric]]:
    """How unlikely it is, by the model, that the better answer of each pair wins.

    With d_n = chosen_n − rejected_n − margins_n, ε = label_smoothing:

        loss = Σ_n weights_n · [− (1 − ε) log σ(d_n) − ε log σ(− d_n) + center · (chosen_n + rejected_n)²] / denominator

    A preference says nothing of the sum of the two rewards; the centring term keeps it near 0, so that rewards of
    different prompts and of different models can be compared. Label smoothing says that a share ε of the labels is the
    wrong way round.

    Args:
        chosen_N: reward of the better answer; rank 1, differentiable.
        rejected_N: reward of the worse answer; rank 1, differentiable.
        denominator: what the sum is divided by: the pairs of the whole step for the mean over pairs; positive.
        weights_N: weight of each pair; all 1 if None.
        margins_N: by how much the better reward should exceed the worse one; 0 if None.
        center: coefficient of the centring term (Eisenstein et al. use 0.01).
        label_smoothing: ε in [0, 0.5).

    Returns:
        The loss, rank 0, and the metrics of TRL's RewardTrainer: `accuracy` (share of pairs whose better answer has
        the higher reward; a tie is wrong), `margin` (mean difference), `{min,mean,max}_reward`; over pairs, unweighted.

    Source: Bradley and Terry 1952; InstructGPT, https://arxiv.org/abs/2203.02155, equation 1; margin: Llama 2,
    https://arxiv.org/abs/2307.09288, equation 2; centring: Eisenstein et al., https://arxiv.org/abs/2312.09244; label
    smoothing: Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    assert chosen_N.ndim == 1, f"chosen_N has rank {chosen_N.ndim}, not 1"
    assert rejected_N.shape == chosen_N.shape, f"rejected_N is {rejected_N.shape}, chosen_N {chosen_N.shape}"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    assert 0 <= label_smoothing < 0.5, f"label_smoothing is {label_smoothing}, not in [0, 0.5)"
    gaps_N = chosen_N - rejected_N
    shifted_N = gaps_N if margins_N is None else gaps_N - margins_N.detach()
    losses_N = -F.logsigmoid(shifted_N)
    if label_smoothing:
        losses_N = (1 - label_smoothing) * losses_N - label_smoothing * F.logsigmoid(-shifted_N)
    if center:
        losses_N = losses_N + center * (chosen_N + rejected_N).square()
    both = torch.cat((chosen_N, rejected_N))
    metrics = {"accuracy": mean(gaps_N > 0), "margin": mean(gaps_N), **_reward_metrics(both)}
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator, metrics


def ranked_pairs(list_S: Tensor, num_lists: int) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs of answers to one prompt: edited > chosen > rejected gives three.

    Args:
        list_S: which list each answer belongs to; rank 1, integer. The answers of a list stand in order, the best
            first; other lists' answers may stand between them.
        num_lists: L.

    Returns:
        better_N and worse_N, indices into S; and weights_N = 1 / (pairs of the pair's list). With these weights and
        `denominator` = lists of the whole step, the loss is the mean over lists of the mean over their pairs, and the
        pairs of a long list, which are not independent, do not drown the others.

    Source: InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5 (all K choose 2 pairs of a prompt in one step,
    divided by their number); Llama 3, https://arxiv.org/abs/2407.21783, section 4.1.2 (edited > chosen > rejected).
    """
    assert list_S.ndim == 1, f"list_S has rank {list_S.ndim}, not 1"
    same_SS = list_S[:, None] == list_S
    better_N, worse_N = torch.triu(same_SS, diagonal=1).nonzero(as_tuple=True)
    lengths_L = sequence_lengths(list_S, num_lists, list_S.new_zeros(0, dtype=torch.float32))
    num_pairs_L = (lengths_L * (lengths_L - 1) / 2).clamp(min=1)
    return better_N, worse_N, (1.0 / num_pairs_L)[list_S[better_N]]


def plackett_luce(
    scores_S: Tensor,
    list_S: Tensor,
    num_lists: int,
    *,
    denominator: float,
    weights_L: Tensor | None = None,
    center: float = 0.0,
) -> tuple[Tensor, dict[str, Metric]]:
    """How unlikely the whole ranking is, if answers are drawn one after another in proportion to exp(reward).

    For a list with rewards s_1 … s_K, the best first:

        loss = Σ_l weights_l · [Σ_k (log Σ_{j ≥ k} exp s_j − s_k) + center · (Σ_k s_k)²] / denominator

    With two answers it is `bradley_terry`, centring included. With more it reads the ranking as one observation, where
    `ranked_pairs` counts its K (K − 1) / 2 pairs as if each were one.

    Args:
        scores_S: reward of each answer; rank 1, differentiable.
        list_S: see `ranked_pairs`.
        num_lists: L.
        denominator: what the sum is divided by: the lists of the whole step for the mean over lists; positive.
        weights_L: weight of each list; all 1 if None.
        center: coefficient of the centring term.

    Returns:
        The loss, rank 0, and the metrics of `bradley_terry`, over all ordered pairs.

    Source: Plackett 1975; Luce 1959; for reward models: Zhu, Jordan and Jiao, https://arxiv.org/abs/2301.11270
    (K-wise comparisons).
    """
    assert scores_S.ndim == 1, f"scores_S has rank {scores_S.ndim}, not 1"
    assert list_S.shape == scores_S.shape, f"list_S is {list_S.shape}, scores_S {scores_S.shape}"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    # log Σ_{j ≥ k} exp s_j of each answer: over a mask of what stands at or after it in its own list.
    later_SS = torch.triu(list_S[:, None] == list_S)
    rest_S = torch.where(later_SS, scores_S[None], -torch.inf).logsumexp(1)
    losses_L = sequence_sum(rest_S - scores_S, list_S, num_lists)
    if center:
        losses_L = losses_L + center * sequence_sum(scores_S, list_S, num_lists).square()
    better_N, worse_N, _ = ranked_pairs(list_S, num_lists)
    gaps_N = scores_S[better_N] - scores_S[worse_N]
    metrics = {"accuracy": mean(gaps_N > 0), "margin": mean(gaps_N), **_reward_metrics(scores_S)}
    return (losses_L if weights_L is None else losses_L * weights_L).sum() / denominator, metrics


def _reward_metrics(rewards: Tensor) -> dict[str, Metric]:
    return {"min_reward": minimum(rewards), "mean_reward": mean(rewards), "max_reward": maximum(rewards)}
