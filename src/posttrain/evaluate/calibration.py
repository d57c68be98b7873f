"""Calibration: when a model says 70 %, is it right seven times of ten?

Legend: N forecasts. A forecast is a probability; what came of it is 1 or 0 (or between, for a tie).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from posttrain.core import EvaluateError, Interval, Record
from posttrain.evaluate.intervals import bootstrap_mean, wilson


class ReliabilityBin(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forecasts of about the same probability, and how often they came true."""

    low: float  # edges of the bin; the upper one belongs to it only in the last
    high: float
    forecast: float  # mean probability of the forecasts in it
    frequency: Interval  # how often they came true, Wilson


class Calibration(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="calibration/1"
):
    """How far forecasts can be taken at their word."""

    n: int
    ece: float  # expected calibration error: Σ_b n_b / n · |frequency_b − forecast_b|
    max_error: float  # the largest of those gaps
    brier: Interval  # mean of (forecast − outcome)²: 0 is perfect, 0.25 is always saying one half
    log_loss: float  # mean of − log of the probability of what happened, nats
    bins: tuple[ReliabilityBin, ...]  # those with a forecast in them, ascending

    def table(self) -> str:
        """The reliability diagram as text, a line for each bin."""
        lines = [f"{'forecast':>16}  {'came true':>9}  {'95 % interval':>16}  {'n':>5}"]
        for each in self.bins:
            seen = each.frequency
            interval = f"[{seen.low:6.3f}, {seen.high:6.3f}]"
            lines.append(f"{each.low:6.2f} to {each.high:6.2f}  {seen.value:9.3f}  {interval}  {seen.n:5}")
        return "\n".join(lines)


def calibration(
    probabilities: Sequence[float],
    outcomes: Sequence[float],
    *,
    num_bins: int = 10,
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
) -> Calibration:
    """Compare forecasts with what came of them.

    Args:
        probabilities: N forecasts, within [low, high].
        outcomes: N: 1 where it came true, 0 where not, 1/2 for a tie.
        num_bins: of equal width between low and high.
        low: 0.5 for forecasts of the more likely of two sides, which are never below.
        seed: of the bootstrap behind the Brier score's interval.

    Returns:
        The calibration. Its ECE is biased upwards for few forecasts: a bin's frequency is off by chance alone.

    Raises:
        EvaluateError: fewer than two forecasts, lengths that differ, a value out of range.

    Source: Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599, equations 2 to 5;
    Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    p_N, y_N = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if p_N.shape != y_N.shape or p_N.ndim != 1 or len(p_N) < 2:
        raise EvaluateError(f"calibration: {p_N.size} forecasts for {y_N.size} outcomes; give two or more of each")
    if not (np.isfinite(p_N).all() and p_N.min() >= low and p_N.max() <= high):
        raise EvaluateError(f"calibration: forecasts must lie in [{low:g}, {high:g}]")
    if not (np.isfinite(y_N).all() and y_N.min() >= 0 and y_N.max() <= 1):
        raise EvaluateError("calibration: outcomes must lie in [0, 1]")
    index_N = np.clip(((p_N - low) / (high - low) * num_bins).astype(np.int64), 0, num_bins - 1)
    bins, gaps, sizes = [], [], []
    for number in range(num_bins):
        inside = index_N == number
        size = int(inside.sum())
        if not size:
            continue
        forecast, came_true = float(p_N[inside].mean()), float(y_N[inside].sum())
        width = (high - low) / num_bins
        frequency = wilson(came_true, size)
        bins.append(
            ReliabilityBin(
                low=low + number * width, high=low + (number + 1) * width, forecast=forecast, frequency=frequency
            )
        )
        gaps.append(abs(frequency.value - forecast))
        sizes.append(size)
    squared_N = (p_N - y_N) ** 2
    said_N = np.clip(np.stack((p_N, 1 - p_N)), 1e-300, 1.0)
    return Calibration(
        n=len(p_N),
        ece=math.fsum(size * gap for size, gap in zip(sizes, gaps, strict=True)) / len(p_N),
        max_error=max(gaps),
        brier=bootstrap_mean(squared_N.tolist(), seed=seed),
        log_loss=float(-(y_N * np.log(said_N[0]) + (1 - y_N) * np.log(said_N[1])).mean()),
        bins=tuple(bins),
    )
