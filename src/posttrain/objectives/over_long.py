"""What an answer pays for its length, and for not coming to an end.

S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def over_long_penalty(lengths_S: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """The soft over-long penalty: nothing up to max_length − buffer tokens, then linearly down to −1.

        0                                         |y| ≤ L − B
        ((L − B) − |y|) / B                       L − B < |y| ≤ L
        −1                                        L < |y|

    Args:
        lengths_S: tokens of each answer.
        max_length: L, from which on the punishment is full.
        buffer: B, over how many tokens it grows; at least 1, at most L.

    Returns:
        penalty_S in [−1, 0], to be added to the reward; floating point.

    Source: DAPO, https://arxiv.org/abs/2503.14476, section 3.4, equation 13 (L 20,480, B 4,096).
    """
    assert 1 <= buffer <= max_length, f"the buffer is {buffer}, not in [1, {max_length}]"
    over_S = lengths_S.double() - (max_length - buffer)
    return -(over_S / buffer).clamp(0.0, 1.0)


def missing_eos_penalty(scores_S: Tensor, ended_S: Tensor, penalty: float, *, replace: bool = False) -> Tensor:
    """What answers that did not end by themselves score.

    Args:
        scores_S: of the grader.
        ended_S: boolean: the answer ends with a stop token.
        penalty: at least 0: what is taken off the score of an answer without an end.
        replace: the score of such an answer is −penalty, whatever it was (Tülu 3, which takes 10).

    Returns:
        scores_S.

    Source: Stiennon et al., https://arxiv.org/abs/2009.01325 and Huang et al., https://arxiv.org/abs/2403.17031 (the
    "EOS trick"); Tülu 3, https://arxiv.org/abs/2411.15124.
    """
    assert penalty >= 0, f"the penalty is {penalty}, below 0"
    punished_S = torch.full_like(scores_S, -penalty) if replace else scores_S - penalty
    return torch.where(ended_S.bool(), scores_S, punished_S)
