"""How far raters agree beyond chance: Cohen's κ, Krippendorff's α, and their intervals.

Legend: U units (things rated), V values, C clusters (prompts), R resamples. Every statistic here is a function of
summed tables, so an interval resamples whole clusters by adding their tables up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from posttrain.core import EvaluateError, Interval
from posttrain.evaluate.quantiles import t_value

Level = Literal["nominal", "ordinal", "interval", "ratio"]
Value = float | int | str | bool
Table = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
NUM_RESAMPLES = 2000
_CHUNK = 20_000_000  # numbers held in memory at once


def cohen_kappa(
    a: Sequence[Value], b: Sequence[Value], *, weights: Literal["linear", "quadratic"] | None = None
) -> float:
    """Cohen's κ of two raters: (p_o − p_e) / (1 − p_e), with disagreements weighted by distance where asked.

    Args:
        a: U ratings.
        b: U ratings of the same units.
        weights: None counts every disagreement alike; "linear" and "quadratic" by the distance of the values' ranks.

    Returns:
        1 for full agreement, 0 for as much as chance gives; NaN where both raters used one and the same value only,
        which tells nothing about either.

    Raises:
        EvaluateError: no units, or of different number.
    """
    if len(a) != len(b) or not a:
        raise EvaluateError(f"kappa: needs as many ratings of one rater as of the other, not {len(a)} and {len(b)}")
    values = value_order([*a, *b])
    table_VV = np.zeros((len(values), len(values)))
    for left, right in zip(a, b, strict=True):
        table_VV[values[left], values[right]] += 1
    return float(kappa_of(table_VV, weights=weights))


def kappa_of(table_VV: Table, *, weights: Literal["linear", "quadratic"] | None = None) -> Table:
    """κ of a confusion table, or of a stack of them (… × V × V); NaN where it is undefined."""
    size = table_VV.shape[-1]
    distance_VV = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(np.float64)
    if weights is None:
        distance_VV = (distance_VV > 0).astype(np.float64)
    elif weights == "quadratic":
        distance_VV = distance_VV**2
    total = table_VV.sum(axis=(-2, -1))
    rows_V, columns_V = table_VV.sum(axis=-1), table_VV.sum(axis=-2)
    expected_VV = rows_V[..., :, None] * columns_V[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (table_VV * distance_VV).sum(axis=(-2, -1)) / total
        chance = (expected_VV * distance_VV).sum(axis=(-2, -1)) / total**2
        return np.asarray(np.where(chance > 0, 1 - observed / chance, math.nan))


def krippendorff_alpha(units: Sequence[Sequence[Value | None]], level: Level = "nominal") -> float:
    """Krippendorff's α of any number of raters, with values missing or not: 1 − D_o / D_e.

    From the coincidences of values within units (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability",
    section E): o_ck = Σ_u (pairs c–k in u) / (m_u − 1), D_o = Σ o_ck δ²_ck / n, D_e = Σ n_c n_k δ²_ck / n(n − 1).

    Args:
        units: for each thing rated, its ratings; None is a missing one. Units with fewer than two tell nothing.
        level: of measurement. δ² is 1 for different nominal values; the squared difference of interval values; for
            ordinal ones it counts the ratings between two ranks; ratio divides by the sum.

    Returns:
        1 for full agreement, 0 for chance, below 0 for systematic disagreement; NaN where all ratings are one value.

    Raises:
        EvaluateError: no unit has two ratings, or values are no numbers where the level needs them.
    """
    found = [value for unit in units for value in unit if value is not None]
    values = value_order(found, numeric=level != "nominal")
    table_VV = np.zeros((len(values), len(values)))
    for unit in units:
        table_VV += coincidences(unit, values)
    if not table_VV.any():
        raise EvaluateError("alpha: no unit has two ratings, so nobody could agree")
    return float(alpha_of(table_VV, list(values), level))


def alpha_of(table_VV: Table, values: Sequence[Value], level: Level) -> Table:
    """α of a coincidence table, or of a stack of them (… × V × V); NaN where it is undefined."""
    counts_V = table_VV.sum(axis=-1)
    total = counts_V.sum(axis=-1)
    delta_VV = _squared_differences(counts_V, values, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (table_VV * delta_VV).sum(axis=(-2, -1)) / total
        pairs_VV = counts_V[..., :, None] * counts_V[..., None, :]
        expected = (pairs_VV * delta_VV).sum(axis=(-2, -1)) / (total * (total - 1))
        return np.asarray(np.where(expected > 0, 1 - observed / expected, math.nan))


def coincidences(unit: Sequence[Value | None], values: dict[Value, int]) -> Table:
    """One unit's part of the coincidence table (V × V): every ordered pair of its ratings, over (ratings − 1)."""
    table_VV = np.zeros((len(values), len(values)))
    given = [values[value] for value in unit if value is not None]
    if len(given) >= 2:
        counts_V = np.bincount(given, minlength=len(values)).astype(np.float64)
        table_VV = (np.outer(counts_V, counts_V) - np.diag(counts_V)) / (len(given) - 1)
    return table_VV


def value_order(found: Sequence[Value], *, numeric: bool = False) -> dict[Value, int]:
    """The place of each value: by size where all are numbers, else by name."""
    numbers = all(isinstance(value, int | float) for value in found)
    if numeric and not numbers:
        raise EvaluateError("agreement: this level of measurement needs numbers; map the values to numbers first")
    ordered = sorted(set(found), key=float if numbers else str)
    return {value: place for place, value in enumerate(ordered)}


def pair_agreement(units: Sequence[Sequence[Value | None]]) -> float:
    """The chance that two different raters of one unit agree: units weighted alike, those with one rating left out.

    Raises:
        EvaluateError: no unit has two ratings.
    """
    shares = [agreeing_pairs(unit) for unit in units]
    known = [agreeing / pairs for agreeing, pairs in shares if pairs]
    if not known:
        raise EvaluateError("agreement: no unit has two ratings, so nobody could agree")
    return sum(known) / len(known)


def agreeing_pairs(unit: Sequence[Value | None]) -> tuple[int, int]:
    """How many pairs of a unit's ratings agree, and how many pairs there are."""
    given = [value for value in unit if value is not None]
    pairs = len(given) * (len(given) - 1) // 2
    agreeing = sum(given.count(value) * (given.count(value) - 1) // 2 for value in set(given))
    return agreeing, pairs


def bootstrap_tables(
    tables: Sequence[Table],
    clusters: Sequence[Hashable],
    statistic: Callable[[Table], Table],
    *,
    seed: int,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """A statistic of summed tables with the percentile interval of resampled clusters.

    The tails are widened as for `bootstrap_mean` (Hesterberg 2014, arXiv 1411.5279, section 5.3). Resamples in which
    the statistic is undefined are left out; where that is more than a tenth of them, there is no interval.

    Args:
        tables: U tables of one shape.
        clusters: U names: units of one prompt belong together and are drawn together.
        statistic: from a stack of tables (R × shape) to R numbers.
        seed: of the resampling.
        confidence: of the interval.
        num_resamples: R.

    Raises:
        EvaluateError: fewer than two clusters, or the statistic is undefined on the data or on too many resamples.
    """
    if len(tables) != len(clusters) or not tables:
        raise EvaluateError(f"bootstrap: {len(tables)} tables but {len(clusters)} cluster names")
    sums: dict[Hashable, Table] = {}
    for table, name in zip(tables, clusters, strict=True):
        sums[name] = sums[name] + table if name in sums else table
    if len(sums) < 2:
        raise EvaluateError(f"bootstrap: {len(sums)} cluster says nothing about spread; at least 2 are needed")
    stacked = np.stack(list(sums.values())).astype(np.float64)
    flat_CK = stacked.reshape(len(stacked), -1)
    shape = stacked.shape[1:]
    value = float(statistic(flat_CK.sum(axis=0).reshape(1, *shape))[0])
    if not math.isfinite(value):
        raise EvaluateError("agreement: undefined, because all ratings are one and the same value")
    rng = np.random.default_rng(seed)
    num = len(flat_CK)
    found: list[Table] = []
    rows = max(1, _CHUNK // num)
    for start in range(0, num_resamples, rows):
        drawn_RC = rng.multinomial(num, np.full(num, 1 / num), size=min(rows, num_resamples - start))
        found.append(statistic((drawn_RC @ flat_CK).reshape(-1, *shape)))
    resampled = np.concatenate(found)
    kept = resampled[np.isfinite(resampled)]
    if len(kept) < 0.9 * num_resamples:
        raise EvaluateError(
            f"agreement: undefined on {num_resamples - len(kept)} of {num_resamples} resamples; too few data"
        )
    tail = NormalDist().cdf(-math.sqrt(num / (num - 1)) * t_value(confidence, num - 1))
    low, high = np.quantile(kept, [tail, 1 - tail])
    return Interval(
        value=value,
        low=float(low),
        high=float(high),
        n=num,
        method="clustered bootstrap",
        confidence=confidence,
    )


def _squared_differences(counts_V: Table, values: Sequence[Value], level: Level) -> Table:
    """δ² of every two values (… × V × V); the ordinal one depends on how often values were given."""
    size = len(values)
    if level == "nominal":
        return 1.0 - np.eye(size)
    numbers_V = np.array([float(value) for value in values])
    if level == "interval":
        return np.asarray(np.subtract.outer(numbers_V, numbers_V) ** 2)
    if level == "ratio":
        sums_VV = np.add.outer(numbers_V, numbers_V)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio_VV = (np.subtract.outer(numbers_V, numbers_V) / sums_VV) ** 2
        return np.asarray(np.where(sums_VV == 0, 0.0, ratio_VV))
    upto_V = np.cumsum(counts_V, axis=-1) - counts_V / 2  # ratings below a value, and half of its own
    return np.asarray((upto_V[..., :, None] - upto_V[..., None, :]) ** 2)
