"""Metrics that combine exactly over micro-batches: each carries its own weight, so a mean stays the mean of all tokens.

N tokens (any flat list of values).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduce = Literal["mean", "sum", "min", "max"]


class Metric(NamedTuple):
    """One number of one micro-batch, on its way to the number of the whole step.

    Over micro-batches i: "mean" gives Σ total_i / Σ weight_i, "sum" gives Σ total_i, "min" and "max" the extreme of
    total_i. A metric whose weights are all 0 was not observed and is left out.
    """

    total: Tensor  # rank 0, detached
    weight: Tensor  # rank 0: how many observations are behind `total`
    reduce: Reduce = "mean"


def mean(values_N: Tensor, weights_N: Tensor | None = None) -> Metric:
    """The mean of values over all micro-batches.

    Args:
        values_N: observations, any shape.
        weights_N: weight of each (or a boolean mask), same shape; all 1 if None.
    """
    values_N = values_N.detach().float()
    if weights_N is None:
        return Metric(values_N.sum(), values_N.new_tensor(float(values_N.numel())))
    weights_N = weights_N.detach().to(values_N.dtype)
    return Metric((values_N * weights_N).sum(), weights_N.sum())


def total(values_N: Tensor) -> Metric:
    """The sum of values over all micro-batches; observed (as 0) even where there are none."""
    values_N = values_N.detach().float()
    return Metric(values_N.sum(), values_N.new_ones(()), "sum")


def minimum(values_N: Tensor) -> Metric:
    """The smallest value over all micro-batches."""
    return _extreme(values_N, "min")


def maximum(values_N: Tensor) -> Metric:
    """The largest value over all micro-batches."""
    return _extreme(values_N, "max")


def combine(batches: Sequence[Mapping[str, Metric]]) -> dict[str, float]:
    """Metrics of all micro-batches of a step as plain numbers, moved off the device in one transfer.

    Args:
        batches: for each micro-batch its metrics by name; a name may be absent from some.

    Returns:
        By name, in order of first appearance. A non-finite value is given as it is: the caller decides.
    """
    named = [(name, metric) for metrics in batches for name, metric in metrics.items()]
    if not named:
        return {}
    flat = torch.stack([number.double() for _, metric in named for number in (metric.total, metric.weight)]).tolist()
    seen: dict[str, tuple[Reduce, list[tuple[float, float]]]] = {}
    for (name, metric), value, weight in zip(named, flat[::2], flat[1::2], strict=True):
        seen.setdefault(name, (metric.reduce, []))[1].append((value, weight))
    reduced = {name: _reduce(reduce, pairs) for name, (reduce, pairs) in seen.items()}
    return {name: value for name, value in reduced.items() if value is not None}


def _extreme(values_N: Tensor, reduce: Literal["min", "max"]) -> Metric:
    values_N = values_N.detach().float()
    if values_N.numel() == 0:
        return Metric(values_N.new_zeros(()), values_N.new_zeros(()), reduce)
    extreme = values_N.min() if reduce == "min" else values_N.max()
    return Metric(extreme, values_N.new_tensor(float(values_N.numel())), reduce)


def _reduce(reduce: Reduce, pairs: list[tuple[float, float]]) -> float | None:
    observed = [(value, weight) for value, weight in pairs if weight]
    if not observed:
        return None
    values = [value for value, _ in observed]
    if reduce == "mean":
        return math.fsum(values) / math.fsum(weight for _, weight in observed) if _finite(values) else math.nan
    if reduce == "sum":
        return math.fsum(values) if _finite(values) else math.nan
    if any(math.isnan(value) for value in values):
        return math.nan
    return min(values) if reduce == "min" else max(values)


def _finite(values: list[float]) -> bool:
    return all(math.isfinite(value) for value in values)
