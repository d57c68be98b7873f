"""Counts into statements: McNemar's exact test, pass@k, and how small a difference a suite can see."""

from __future__ import annotations

import math

from posttrain.core import EvaluateError
from posttrain.evaluate.quantiles import z_value


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact test, two-sided: could as uneven a split of the discordant tasks be a fair coin's?

    p = 2 · P(X ≤ min(wins, losses)) with X ~ Binomial(wins + losses, ½), at most 1. Tasks on which both models do the
    same tell nothing and do not enter.
    """
    if wins < 0 or losses < 0:
        raise EvaluateError(f"mcnemar: {wins} wins and {losses} losses are no counts")
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**n))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from c right of n.

    1 − C(n−c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise EvaluateError(f"pass_at_k: need 0 ≤ c ≤ n and 1 ≤ k ≤ n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def minimum_detectable_difference(n: int, discordance: float, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true difference in accuracy that n paired tasks show with the given power.

    δ = (z_{1−α/2} + z_power) √(discordance / n), from a paired difference's variance (arXiv 2411.00640, section 5).

    Args:
        n: tasks.
        discordance: fraction of tasks on which exactly one of the two models is right.
    """
    if n < 1 or not 0 <= discordance <= 1 or not 0.5 <= power < 1:
        raise EvaluateError(f"minimum_detectable_difference: n={n}, discordance={discordance}, power={power}")
    return (z_value(confidence) + z_value(2 * power - 1 or 1e-12)) * math.sqrt(discordance / n)


def tasks_needed(difference: float, discordance: float, *, power: float = 0.8, confidence: float = 0.95) -> int:
    """How many paired tasks show a true difference with the given power: the inverse of the function above."""
    if difference <= 0:
        raise EvaluateError(f"tasks_needed: the difference must be above 0, not {difference}")
    return math.ceil(
        (minimum_detectable_difference(1, discordance, power=power, confidence=confidence) / difference) ** 2
    )
