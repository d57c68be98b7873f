"""Quantiles of the two distributions that intervals need, without a statistics package."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

from posttrain.core import EvaluateError


def z_value(confidence: float) -> float:
    """The normal quantile of a two-sided interval: 1.96 for 0.95."""
    _check(confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2)


@functools.lru_cache(maxsize=1024)
def t_value(confidence: float, degrees: int) -> float:
    """Student's quantile of a two-sided interval: 2.262 for 0.95 and 9 degrees of freedom."""
    _check(confidence)
    if degrees < 1:
        raise EvaluateError("Student's t needs at least one degree of freedom (two clusters)")
    low, high = 0.0, 2.0
    while t_two_sided(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def t_two_sided(t: float, degrees: int) -> float:
    """P(|T| ≤ t) of Student's t: 1 − I_x(ν/2, 1/2) with x = ν / (ν + t²)."""
    return 1.0 - incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (NIST DLMF 8.17.22)."""
    if not 0.0 < x < 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    fraction = 0.0
    for m in range(200, 0, -1):  # from the inside out; 200 terms are far past convergence for x left of the mean
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = even / (1.0 + odd / (1.0 + fraction))
    first = -(a + b) * x / (a + 1)
    return front / (1.0 + first / (1.0 + fraction))


def _check(confidence: float) -> None:
    if not 0.0 < confidence < 1.0:
        raise EvaluateError(f"confidence must lie between 0 and 1, not {confidence}")
