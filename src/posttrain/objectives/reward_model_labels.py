"""Reward models from labels: was the answer right (outcome), was each of its steps (process)?

N scored places (answers, or ends of steps); S answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.metric import Metric, maximum, mean, minimum
from posttrain.objectives.segments import sequence_sum


def outcome_loss(
    scores_N: Tensor,
    labels_N: Tensor,
    *,
    denominator: float,
    weights_N: Tensor | None = None,
    positive_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Metric]]:
    """Cross-entropy of σ(score) against a label between 0 (wrong) and 1 (right).

        loss = − Σ_n weights_n · [positive_weight · y_n log σ(s_n) + (1 − y_n) log σ(− s_n)] / denominator

    A label between 0 and 1 is a soft one: the share of continuations that came out right, or a judge's confidence. One
    logit says what a classifier with the two logits (0, s) would.

    Args:
        scores_N: one logit for each answer; rank 1, differentiable.
        labels_N: in [0, 1]; rank 1.
        denominator: what the sum is divided by: the answers of the whole step for the mean over answers; positive.
        weights_N: weight of each answer; all 1 if None.
        positive_weight: how much more a right answer counts, where few are right; positive.

    Returns:
        The loss, rank 0, and metrics, unweighted: `accuracy` (σ(score) and label on the same side of 1/2; a label of
        exactly 1/2 has no side and is left out), `accuracy/{right,wrong}` (of the answers with that label),
        `positive_rate` (share of labels above 1/2), `{min,mean,max}_reward`.

    Source: Cobbe et al., https://arxiv.org/abs/2110.14168, section 4 (verifiers); Lightman et al.,
    https://arxiv.org/abs/2305.20050, section 2.5 (outcome-supervised reward models).
    """
    losses_N = _cross_entropy(scores_N, labels_N, denominator, positive_weight)
    loss = (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator
    return loss, _label_metrics(scores_N, labels_N)


def process_loss(
    scores_N: Tensor,
    labels_N: Tensor,
    *,
    sequence_N: Tensor,
    num_sequences: int,
    denominator: float,
    weights_N: Tensor | None = None,
    positive_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Metric]]:
    """Cross-entropy at the end of every step of an answer: is the solution still right here?

    The sum, its weights and denominator are those of `outcome_loss`, with a step in place of an answer. What the loss
    is a mean over is the caller's choice, as for tokens: all steps of the whole step (weights 1, denominator = steps),
    or all answers (`sequence_weights` of `sequence_N`, denominator = answers).

    Args:
        scores_N: one logit for each step; rank 1, differentiable.
        labels_N: in [0, 1]: hard labels, or soft ones (the share of continuations from here that came out right).
        sequence_N: the answer of each step; rank 1, integer, for the metrics by answer.
        num_sequences: S.
        denominator: positive.
        weights_N: weight of each step; all 1 if None; 0 for steps that nobody labelled (what follows the first error).
        positive_weight: how much more a right step counts; most steps are right, so often below 1.

    Returns:
        The loss, rank 0, and the metrics of `outcome_loss` over steps with a weight above 0, besides
        `solution_accuracy`: the share of answers of which the lowest step says rightly whether a step of them is wrong.

    Source: Lightman et al., https://arxiv.org/abs/2305.20050, section 2.6; hard and soft estimation: Wang et al.
    (Math-Shepherd), https://arxiv.org/abs/2312.08935, section 3.3.
    """
    losses_N = _cross_entropy(scores_N, labels_N, denominator, positive_weight)
    assert sequence_N.shape == scores_N.shape, f"sequence_N is {sequence_N.shape}, scores_N {scores_N.shape}"
    loss = (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator
    live_N = torch.ones_like(scores_N, dtype=torch.bool) if weights_N is None else weights_N > 0
    scores_N, labels_N, sequence_N = scores_N[live_N], labels_N[live_N], sequence_N[live_N]
    flagged_S = sequence_sum((scores_N < 0).to(scores_N.dtype), sequence_N, num_sequences) > 0
    wrong_S = sequence_sum((labels_N < 0.5).to(scores_N.dtype), sequence_N, num_sequences) > 0
    seen_S = sequence_sum(torch.ones_like(scores_N), sequence_N, num_sequences) > 0
    metrics = _label_metrics(scores_N, labels_N)
    return loss, metrics | {"solution_accuracy": mean(flagged_S == wrong_S, seen_S)}


def _cross_entropy(scores_N: Tensor, labels_N: Tensor, denominator: float, positive_weight: float) -> Tensor:
    assert scores_N.ndim == 1, f"scores_N has rank {scores_N.ndim}, not 1"
    assert labels_N.shape == scores_N.shape, f"labels_N is {labels_N.shape}, scores_N {scores_N.shape}"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    assert positive_weight > 0, f"positive_weight is {positive_weight}, not positive"
    labels_N = labels_N.detach().to(scores_N.dtype)
    return -positive_weight * labels_N * F.logsigmoid(scores_N) - (1 - labels_N) * F.logsigmoid(-scores_N)


def _label_metrics(scores_N: Tensor, labels_N: Tensor) -> dict[str, Metric]:
    scores_N = scores_N.detach()
    right_N, wrong_N = labels_N > 0.5, labels_N < 0.5
    hit_N = ((scores_N > 0) & right_N) | ((scores_N < 0) & wrong_N)
    return {
        "accuracy": mean(hit_N, right_N | wrong_N),
        "accuracy/right": mean(hit_N, right_N),
        "accuracy/wrong": mean(hit_N, wrong_N),
        "positive_rate": mean(right_N),
        "min_reward": minimum(scores_N),
        "mean_reward": mean(scores_N),
        "max_reward": maximum(scores_N),
    }
