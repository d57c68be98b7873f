"""Rewards token by token: the score at the end, and what every token pays for leaving the reference.

N tokens that the policy wrote, sequences end to end; S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.divergence import KlEstimator, kl_estimate


def token_rewards(
    scores_S: Tensor,
    sequence_N: Tensor,
    *,
    logprobs_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k1",
) -> Tensor:
    """The score at the last token of each sequence, less the KL penalty of every token.

        r_t = − kl_coef · kl_t + [t is the last token] · score

    Args:
        scores_S: score of each sequence; rank 1. Its length is S.
        sequence_N: sequence of each token; rank 1, integer, tokens of a sequence in order.
        logprobs_N: log-probability under the policy that sampled; rank 1; needed where `kl_coef` is not 0.
        ref_logprobs_N: the same under the reference.
        kl_coef: β.
        kl_estimator: k1 is unbiased, and the one of the literature; k3 never rewards a token.

    Returns:
        rewards_N, no gradient.

    Source: Ziegler et al., https://arxiv.org/abs/1909.08593, equation 2; Stiennon et al.,
    https://arxiv.org/abs/2009.01325, section 3.4.
    """
    last_S = last_tokens(sequence_N, len(scores_S))
    rewards_N = torch.zeros(len(sequence_N), dtype=scores_S.dtype, device=scores_S.device)
    if kl_coef:
        if logprobs_N is None or ref_logprobs_N is None:
            raise ValueError("a KL penalty needs logprobs_N and ref_logprobs_N")
        kl_N = kl_estimate(logprobs_N.detach(), ref_logprobs_N, kl_estimator)
        rewards_N = (-kl_coef * kl_N).to(rewards_N.dtype)
    has_S = last_S >= 0
    return rewards_N.index_add(0, last_S[has_S], scores_S.detach()[has_S])


def last_tokens(sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Where each sequence's last token lies in the flat list; −1 for a sequence without tokens. Integers, S."""
    place_N = torch.arange(len(sequence_N), device=sequence_N.device)
    nowhere_S = torch.full((num_sequences,), -1, dtype=torch.int64, device=sequence_N.device)
    return nowhere_S.scatter_reduce(0, sequence_N, place_N, "amax")


def adapt_kl_coef(coef: float, kl: float, *, target: float, gain: float = 0.1) -> float:
    """The adaptive KL coefficient: larger where the policy is further from the reference than wanted, else smaller.

        e = clip((kl − target) / target, −0.2, 0.2)
        coef' = coef · (1 + gain · e)

    Args:
        coef: the coefficient of this step.
        kl: the KL of this step to the reference, nats per sequence.
        target: the KL that is wanted, the same unit; positive.
        gain: K_β. (The authors' code has batch / horizon in its place.)

    Returns:
        The coefficient of the next step: at most 2 % more or less with the default gain.

    Source: Ziegler et al., https://arxiv.org/abs/1909.08593, section 2.2.
    """
    assert target > 0, f"the target is {target}, not positive"
    error = min(0.2, max(-0.2, (kl - target) / target))
    return coef * (1 + gain * error)
