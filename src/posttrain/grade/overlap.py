"""Grading while sampling goes on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from typing import Generic, TypeVar

import msgspec

from posttrain.core import Grade, Grader, Trajectory
from posttrain.grade.batch import GradingLimits

B = TypeVar("B")


def waits(grader: Grader) -> bool:
    """Whether a grader waits for somebody else (a judge, a server, people), so that sampling may go on meanwhile.

    A grader says so by `waits = True`; one made of graders waits where one of them does.
    """
    return bool(getattr(grader, "waits", False)) or any(waits(part) for part in getattr(grader, "graders", ()))


class Graded(msgspec.Struct, Generic[B], frozen=True, kw_only=True):
    """A batch and the grades of its trajectories, in order."""

    batch: B
    grades: list[Grade]


async def grade_while(
    batches: AsyncIterable[B],
    grader: Grader,
    trajectories: Callable[[B], Sequence[Trajectory]],
    *,
    deadline_s: float | None = None,
    concurrency: int = 32,
    ahead: int | None = None,
) -> AsyncIterator[Graded[B]]:
    """Grade each batch from the moment it comes, while the next ones are still being made.

    Batches are given out in the order in which they came. Grading never holds up the making of batches, unless `ahead`
    says so. Leaving the loop early cancels what is under way.

    Args:
        batches: groups as they are sampled, or whole steps.
        grader: as for `grade_all`; it must not block the event loop, and neither must what makes the batches.
        trajectories: of a batch.
        deadline_s: seconds for each grade; None: the grader's own.
        concurrency: grades under way at the same time, at most, over all batches.
        ahead: how many further batches are taken before the oldest one is waited for. None: all of them are, and
            what is graded by then is given out whenever one comes. With a number, batch k comes out when batch
            k + `ahead` has been made: steps are sampled so many steps ahead of training, and no further.
    """
    limits = GradingLimits(grader, deadline_s=deadline_s, concurrency=concurrency)
    waiting: deque[tuple[B, asyncio.Task[list[Grade]]]] = deque()
    try:
        async for batch in batches:
            waiting.append((batch, asyncio.ensure_future(limits.grade(trajectories(batch)))))
            while waiting and (
                (ahead is not None and len(waiting) > ahead) or (ahead is None and waiting[0][1].done())
            ):
                done, grading = waiting.popleft()
                yield Graded(batch=done, grades=await grading)
        while waiting:
            done, grading = waiting.popleft()
            yield Graded(batch=done, grades=await grading)
    finally:
        for _, grading in waiting:
            grading.cancel()
