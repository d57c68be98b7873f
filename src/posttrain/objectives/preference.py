"""Preferences between two answers: what every loss of the DPO family takes, and how it becomes one number.

A loss of this family sees a pair of answers as two sequence logprobs under the policy and two under the reference. It
gives one number for each pair (`preference_losses.py`); several may be added with weights (MPO, an NLL term);
`preference_loss` makes the step's loss and the metrics of them.

E pairs (examples), S sequences, N tokens (target positions).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.metric import Metric, mean
from posttrain.objectives.segments import sequence_mean

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class Pairs(NamedTuple):
    """Sequence logprobs of E pairs: log π(answer | prompt), summed over the answer's tokens; each of rank 1.

    Without a reference the two reference columns are zeros (`without_reference`): the ratio is then the logprob.
    """

    chosen_E: Tensor  # under the policy, differentiable
    rejected_E: Tensor
    ref_chosen_E: Tensor  # under the reference, no gradient
    ref_rejected_E: Tensor
    chosen_tokens_E: Tensor  # tokens summed over, at least 1
    rejected_tokens_E: Tensor

    @classmethod
    def without_reference(
        cls, chosen_E: Tensor, rejected_E: Tensor, chosen_tokens_E: Tensor, rejected_tokens_E: Tensor
    ) -> Pairs:
        """Pairs for methods that have no reference (SimPO, CPO, ORPO)."""
        nothing_E = torch.zeros_like(chosen_E)
        return cls(chosen_E, rejected_E, nothing_E, nothing_E, chosen_tokens_E, rejected_tokens_E)

    @property
    def chosen_ratio_E(self) -> Tensor:
        """log π(chosen) − log π_ref(chosen)."""
        return self.chosen_E - self.ref_chosen_E.detach()

    @property
    def rejected_ratio_E(self) -> Tensor:
        """log π(rejected) − log π_ref(rejected)."""
        return self.rejected_E - self.ref_rejected_E.detach()

    @property
    def margin_E(self) -> Tensor:
        """The chosen answer's log-ratio minus the rejected one's; β times it is the difference of implicit rewards."""
        return self.chosen_ratio_E - self.rejected_ratio_E

    def per_token(self) -> Pairs:
        """The same with means over tokens in place of sums (length normalisation)."""
        return self._replace(
            chosen_E=self.chosen_E / self.chosen_tokens_E,
            rejected_E=self.rejected_E / self.rejected_tokens_E,
            ref_chosen_E=self.ref_chosen_E / self.chosen_tokens_E,
            ref_rejected_E=self.ref_rejected_E / self.rejected_tokens_E,
        )


def f_divergence(pairs: Pairs, kind: Divergence, *, alpha: float = 0.5) -> Pairs:
    """Pairs whose log-ratios are f′(π / π_ref): another divergence than DPO's reverse KL to stay near the reference.

    With t = π / π_ref and u = log t:

        reverse_kl   u                         (DPO)
        forward_kl   1 − 1/t
        js           log 2 + log σ(u)
        alpha        (t^(α−1) − 1) / (α − 1)   (α → 1 is reverse_kl)

    Only losses of the margin are defined for it (`dpo_losses`, `ipo_losses`, `hinge_losses`, `robust_losses`,
    `exo_losses`, `discopop_losses`): in it the term that depends on the prompt alone cancels. (α − 1)·u is clamped
    to at most 80, beyond which float32 is infinite.

    Source: Wang et al., https://arxiv.org/abs/2309.16240; the sign and scale are TRL's (`f_divergence_type`).
    """

    def score(log_ratio_E: Tensor) -> Tensor:
        if kind == "reverse_kl" or (kind == "alpha" and abs(alpha - 1) < 1e-6):
            return log_ratio_E
        if kind == "forward_kl":
            return -(-log_ratio_E).clamp(max=80.0).expm1()
        if kind == "js":
            return F.logsigmoid(log_ratio_E) + torch.log(log_ratio_E.new_tensor(2.0))
        if kind == "alpha":
            return ((alpha - 1) * log_ratio_E).clamp(max=80.0).expm1() / (alpha - 1)
        raise ValueError(f"unknown divergence {kind!r}: choose reverse_kl, forward_kl, js or alpha")

    nothing_E = torch.zeros_like(pairs.ref_chosen_E)
    return pairs._replace(
        chosen_E=score(pairs.chosen_ratio_E),
        rejected_E=score(pairs.rejected_ratio_E),
        ref_chosen_E=nothing_E,
        ref_rejected_E=nothing_E,
    )


def preference_loss(
    pairs: Pairs, losses_E: Tensor, *, denominator: float, beta: float, weights_E: Tensor | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss of a micro-batch of pairs, and TRL's metrics.

        loss = Σ_e weights_e · losses_e / denominator

    With `denominator` the number of pairs of the whole step (all micro-batches, all ranks) it is the mean over pairs,
    which accumulation and packing do not change.

    Args:
        pairs: whose rewards are reported: β times the log-ratios, as they are (give `pairs.per_token()` for methods
            whose reward is a mean over tokens).
        losses_E: one number for each pair, from functions of `preference_losses`; rank 1, differentiable.
        denominator: what the sum is divided by; positive.
        beta: scale of the implicit rewards in the metrics.
        weights_E: weight of each pair; all 1 if None.

    Returns:
        The loss, rank 0, and the means over pairs `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`
        (share of pairs whose chosen answer has the larger reward; ties count as wrong), `rewards/margins`,
        `logps/chosen`, `logps/rejected`.

    Raises:
        ValueError: there is no pair.
    """
    if losses_E.numel() == 0:
        raise ValueError("no pair to learn from: the micro-batch is empty")
    for name, values_E in zip(pairs._fields, pairs, strict=True):
        assert values_E.shape == losses_E.shape, f"{name} is {values_E.shape}, losses_E {losses_E.shape}"
    assert losses_E.ndim == 1, f"losses_E has rank {losses_E.ndim}, not 1"
    assert denominator > 0, f"the denominator is {denominator}, not positive"
    chosen_E, rejected_E = beta * pairs.chosen_ratio_E.detach(), beta * pairs.rejected_ratio_E.detach()
    metrics = {
        "rewards/chosen": mean(chosen_E),
        "rewards/rejected": mean(rejected_E),
        "rewards/accuracies": mean(chosen_E > rejected_E),
        "rewards/margins": mean(chosen_E - rejected_E),
        "logps/chosen": mean(pairs.chosen_E),
        "logps/rejected": mean(pairs.rejected_E),
    }
    weighted_E = losses_E if weights_E is None else losses_E * weights_E.detach()
    return weighted_E.sum() / denominator, metrics


def wpo_weights(
    logprobs_N: Tensor, sequence_N: Tensor, num_sequences: int, *, log_collision_N: Tensor | None = None
) -> Tensor:
    """WPO's weight of each answer: how likely the policy would have written it. A pair's weight is the product of two.

        w_s = exp( mean over its tokens of  log π(y_t) − log Σ_v π(v)² )

    The second term, the logarithm of the chance that two draws agree, is WPO's "sampled alignment": an answer that the
    policy itself sampled has weight near 1 whatever the entropy of its distributions. Without it (`log_collision_N`
    None) the weight is the plain length-normalised probability of the paper's equation 2.

    Args:
        logprobs_N: log-probability of each token under the policy at temperature 1; rank 1.
        sequence_N: its sequence.
        num_sequences: S.
        log_collision_N: log Σ_v π(v)² at each token; rank 1.

    Returns:
        weights_S, no gradient.

    Source: Zhou et al., https://arxiv.org/abs/2406.11827, equation 2; with the alignment it is TRL's `use_weighting`.
    """
    logprobs_N = logprobs_N.detach()
    aligned_N = logprobs_N if log_collision_N is None else logprobs_N - log_collision_N.detach()
    return sequence_mean(aligned_N, sequence_N, num_sequences).exp()
