"""Negative log-likelihood: supervised fine-tuning.

N tokens (target positions).
"""

from __future__ import annotations

from torch import Tensor

from posttrain.objectives.metric import Metric, mean


def nll(logprobs_N: Tensor, *, denominator: float, weights_N: Tensor | None = None) -> tuple[Tensor, dict[str, Metric]]:
    """Minus the log-probability of the targets, summed with weights and divided by an explicit denominator.

        loss = − Σ_n weights_n · logprobs_n / denominator

    What is averaged over is the caller's choice: with `denominator` the number of target tokens of the whole step
    (all micro-batches, all ranks) it is the mean over tokens, which gradient accumulation and packing do not change;
    with `sequence_weights` and the number of sequences it is the mean over sequences.

    Args:
        logprobs_N: log-probability of each target token; rank 1, differentiable.
        denominator: what the sum is divided by; positive.
        weights_N: weight of each token; rank 1; all 1 if None.

    Returns:
        The loss, rank 0, and the metric `nll`: mean over tokens, unweighted, in nats.
    """
    assert logprobs_N.ndim == 1, f"logprobs_N has rank {logprobs_N.ndim}, not 1"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    losses_N = -logprobs_N if weights_N is None else -logprobs_N * weights_N
    return losses_N.sum() / denominator, {"nll": mean(-logprobs_N)}
