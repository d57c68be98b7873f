"""Distillation: how far a student's distribution over the next token is from a teacher's, and losses made of it.

N tokens (target positions), V vocabulary, K tokens of which the teacher tells its probability.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from posttrain.objectives.metric import Metric, mean

TopKRest = Literal["tail", "renormalise"]

_IMPOSSIBLE = -1e30  # stands for log 0: 0 · −inf would be NaN


def forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ_v p_v · (log p_v − log q_v), p the teacher's probabilities and q the student's.

    Covers every mode of the teacher: the student pays wherever the teacher has mass and it has none. Its gradient in
    the student's logits is q − p, that of the cross-entropy with soft targets (Hinton et al.,
    https://arxiv.org/abs/1503.02531).

    Args:
        student_logprobs_NV: normalised log-probabilities, any leading shape; differentiable.
        teacher_logprobs_NV: the same of the teacher; no gradient.

    Returns:
        kl_N, in nats, never negative but for rounding.
    """
    return _kl(teacher_logprobs_NV.detach(), student_logprobs_NV)


def reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(student ‖ teacher) = Σ_v q_v · (log q_v − log p_v).

    Seeks modes: the student pays wherever it has mass and the teacher has none, and may leave modes of the teacher
    out (MiniLLM, https://arxiv.org/abs/2306.08543). Arguments and result as for `forward_kl`.
    """
    return _kl(student_logprobs_NV, teacher_logprobs_NV.detach())


def generalised_jsd(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence between teacher p and student q, with m = beta · p + (1 − beta) · q:

        D_beta = beta · KL(p ‖ m) + (1 − beta) · KL(q ‖ m)        for 0 < beta < 1
        D_0    = KL(p ‖ q), forward        D_1 = KL(q ‖ p), reverse

    The ends are the limits of D_beta / (beta · (1 − beta)), not of D_beta itself, which vanishes there: a loss at
    beta = 0.01 is about a hundredth of the one at 0. With beta = 0.5 it is symmetric and at most log 2.

    Args:
        student_logprobs_NV: normalised log-probabilities, any leading shape; differentiable.
        teacher_logprobs_NV: the same of the teacher; no gradient.
        beta: 0 (forward KL) to 1 (reverse KL).

    Returns:
        divergence_N, in nats.

    Source: GKD, https://arxiv.org/abs/2306.13649, section 2 and equation 1; the ends as in TRL's trainers.
    """
    assert 0 <= beta <= 1, f"beta is {beta}, not between 0 and 1"
    if beta == 0:
        return forward_kl(student_logprobs_NV, teacher_logprobs_NV)
    if beta == 1:
        return reverse_kl(student_logprobs_NV, teacher_logprobs_NV)
    teacher_NV = teacher_logprobs_NV.detach()
    mixture_NV = torch.logaddexp(teacher_NV + math.log(beta), student_logprobs_NV + math.log1p(-beta))
    return beta * _kl(teacher_NV, mixture_NV) + (1 - beta) * _kl(student_logprobs_NV, mixture_NV)


def top_k_divergence(
    student_logprobs_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    *,
    beta: float = 0.0,
    rest: TopKRest = "tail",
    known_NK: Tensor | None = None,
) -> Tensor:
    """`generalised_jsd` where the teacher tells the probabilities of K tokens only, as an endpoint does.

    What the other tokens have together is treated in one of two ways:

        "tail"         as one more token, with what the K leave of 1: a proper divergence between two coarser
                       distributions, hence a lower bound of the full one, and 0 only if the K probabilities agree
        "renormalise"  not at all: both distributions are divided by their mass on the K tokens. The student is then
                       free to put any mass elsewhere; with K = 1 there is nothing to learn

    Args:
        student_logprobs_NK: the student's log-probabilities of these K tokens under its full distribution;
            differentiable.
        teacher_logprobs_NK: the teacher's, of the same tokens; no gradient.
        beta: as for `generalised_jsd`.
        rest: what becomes of the other tokens.
        known_NK: False where a row has fewer than K tokens; all True if None.

    Returns:
        divergence_N, in nats.
    """
    student_NK, teacher_NK = student_logprobs_NK, teacher_logprobs_NK.detach()
    if known_NK is not None:
        student_NK = student_NK.masked_fill(~known_NK, _IMPOSSIBLE)
        teacher_NK = teacher_NK.masked_fill(~known_NK, _IMPOSSIBLE)
    if rest == "tail":
        return generalised_jsd(_with_tail(student_NK), _with_tail(teacher_NK), beta)
    if rest == "renormalise":
        return generalised_jsd(student_NK.log_softmax(-1), teacher_NK.log_softmax(-1), beta)
    raise ValueError(f"unknown treatment of the rest {rest!r}: choose tail or renormalise")


def distillation(
    divergence_N: Tensor,
    logprobs_N: Tensor | None = None,
    *,
    denominator: float,
    nll_weight: float = 0.0,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """A mixture of following the teacher and predicting the data:

        loss = Σ_n weights_n · ((1 − nll_weight) · divergence_n − nll_weight · logprobs_n) / denominator

    There is no factor of the squared temperature: with a temperature T of both softmaxes, gradients shrink as 1/T²,
    and Hinton et al. (https://arxiv.org/abs/1503.02531, section 2) multiply the divergence by T² where it is mixed with
    a likelihood at temperature 1. The caller does, if it wants that.

    Args:
        divergence_N: of each token, from one of this file's functions; rank 1, differentiable.
        logprobs_N: log-probability of each target token under the student, for the likelihood; rank 1.
        denominator: what the sum is divided by; positive: the target tokens of the whole step make it a mean.
        nll_weight: 0 follows the teacher alone, 1 the data alone.
        weights_N: weight of each token; rank 1; all 1 if None.

    Returns:
        The loss, rank 0, and the metrics `divergence` and (with logprobs) `nll`: means over tokens, unweighted, nats.
    """
    assert divergence_N.ndim == 1, f"divergence_N has rank {divergence_N.ndim}, not 1"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    assert 0 <= nll_weight <= 1, f"nll_weight is {nll_weight}, not between 0 and 1"
    metrics = {"divergence": mean(divergence_N)}
    losses_N = (1 - nll_weight) * divergence_N
    if logprobs_N is not None:
        metrics["nll"] = mean(-logprobs_N)
        losses_N = losses_N - nll_weight * logprobs_N if nll_weight else losses_N
    elif nll_weight:
        raise ValueError("a likelihood in the loss needs logprobs_N")
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator, metrics


def teacher_advantages(
    logprobs_N: Tensor, teacher_logprobs_N: Tensor, *, coefficient: float = 1.0, clip: float | None = None
) -> Tensor:
    """Credit of each sampled token from a teacher: minus a one-sample estimate of the reverse KL at that token.

        A_n = coefficient · (log teacher(n) − log student(n))

    With these as advantages of a policy gradient on the student's own samples, the expected gradient at every state
    that the student visits is that of its reverse KL to the teacher there: each token answers for itself alone
    (discount 0), which costs no sampling of a return.

    Args:
        logprobs_N: log-probability of each token under the student that sampled it; rank 1.
        teacher_logprobs_N: the same under the teacher; rank 1.
        coefficient: of the penalty.
        clip: bound on |A_n|: one token that the teacher calls impossible would outweigh thousands; None: no bound.

    Returns:
        advantages_N, no gradient.

    Source: K. Lu and Thinking Machines Lab, "On-Policy Distillation", 2025,
    https://thinkingmachines.ai/blog/on-policy-distillation.
    """
    advantages_N = coefficient * (teacher_logprobs_N - logprobs_N).detach()
    return advantages_N if clip is None else advantages_N.clamp(-clip, clip)


def _kl(of_NV: Tensor, to_NV: Tensor) -> Tensor:
    """KL(of ‖ to); a token that `of` calls impossible adds nothing."""
    of_NV = of_NV.clamp(min=_IMPOSSIBLE)
    return (of_NV.exp() * (of_NV - to_NV.clamp(min=_IMPOSSIBLE))).sum(-1)


def _with_tail(logprobs_NK: Tensor) -> Tensor:
    """One more column: log(1 − Σ_k p_k). The sum is kept a little below 1, so that the tail is finite."""
    highest = -1e-7 if logprobs_NK.dtype == torch.float32 else -1e-15
    inside_N1 = logprobs_NK.logsumexp(-1, keepdim=True).clamp(max=highest)
    return torch.cat((logprobs_NK, (-torch.expm1(inside_N1)).log()), -1)
