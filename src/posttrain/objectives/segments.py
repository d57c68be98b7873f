"""Sums and means over sequences that lie end to end in one flat list of tokens.

N tokens (target positions), S sequences. `sequence_N` says to which sequence a token belongs: integers in [0, S).
"""

from __future__ import annotations

from torch import Tensor


def sequence_sum(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Sum of the values of each sequence.

    Args:
        values_N: one value per token; rank 1.
        sequence_N: its sequence; rank 1, integer.
        num_sequences: S.

    Returns:
        sums_S; 0 for a sequence without tokens. Differentiable in `values_N`.
    """
    return values_N.new_zeros(num_sequences).index_add(0, sequence_N, values_N)


def sequence_lengths(sequence_N: Tensor, num_sequences: int, like: Tensor) -> Tensor:
    """How many tokens each sequence has, at least 1 (so that one may divide by it), in the dtype of `like`."""
    return sequence_sum(like.detach().new_ones(len(sequence_N)), sequence_N, num_sequences).clamp(min=1)


def sequence_mean(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Mean of the values of each sequence; 0 for a sequence without tokens. Arguments as for `sequence_sum`."""
    sums_S = sequence_sum(values_N, sequence_N, num_sequences)
    return sums_S / sequence_lengths(sequence_N, num_sequences, values_N)


def sequence_weights(sequence_N: Tensor, num_sequences: int, like: Tensor) -> Tensor:
    """Weights that turn a sum over tokens into a sum over sequences of each sequence's mean: 1 / length.

    With `denominator` = number of sequences in the whole step, Σ weights · loss / denominator is the mean over
    sequences of the mean over tokens: each sequence counts the same, however long.

    Args:
        sequence_N: sequence of each token; rank 1, integer.
        num_sequences: S.
        like: a tensor whose dtype and device the weights take.

    Returns:
        weights_N, no gradient.
    """
    return (1.0 / sequence_lengths(sequence_N, num_sequences, like))[sequence_N]
