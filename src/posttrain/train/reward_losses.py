"""From a batch to the objectives of reward models: thin adapters for `Trainer(…, forward=score_forward)`.

An example is a pair or a longer ranked list, the best answer first, with one target in each sequence: its last token,
where the model's number is the reward; or an answer with a label; or an answer with a target at the end of each step.

P target positions of a micro-batch, E examples, N pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain import objectives
from posttrain.core import ConfigError, TrainError
from posttrain.objectives import Metric
from posttrain.train.batch import Batch
from posttrain.train.forward import Scores
from posttrain.train.losses import Normalise, Objective, column, normalisation

LEVELS = "levels"
LABELS = "labels"


def reward_objective(
    *,
    ranking: Literal["pairs", "plackett_luce"] = "pairs",
    center: float = 0.0,
    label_smoothing: float = 0.0,
) -> Objective:
    """A reward model from ranked answers: Bradley–Terry over all ordered pairs, or Plackett–Luce over the ranking.

    The loss is the mean over the step's examples (for pairs, TRL's mean over pairs); the pairs of one longer list share
    its weight. An example's scalar `weight`, if given, multiplies its loss.

    Column read, if there: `levels`, a number at each answer's target. The margin of a pair is the difference of its
    levels: (m, 0) for a pair with margin m, (m, m, 0) for edited > chosen > rejected of which only the last two carry
    one.

    Args:
        ranking: "pairs", or "plackett_luce", which knows neither margins nor label smoothing.
        center: coefficient that keeps the sum of a pair's rewards near 0; 0.01 in Eisenstein et al.
        label_smoothing: share of labels taken to be the wrong way round.

    Raises:
        ConfigError: a setting that the ranking does not know.
        TrainError: (when called) an example has fewer than two sequences, or one without exactly one target.
    """
    if ranking not in ("pairs", "plackett_luce"):
        raise ConfigError(f"reward_objective: ranking must be 'pairs' or 'plackett_luce', not {ranking!r}")
    if ranking == "plackett_luce" and label_smoothing:
        raise ConfigError("reward_objective: label smoothing is of pairs; choose ranking 'pairs'")

    def objective(stats: Scores, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        scores_P, lists_P = _one_score_per_answer(stats, batch)
        weights_E = batch.scalars.get("weight")
        denominator = batch.denominators.examples
        if ranking == "plackett_luce":
            if LEVELS in batch.columns:
                raise TrainError("Plackett–Luce knows no margins; leave the column 'levels' out or rank by pairs")
            return objectives.plackett_luce(
                scores_P, lists_P, batch.num_examples, denominator=denominator, weights_L=weights_E, center=center
            )
        better_N, worse_N, weights_N = objectives.ranked_pairs(lists_P, batch.num_examples)
        if weights_E is not None:
            weights_N = weights_N * weights_E[lists_P[better_N]]
        levels_P = batch.columns.get(LEVELS)
        return objectives.bradley_terry(
            scores_P[better_N],
            scores_P[worse_N],
            denominator=denominator,
            weights_N=weights_N,
            margins_N=None if levels_P is None else levels_P[better_N] - levels_P[worse_N],
            center=center,
            label_smoothing=label_smoothing,
        )

    return objective


def outcome_objective(*, positive_weight: float = 1.0) -> Objective:
    """A verifier: was the answer right? The column `labels`, in [0, 1], is read at each answer's one target.

    The loss is the mean over the step's answers. An example's scalar `weight`, if given, multiplies its loss.
    """

    def objective(stats: Scores, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        weights_E = batch.scalars.get("weight")
        return objectives.outcome_loss(
            stats.values_N,
            column(batch, LABELS),
            denominator=batch.denominators.tokens,
            weights_N=None if weights_E is None else weights_E[batch.example_P],
            positive_weight=positive_weight,
        )

    return objective


def process_objective(*, normalise: Normalise = "token", positive_weight: float = 1.0) -> Objective:
    """A process reward model: is the solution right up to here? The column `labels`, in [0, 1], at each step's target.

    Steps that nobody labelled are no targets.

    Args:
        normalise: what the loss is a mean over: "token" (all steps count the same), "sequence" (all answers),
            "group" (all prompts).
        positive_weight: how much more a right step counts.
    """
    if normalise not in ("token", "sequence", "group"):
        raise ConfigError(f"process_objective: normalise must be 'token', 'sequence' or 'group', not {normalise!r}")

    def objective(stats: Scores, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        weights_P, denominator = normalisation(batch, normalise)
        return objectives.process_loss(
            stats.values_N,
            column(batch, LABELS),
            sequence_N=batch.sequence_P,
            num_sequences=batch.num_sequences,
            denominator=denominator,
            weights_N=weights_P,
            positive_weight=positive_weight,
        )

    return objective


def _one_score_per_answer(stats: Scores, batch: Batch) -> tuple[Tensor, Tensor]:
    """The score of each sequence and the example it is of, or an error that says which example is to blame."""
    num = batch.num_sequences
    targets_S = torch.bincount(batch.sequence_P, minlength=num)
    answers_E = torch.bincount(batch.example_S, minlength=batch.num_examples)
    if num != len(batch.sequence_P) or bool((targets_S != 1).any()):
        wrong = int((targets_S != 1).nonzero()[0])
        raise TrainError(
            f"example {batch.ids[int(batch.example_S[wrong])]!r}: an answer has {int(targets_S[wrong])} targets; a "
            "reward model judges each answer at one token, its last: set the mask True there alone"
        )
    if bool((answers_E < 2).any()):
        alone = int((answers_E < 2).nonzero()[0])
        raise TrainError(f"example {batch.ids[alone]!r} has one answer; a preference needs two or more, the best first")
    return stats.values_N, batch.example_S
