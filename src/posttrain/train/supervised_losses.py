"""Supervised fine-tuning with a chosen normaliser.

P target positions of a micro-batch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from posttrain import objectives
from posttrain.models import TokenStats
from posttrain.objectives import Metric
from posttrain.train.batch import Batch
from posttrain.train.losses import Objective, nll_objective, normalisation

SupervisedNormalise = Literal["token", "sequence", "sum"]
"""What the negative log-likelihood is. "token": its mean over all target tokens of the step. "sequence": the mean over
sequences of each one's mean, so that a short answer counts as much as a long one. "sum": its plain sum (Tülu 3, arXiv
2411.15124), so that a step's size grows with its tokens: choose the learning rate and `max_grad_norm` for it."""


def supervised_objective(normalise: SupervisedNormalise = "token") -> Objective:
    """Minus the log-likelihood of the targets, normalised over the whole step.

    An example's scalar `weight`, if given, multiplies its tokens' losses; no denominator changes.
    """
    if normalise == "token":
        return nll_objective

    def objective(stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        weights_P: Tensor | None = None
        denominator = 1.0
        if normalise == "sequence":
            weights_P, denominator = normalisation(batch, "sequence")
        weights_E = batch.scalars.get("weight")
        if weights_E is not None:
            of_example_P = weights_E[batch.example_P]
            weights_P = of_example_P if weights_P is None else weights_P * of_example_P
        loss, metrics = objectives.nll(stats.logprobs_N, denominator=denominator, weights_N=weights_P)
        if stats.entropy_N is not None:
            metrics["entropy"] = objectives.mean(stats.entropy_N)
        return loss, metrics

    return objective
