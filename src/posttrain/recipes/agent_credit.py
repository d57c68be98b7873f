"""Credit turn by turn: what each turn of an episode led to, against what its siblings' turns led to.

G siblings; K turns; T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from posttrain.core import Grade, UsageError
from posttrain.rollout import Rolled, per_turn, turn_rewards


def returns_to_go(rewards_K: Sequence[float], discount: float = 1.0) -> list[float]:
    """For each turn its reward and all later ones, each discounted by how many turns later it comes."""
    returns: list[float] = []
    ahead = 0.0
    for reward in reversed(rewards_K):
        ahead = reward + discount * ahead
        returns.append(ahead)
    return returns[::-1]


def turn_advantages(rewards_GK: Sequence[Sequence[float]], discount: float = 1.0) -> list[list[float]]:
    """For each sibling's turns: its return from there, minus the mean of the siblings' at the same turn.

    A turn that only one sibling came to has nobody to compare with: 0. With a single turn this is GRPO's advantage
    without the standard deviation. Turn-level credit: arXiv 2505.11821, section 4.

    Args:
        rewards_GK: rewards of each sibling's turns; siblings may have different numbers of turns.
        discount: of later rewards, per turn.
    """
    returns_GK = [returns_to_go(rewards_K, discount) for rewards_K in rewards_GK]
    longest = max(map(len, returns_GK), default=0)
    columns = [[returns[turn] for returns in returns_GK if turn < len(returns)] for turn in range(longest)]
    return [
        [value - fmean(columns[turn]) if len(columns[turn]) > 1 else 0.0 for turn, value in enumerate(returns_K)]
        for returns_K in returns_GK
    ]


def token_advantages(rolled: Sequence[Rolled], discount: float = 1.0) -> list[list[Sequence[float] | None]]:
    """By group and sibling, T advantages from the environment's rewards; None where rollout or grade failed.

    What the grade adds to the sum of the environment's rewards counts for the last turn.

    Raises:
        UsageError: an episode has no turn rewards.
    """
    found: list[list[Sequence[float] | None]] = []
    for group, grades in rolled:
        valid = [
            not t.failed() and grade.score is not None for t, grade in zip(group.trajectories, grades, strict=True)
        ]
        siblings = [
            pair for pair, good in zip(zip(group.trajectories, grades, strict=True), valid, strict=True) if good
        ]
        rewards = [_graded(turn_rewards(trajectory), grade) for trajectory, grade in siblings]
        values = iter(turn_advantages(rewards, discount))
        found.append(
            [
                per_turn(trajectory, next(values)) if good else None
                for trajectory, good in zip(group.trajectories, valid, strict=True)
            ]
        )
    return found


def _graded(rewards: list[float], grade: Grade) -> list[float]:
    if not rewards or grade.score is None:
        raise UsageError("credit by turns needs episodes of an environment, with a grade")
    rest = grade.score - sum(rewards)
    return [*rewards[:-1], rewards[-1] + rest]
