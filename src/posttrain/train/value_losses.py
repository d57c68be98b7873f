"""From a batch to the value model's loss: the critic's adapter.

P target positions of a micro-batch.
"""

from __future__ import annotations

from torch import Tensor

from posttrain import objectives
from posttrain.objectives import Metric
from posttrain.train.batch import Batch
from posttrain.train.forward import Scores
from posttrain.train.losses import Normalise, Objective, column, normalisation


def value_objective(
    *, clip: float | None = 0.2, normalise: Normalise = "token", max_length: int | None = None
) -> Objective:
    """Clipped regression of the values on the returns, for a trainer with `forward=value_forward`.

    Columns read: `returns`; `old_values` (with `clip`): what the value model said when the advantages were made, from
    `Trainer.logprobs` of the same trainer.

    Args:
        clip: see `objectives.value_loss`.
        normalise: what the loss is a mean over; see `policy_objective`.
        max_length: with "constant".

    Raises:
        TrainError: (when called) a column is missing.
    """

    def objective(stats: Scores, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        weights_P, denominator = normalisation(batch, normalise, max_length)
        returns_P = column(batch, "returns")
        return objectives.value_loss(
            stats.values_N,
            returns_P if clip is None else column(batch, "old_values"),
            returns_P,
            denominator=denominator,
            weights_N=weights_P,
            clip=clip,
        )

    return objective
