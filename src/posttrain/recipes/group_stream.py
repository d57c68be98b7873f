"""A step's groups one by one, as the sampler finishes them, so that grading begins before the step is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from posttrain.core import SampleTokens, Sampling, Task
from posttrain.rollout import Group, run_groups
from posttrain.rollout.single_turn import PromptTokens


async def stream_groups(
    sampler: SampleTokens,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    prompt_tokens: PromptTokens,
    seed: int,
    step: int = 0,
    deadline_s: float | None = None,
) -> AsyncIterator[Group]:
    """The groups that `run_groups` gives, each as soon as it is done; the same seeds, so the same samples.

    All tasks are given to the sampler at once. A sampler that computes in the thread that asks (`inline`) holds up the
    event loop, and with it the graders: give one with a thread of its own. Leaving the loop early cancels the rest.

    Args: as for `run_groups`.
    """

    async def one(task: Task) -> Group:
        (group,) = await run_groups(
            sampler, [task], sampling, prompt_tokens=prompt_tokens, seed=seed, step=step, deadline_s=deadline_s
        )
        return group

    asked = [asyncio.ensure_future(one(task)) for task in tasks]
    try:
        for done in asyncio.as_completed(asked):
            yield await done
    finally:
        for task in asked:
            task.cancel()
