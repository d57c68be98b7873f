"""Answers that are good or bad, each by itself: KTO, BCO and APO-zero without pairs.

E answers (examples). A bad and a good answer need not share a prompt.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.metric import Metric, mean


def kto(
    log_ratio_E: Tensor,
    label_E: Tensor,
    *,
    kl: float | Tensor,
    denominator: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights_E: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """KTO: gains and losses of an answer against a reference point z₀, the policy's KL to the reference.

        good:  λ_D · (1 − σ(β·(ρ − z₀)))        bad:  λ_U · (1 − σ(β·(z₀ − ρ)))

    z₀ is a constant of the whole step, no gradient flows through it: the mean log-ratio of answers to other prompts
    than their own, at least 0 (`kl_baseline`).

    Args:
        log_ratio_E: ρ = log π/π_ref of each answer, summed over its tokens; rank 1, differentiable.
        label_E: 1 where the answer is good, 0 where it is bad; rank 1.
        kl: z₀, in nats.
        denominator: answers of the whole step; positive.
        beta: risk aversion.
        desirable_weight: λ_D; λ_D·n_D / (λ_U·n_U) should lie in [1, 4/3] (section 4.2).
        undesirable_weight: λ_U.
        weights_E: a further weight of each answer; all 1 if None.

    Returns:
        The loss, rank 0, and `rewards/chosen` and `rewards/rejected` (means of β·ρ over the good and over the bad
        answers) and `kl`.

    Source: Ethayarajh et al., https://arxiv.org/abs/2402.01306, equations 7 and 8.
    """
    _check(log_ratio_E, label_E, denominator)
    sign_E, good_E = 2 * label_E - 1, label_E > 0.5
    losses_E = (-beta * sign_E * (log_ratio_E - kl)).sigmoid()
    side_E = label_E * desirable_weight + (1 - label_E) * undesirable_weight
    metrics = _metrics(beta * log_ratio_E, good_E)
    metrics["kl"] = mean(log_ratio_E.new_zeros(()) + kl)
    return _reduced(losses_E * side_E, weights_E, denominator), metrics


def kl_baseline(mismatched_ratio_E: Tensor) -> Tensor:
    """KTO's reference point z₀: max(0, mean over E of log π(y′|x)/π_ref(y′|x)), where y′ answers another prompt.

    It is an estimate of the KL that ignores what the answers have to do with the prompts: cheap, biased, and what the
    paper and TRL do.

    Args:
        mismatched_ratio_E: log-ratio of each mismatched answer, summed over its tokens; all of a step.

    Returns:
        z₀, rank 0, no gradient.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    if mismatched_ratio_E.numel() == 0 or not bool(mismatched_ratio_E.isfinite().all()):
        raise ValueError("the KL baseline needs mismatched answers with finite log-ratios")
    return mismatched_ratio_E.detach().mean().clamp(min=0)


def bco(
    log_ratio_E: Tensor,
    label_E: Tensor,
    *,
    reward_shift: float | Tensor,
    denominator: float,
    beta: float = 0.01,
    weights_E: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """BCO: a binary classifier whose logit is the implicit reward, shifted to the middle between good and bad.

        r = β·ρ;    good:  − log σ(r − δ)        bad:  − log σ(−(r − δ))

    δ is a constant of the whole step: (E[r | good] + E[r | bad]) / 2 of its own answers (`bco_shift`), or the mean of
    all rewards so far (`bco_running_shift`).

    Args:
        log_ratio_E: ρ = log π/π_ref of each answer, summed over its tokens; rank 1, differentiable.
        label_E: 1 where the answer is good, 0 where it is bad; rank 1.
        reward_shift: δ.
        denominator: answers of the whole step; positive.
        beta: scale of the reward.
        weights_E: for example the density ratios of BCO's underlying distribution matching, for bad answers to prompts
            of another kind than the good ones'; all 1 if None.

    Returns:
        The loss, rank 0, and `rewards/chosen`, `rewards/rejected` and `delta`.

    Source: Jung et al., https://arxiv.org/abs/2404.04656, section 4.
    """
    _check(log_ratio_E, label_E, denominator)
    rewards_E = beta * log_ratio_E
    losses_E = -F.logsigmoid((2 * label_E - 1) * (rewards_E - reward_shift))
    metrics = _metrics(rewards_E, label_E > 0.5)
    metrics["delta"] = mean(log_ratio_E.new_zeros(()) + reward_shift)
    return _reduced(losses_E, weights_E, denominator), metrics


def bco_shift(rewards_E: Tensor, label_E: Tensor) -> Tensor:
    """BCO's δ: the middle between the mean rewards of good and bad answers; of one side alone, that side's mean.

    Args:
        rewards_E: β·ρ of all answers of a step.
        label_E: 1 good, 0 bad.

    Returns:
        δ, rank 0, no gradient.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    if rewards_E.numel() == 0 or not bool(rewards_E.isfinite().all()):
        raise ValueError("the reward shift needs answers with finite rewards")
    rewards_E, good_E = rewards_E.detach(), label_E > 0.5
    sides = [rewards_E[side_E].mean() for side_E in (good_E, ~good_E) if bool(side_E.any())]
    return sum(sides[1:], sides[0]) / len(sides)


def bco_running_shift(rewards_E: Tensor, *, shift: float = 0.0, count: float = 0.0) -> tuple[float, float]:
    """BCO's δ as a running mean: of the rewards of all answers so far, this step's among them.

    δ′ = (δ·n + Σ_e r_e) / (n + E). Where good and bad answers are equally many it is, but for the age of the rewards,
    the middle between the two; a step with answers of one side alone does not throw it off.

    Args:
        rewards_E: β·ρ of all answers of a step.
        shift: δ before the step.
        count: n, answers before the step.

    Returns:
        δ with this step, and n + E.

    Raises:
        ValueError: there is no reward, or one is not finite.

    Source: Jung et al., https://arxiv.org/abs/2404.04656, section 4, with the mean that TRL's BCOTrainer kept.
    """
    if rewards_E.numel() == 0 or not bool(rewards_E.isfinite().all()):
        raise ValueError("the reward shift needs answers with finite rewards")
    total = count + rewards_E.numel()
    return (shift * count + float(rewards_E.detach().double().sum())) / total, total


def apo_zero_unpaired(
    log_ratio_E: Tensor,
    label_E: Tensor,
    *,
    denominator: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights_E: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """APO-zero of answers that are no pairs (TRL's `apo_zero_unpaired`): KTO with z₀ = 0.

        good:  λ_D · (1 − σ(β·ρ))        bad:  λ_U · σ(β·ρ)

    Source: D'Oosterlinck et al., https://arxiv.org/abs/2408.06266, equation 7, taken apart.
    """
    loss, metrics = kto(
        log_ratio_E,
        label_E,
        kl=0.0,
        denominator=denominator,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        weights_E=weights_E,
    )
    del metrics["kl"]
    return loss, metrics


def _metrics(rewards_E: Tensor, good_E: Tensor) -> dict[str, Metric]:
    return {"rewards/chosen": mean(rewards_E, good_E), "rewards/rejected": mean(rewards_E, ~good_E)}


def _reduced(losses_E: Tensor, weights_E: Tensor | None, denominator: float) -> Tensor:
    return (losses_E if weights_E is None else losses_E * weights_E.detach()).sum() / denominator


def _check(log_ratio_E: Tensor, label_E: Tensor, denominator: float) -> None:
    if log_ratio_E.numel() == 0:
        raise ValueError("no answer to learn from: the micro-batch is empty")
    assert log_ratio_E.ndim == 1, f"log_ratio_E has rank {log_ratio_E.ndim}, not 1"
    assert label_E.shape == log_ratio_E.shape, f"label_E is {label_E.shape}, log_ratio_E {log_ratio_E.shape}"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
