"""Running moments of rewards: so that rewards of different models, and of different weeks, are on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.core import Record


class Moments(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="moments/1"):
    """Count, mean and spread of all rewards so far. Each update is a new record; nothing is ever changed.

    As JSON (`to_json`, `from_json`) it comes back to the last bit, so a run that is killed and resumed whitens as one
    that was not: keep it in the checkpoint's `extra`.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def updated(self, values: Sequence[float]) -> Moments:
        """The moments with some more rewards. Values that are not finite are left out.

        Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        1979, equation 2.1: exact whatever the batches, up to rounding.
        """
        seen = [value for value in values if math.isfinite(value)]
        if not seen:
            return self
        mean = math.fsum(seen) / len(seen)
        squares = math.fsum((value - mean) ** 2 for value in seen)
        count = self.count + len(seen)
        gap = mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + gap * len(seen) / count,
            squares=self.squares + squares + gap**2 * self.count * len(seen) / count,
        )

    @property
    def std(self) -> float:
        """Standard deviation of a sample (n − 1); 1 while there are fewer than two rewards, or all are the same."""
        if self.count < 2 or self.squares <= 0:
            return 1.0
        return math.sqrt(self.squares / (self.count - 1))

    def whiten(self, value: float, *, shift: bool = True, clip: float | None = None) -> float:
        """The reward at unit variance; at mean 0 too if `shift`.

        Args:
            value: a reward on the old scale.
            shift: subtract the mean. Without it a reward keeps its sign.
            clip: bound on its absolute value.
        """
        scaled = (value - self.mean if shift else value) / self.std
        return scaled if clip is None else max(-clip, min(clip, scaled))
