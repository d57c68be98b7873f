"""Dynamic sampling: groups from which nothing can be learned are replaced by others, until the batch is full.

    filled = await fill_batch(source.draw, roll, has_variance, num_groups=16, max_rounds=4)

DAPO, https://arxiv.org/abs/2503.14476, section 3.2: a group whose answers are all right or all wrong has no advantage,
and leaves a smaller, noisier batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from posttrain.core import ConfigError, Grade
from posttrain.rollout.curriculum import Draw
from posttrain.rollout.group import Group


class Rolled(NamedTuple):
    """A group and its siblings' grades, in order."""

    group: Group
    grades: Sequence[Grade]


class Filled(NamedTuple):
    """What was sampled for one step."""

    kept: list[Rolled]  # at most as many as were asked for, in the order in which they were drawn
    dropped: list[Rolled]
    draws: list[Draw]

    @property
    def sampled(self) -> list[Rolled]:
        """All that was sampled, kept or not: what metrics and costs speak of."""
        return [*self.kept, *self.dropped]

    def metrics(self) -> dict[str, float]:
        """`resampling/rounds`, and counts of groups: `resampling/kept` and `resampling/dropped`."""
        return {
            "resampling/rounds": float(len(self.draws)),
            "resampling/kept": float(len(self.kept)),
            "resampling/dropped": float(len(self.dropped)),
        }


async def fill_batch(
    draw: Callable[[int], Draw],
    roll: Callable[[Draw], Awaitable[Sequence[Rolled]]],
    keep: Callable[[Sequence[Grade]], bool],
    *,
    num_groups: int,
    max_rounds: int,
) -> Filled:
    """Draw, sample and grade until `num_groups` groups are worth keeping, in at most `max_rounds` rounds.

    A round asks for exactly as many tasks as are missing, so no kept group is thrown away; a draw may give fewer (at
    the end of an epoch). The outcome depends on the draws and the samples alone.

    Args:
        draw: gives tasks.
        roll: samples and grades them.
        keep: whether a group is worth training on, from its grades.
        num_groups: P, groups of a full batch.
        max_rounds: at least 1; 1 samples once and does not replace.

    Returns:
        Perhaps fewer groups than were asked for, perhaps none.

    Raises:
        ConfigError: a number is below 1.
    """
    if num_groups < 1 or max_rounds < 1:
        raise ConfigError(f"fill_batch: num_groups and max_rounds must be at least 1, not {num_groups}, {max_rounds}")
    filled = Filled([], [], [])
    while len(filled.kept) < num_groups and len(filled.draws) < max_rounds:
        drawn = draw(num_groups - len(filled.kept))
        filled.draws.append(drawn)
        for rolled in await roll(drawn):
            (filled.kept if keep(rolled.grades) else filled.dropped).append(rolled)
    return filled


def has_variance(grades: Sequence[Grade]) -> bool:
    """True where at least two siblings were graded and their scores are not all equal."""
    scores = [grade.score for grade in grades if grade.score is not None]
    return len(scores) > 1 and max(scores) - min(scores) > 1e-8


def pass_rate(grades: Sequence[Grade], *, full_marks: float = 1.0) -> float | None:
    """Mean score over full marks, within [0, 1], of the siblings that were graded; None where none was."""
    scores = [min(1.0, max(0.0, grade.score / full_marks)) for grade in grades if grade.score is not None]
    return sum(scores) / len(scores) if scores else None
