"""A step's groups one by one, as the sampler finishes them, so that grading begins before the step is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from posttrain.core import Grade, Grader, SampleTokens, Sampling, Task
from posttrain.grade import grade_all, grade_while, waits
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


async def graded_groups(
    sampler: SampleTokens,
    tasks: Sequence[Task],
    sampling: Sampling,
    grader: Grader,
    *,
    prompt_tokens: PromptTokens,
    seed: int,
    step: int = 0,
) -> tuple[list[Group], list[Grade]]:
    """The groups of a step, in the order of its tasks, and the grades of their trajectories, in the order of these.

    A grader that waits for others (`grade.waits`) grades each group while the rest of the step is sampled: give it a
    sampler with a thread of its own. The samples are the same either way.
    """
    if not waits(grader):
        groups = await run_groups(sampler, tasks, sampling, prompt_tokens=prompt_tokens, seed=seed, step=step)
        return groups, await grade_all(grader, [trajectory for group in groups for trajectory in group.trajectories])
    found: dict[str, tuple[Group, list[Grade]]] = {}  # by task: none comes twice in a step
    come = stream_groups(sampler, tasks, sampling, prompt_tokens=prompt_tokens, seed=seed, step=step)
    async for graded in grade_while(come, grader, lambda group: group.trajectories):
        found[graded.batch.task.id] = (graded.batch, graded.grades)
    ordered = [found[task.id] for task in tasks]
    return [group for group, _ in ordered], [grade for _, grades in ordered for grade in grades]
