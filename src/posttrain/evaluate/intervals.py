"""Intervals: how far a score may be from the truth, given the tasks that were asked.

Legend: N values, C clusters. All functions are pure; those that draw random numbers take a seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from posttrain.core import EvaluateError, Interval
from posttrain.evaluate.quantiles import t_value, z_value

NUM_RESAMPLES = 10_000
_CHUNK = 4_000_000  # drawn indices held in memory at once
_FEW = 32  # distinct values up to which one multinomial draw is quicker than drawing each cluster

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n). Unlike p ± z·SE it keeps its coverage below a few hundred tasks
    and near 0 and 1 (arXiv 2503.01747).

    Args:
        successes: how many of n; may be fractional, a mean of several samples per task.
        n: independent tries.
    """
    if n < 1 or not 0 <= successes <= n:
        raise EvaluateError(f"wilson: {successes} successes of {n} is no proportion")
    z = z_value(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(value=p, low=low, high=high, n=n, method="wilson", confidence=confidence)


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose values come in clusters (arXiv 2411.00640, equation 4).

    SE² = s²/N + (1/N²) Σ_c Σ_{i≠j in c} (x_i − x̄)(x_j − x̄), with s² the sample variance. Clusters of one value each
    give the ordinary s/√N.
    """
    x_N, codes_N = _values_and_codes(values, clusters)
    deviation_N = x_N - x_N.mean()
    num = len(x_N)
    squares = float(deviation_N @ deviation_N)
    within_C = np.bincount(codes_N, weights=deviation_N)
    cross = float(within_C @ within_C) - squares
    return math.sqrt(max(0.0, squares / (num - 1) / num + cross / num**2)) if num > 1 else 0.0


def clustered(values: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """The mean with its clustered standard error and Student's t of (clusters − 1) degrees.

    Args:
        values: N scores.
        clusters: N names; values of the same name are not independent (samples of one task, questions on one passage).

    Raises:
        EvaluateError: fewer than two clusters, which say nothing about spread.
    """
    num_clusters = len(set(clusters))
    if num_clusters < 2:
        raise EvaluateError(f"clustered: {num_clusters} cluster says nothing about spread; at least 2 are needed")
    half = t_value(confidence, num_clusters - 1) * clustered_standard_error(values, clusters)
    mean = float(np.mean(values))
    return Interval(
        value=mean, low=mean - half, high=mean + half, n=num_clusters, method="clustered", confidence=confidence
    )


def bootstrap_mean(
    values: Sequence[float],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The mean with the expanded percentile interval of its bootstrap; whole clusters are drawn where they are given.

    Plain percentiles are too narrow for few values, as dividing by N and taking z for t would be. The tails are
    Φ(−√(N/(N−1)) · t) in place of α/2, which puts both right (Hesterberg 2014, arXiv 1411.5279, section 5.3). The same
    seed draws the same tasks, so the interval of negated values is the mirrored interval.

    Raises:
        EvaluateError: fewer than two values (or clusters), or one that is not finite.
    """
    x_N, codes_N = _values_and_codes(values, range(len(values)) if clusters is None else clusters)
    sums_C = np.bincount(codes_N, weights=x_N).astype(np.float64)
    sizes_C = np.bincount(codes_N).astype(np.float64)
    num = len(sums_C)
    if num < 2:
        raise EvaluateError(f"bootstrap: {num} independent value says nothing about spread; at least 2 are needed")
    tail = NormalDist().cdf(-math.sqrt(num / (num - 1)) * t_value(confidence, num - 1))
    means = _resampled_means(sums_C, sizes_C, np.random.default_rng(seed), num_resamples)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(
        value=float(x_N.mean()),
        low=float(low),
        high=float(high),
        n=num,
        method="bootstrap" if clusters is None else "clustered bootstrap",
        confidence=confidence,
    )


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The mean of a − b on the same tasks. Pairing removes what the tasks' difficulty adds to the noise.

    Args:
        a: N scores, one per task.
        b: N scores of the other model on the same tasks in the same order.
        clusters: N names of tasks that belong together; drawn together.
    """
    if len(a) != len(b):
        raise EvaluateError(f"paired_bootstrap: {len(a)} scores against {len(b)}; pair them by task first")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    interval = bootstrap_mean(
        difference.tolist(), seed=seed, clusters=clusters, confidence=confidence, num_resamples=num_resamples
    )
    return interval.replace(method=f"paired {interval.method}")


def _resampled_means(sums_C: Floats, sizes_C: Floats, rng: np.random.Generator, num_resamples: int) -> Floats:
    """Means of `num_resamples` draws of C clusters with replacement.

    Right-or-wrong tasks have few distinct values. Then how often each value is drawn is one multinomial draw, which has
    the same distribution as drawing every task and is a hundred times quicker. Values are numbered as they first
    appear, so that negated values draw alike.
    """
    num = len(sums_C)
    numbers: dict[tuple[float, float], int] = {}
    codes = [numbers.setdefault(pair, len(numbers)) for pair in zip(sums_C.tolist(), sizes_C.tolist(), strict=True)]
    if len(numbers) <= _FEW:
        drawn = rng.multinomial(num, np.bincount(codes) / num, size=num_resamples)
        sums, sizes = np.array(list(numbers), dtype=np.float64).T
        return np.asarray((drawn @ sums) / (drawn @ sizes))
    means = []
    rows = max(1, _CHUNK // num)
    for start in range(0, num_resamples, rows):
        chosen = rng.integers(0, num, size=(min(rows, num_resamples - start), num))
        means.append(sums_C[chosen].sum(axis=1) / sizes_C[chosen].sum(axis=1))
    return np.concatenate(means)


def _values_and_codes(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[Floats, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    if len(values) == 0:
        raise EvaluateError("no values, so there is no mean")
    if len(values) != len(clusters):
        raise EvaluateError(f"{len(values)} values but {len(clusters)} cluster names")
    x_N = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x_N).all():
        raise EvaluateError("a value is NaN or infinite, so the mean means nothing")
    numbers: dict[Hashable, int] = {}
    return x_N, np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)
