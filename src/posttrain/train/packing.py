"""Which examples share a micro-batch: best fit, longest first, so that rows are full and the order is reproducible."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute examples over micro-batches of at most `budget` tokens, never splitting one.

    Best-fit decreasing: at most 11/9 of the optimal number of micro-batches, plus one. Depends only on the arguments.

    Args:
        sizes: tokens of each example.
        budget: tokens of a micro-batch. A larger example gets a micro-batch of its own.

    Returns:
        Micro-batches as lists of indices into `sizes`, longest example first; every index exactly once.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    batches: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, micro-batch), sorted
    for index in order:
        at = bisect.bisect_left(free, (sizes[index], -1))
        if at < len(free):
            left, batch = free.pop(at)
            batches[batch].append(index)
            bisect.insort(free, (left - sizes[index], batch))
        else:
            batches.append([index])
            bisect.insort(free, (budget - sizes[index], len(batches) - 1))
    return batches
