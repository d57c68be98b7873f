"""Episodes of one turn: a prompt, and what the policy writes after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from posttrain.core import (
    Completion,
    Message,
    PosttrainError,
    SampleRequest,
    SampleTokens,
    Sampling,
    StopReason,
    Task,
    Trajectory,
    UsageError,
    derive_seed,
)
from posttrain.rollout.group import Group

PromptTokens = Callable[[Task], Sequence[int]]


class SingleTurn:
    """`run_groups` with its settings bound: tasks and a step in, groups out.

    Args:
        sampler: where completions come from.
        sampling: how to sample; `n` siblings for each task; its `seed` is replaced.
        prompt_tokens: from a task to the exact tokens of its prompt.
        seed: the run's seed.
        concurrency: tasks being sampled at the same time; None gives the sampler all of them at once.
        deadline_s: seconds for each task's siblings; None waits for ever.
    """

    def __init__(
        self,
        sampler: SampleTokens,
        sampling: Sampling,
        *,
        prompt_tokens: PromptTokens,
        seed: int,
        concurrency: int | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self.sampler = sampler
        self.sampling = sampling
        self.prompt_tokens = prompt_tokens
        self.seed = seed
        self.concurrency = concurrency
        self.deadline_s = deadline_s

    async def run(self, tasks: Sequence[Task], *, step: int = 0) -> list[Group]:
        """The groups of one step."""
        return await run_groups(
            self.sampler,
            tasks,
            self.sampling,
            prompt_tokens=self.prompt_tokens,
            seed=self.seed,
            step=step,
            concurrency=self.concurrency,
            deadline_s=self.deadline_s,
        )


async def run_groups(
    sampler: SampleTokens,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    prompt_tokens: PromptTokens,
    seed: int,
    step: int = 0,
    concurrency: int | None = None,
    deadline_s: float | None = None,
) -> list[Group]:
    """Sample `sampling.n` trajectories for each task.

    The seed of each group derives from `seed`, `step` and the task's id alone, so a step gives the same samples
    whatever ran before it and in whatever order. Tokens, logprobs and weight versions are the sampler's, unchanged. A
    prompt that cannot be made, a sampler that raises or answers nonsense, and a deadline that passes give failed
    trajectories in their places, with `error`; only misuse (UsageError) is raised.

    Args:
        sampler: where completions come from.
        tasks: what to do; their ids differ.
        sampling: how to sample; its `seed` is replaced.
        prompt_tokens: from a task to the exact tokens of its prompt.
        seed: the run's seed.
        step: the training step.
        concurrency: tasks being sampled at the same time, one call of the sampler each; None gives the sampler all
            tasks in a single call, or one call each, all at once, where there is a deadline.
        deadline_s: seconds for each task's siblings; None waits for ever.

    Returns:
        A group for each task, in order; trajectory ids are `<task id>/<step>/<index>`.

    Raises:
        UsageError: two tasks of one id, or settings out of range.
    """
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise UsageError(f"rollout: task id {twice!r} comes twice in one step; its samples would be the same")
    if (concurrency is not None and concurrency < 1) or (deadline_s is not None and deadline_s <= 0):
        raise UsageError(f"rollout: concurrency and deadline_s must be above 0, not {concurrency} and {deadline_s}")
    prompts = [_prompt(task, prompt_tokens) for task in tasks]
    asked = [
        (task, SampleRequest(prompt=prompt, id=f"{task.id}/{step}", sampling=_seeded(sampling, seed, step, task)))
        for task, prompt in zip(tasks, prompts, strict=True)
        if not isinstance(prompt, str)
    ]
    whole = concurrency is None and deadline_s is None
    batches = ([asked] if asked else []) if whole else [[one] for one in asked]
    places = asyncio.Semaphore(concurrency or max(1, len(asked)))
    sampled = await asyncio.gather(*(_sample(sampler, batch, step, places, deadline_s) for batch in batches))
    groups = {group.task.id: group for batch in sampled for group in batch}
    for task, prompt in zip(tasks, prompts, strict=True):
        if isinstance(prompt, str):
            groups[task.id] = _failed_group(task, (), sampling.n, step, prompt, StopReason.ERROR, 0.0)
    return [groups[task.id] for task in tasks]


def _prompt(task: Task, prompt_tokens: PromptTokens) -> tuple[int, ...] | str:
    """The prompt's tokens, or why there are none."""
    try:
        prompt = tuple(prompt_tokens(task))
    except UsageError:
        raise
    except PosttrainError as error:
        return f"prompt: {type(error).__name__}: {error}"
    return prompt or "prompt: it has no tokens"


def _seeded(sampling: Sampling, seed: int, step: int, task: Task) -> Sampling:
    return sampling.replace(seed=derive_seed(seed, "rollout", step, task.id))


async def _sample(
    sampler: SampleTokens,
    batch: Sequence[tuple[Task, SampleRequest]],
    step: int,
    places: asyncio.Semaphore,
    deadline_s: float | None,
) -> list[Group]:
    """The groups of one call of the sampler."""
    async with places:
        started_s = time.perf_counter()
        requests = [request for _, request in batch]
        work = asyncio.ensure_future(sampler.sample(requests))
        # asyncio.wait, not wait_for: a sampler that ignores its cancellation must not hold up the others.
        try:
            await asyncio.wait({work}, timeout=deadline_s)
        finally:
            if not work.done():
                work.cancel()
        seconds = time.perf_counter() - started_s

    def failed(error: str, reason: StopReason = StopReason.ERROR) -> list[Group]:
        return [_failed_group(task, r.prompt, r.sampling.n, step, error, reason, seconds) for task, r in batch]

    if not work.done():
        return failed(f"no completions within {deadline_s:g} s", StopReason.TIMEOUT)
    if work.cancelled():
        return failed("the sampler was cancelled", StopReason.CANCELLED)
    error = work.exception()
    if isinstance(error, UsageError):
        raise error
    if error is not None:
        return failed(f"sampler: {type(error).__name__}: {error}"[:500])
    completions = work.result()
    if len(completions) != len(requests):
        return failed(f"sampler: {len(requests)} requests, {len(completions)} results")
    return [
        _group(task, request, siblings, step, seconds)
        for (task, request), siblings in zip(batch, completions, strict=True)
    ]


def _group(task: Task, request: SampleRequest, siblings: Sequence[Completion], step: int, seconds: float) -> Group:
    n = request.sampling.n
    trajectories = [
        _trajectory(task, request.prompt, completion, step, index, seconds)
        for index, completion in enumerate(siblings[:n])
    ]
    for index in range(len(trajectories), n):
        error = f"sampler: {len(siblings)} completions where {n} were asked for"
        trajectories.append(_failure(task, request.prompt, step, index, error, StopReason.ERROR, seconds))
    return Group(task=task, trajectories=tuple(trajectories))


def _trajectory(
    task: Task, prompt: tuple[int, ...], completion: Completion, step: int, index: int, seconds: float
) -> Trajectory:
    """One completion after its prompt, token for token."""
    num_new = len(completion.tokens)
    if not num_new == len(completion.logprobs) == len(completion.policy_logprobs):
        error = (
            f"sampler: {num_new} tokens with {len(completion.logprobs)} logprobs and "
            f"{len(completion.policy_logprobs)} policy logprobs"
        )
        return _failure(task, prompt, step, index, error, StopReason.ERROR, seconds)
    failed = completion.stop_reason in (StopReason.ERROR, StopReason.TIMEOUT, StopReason.CANCELLED)
    zeros = (0.0,) * len(prompt)
    view = () if isinstance(task.prompt, str) else (*task.prompt, Message(role="assistant", content=completion.text))
    return Trajectory(
        id=f"{task.id}/{step}/{index}",
        task=task,
        tokens=prompt + completion.tokens,
        mask=(False,) * len(prompt) + (True,) * num_new,
        logprobs=zeros + completion.logprobs,
        policy_logprobs=zeros + completion.policy_logprobs,
        text=completion.text,
        stop_reason=completion.stop_reason,
        messages=view,
        group=f"{task.id}/{step}",
        index=index,
        weight_version=completion.weight_version,
        last_weight_version=completion.last_weight_version,
        seconds=seconds,
        error=(completion.error or f"sampler: {completion.stop_reason.value}, no reason given") if failed else None,
    )


def _failed_group(
    task: Task, prompt: tuple[int, ...], n: int, step: int, error: str, reason: StopReason, seconds: float
) -> Group:
    siblings = tuple(_failure(task, prompt, step, index, error, reason, seconds) for index in range(n))
    return Group(task=task, trajectories=siblings)


def _failure(
    task: Task, prompt: tuple[int, ...], step: int, index: int, error: str, reason: StopReason, seconds: float
) -> Trajectory:
    """A trajectory of which only the prompt and the reason are known."""
    zeros = (0.0,) * len(prompt)
    return Trajectory(
        id=f"{task.id}/{step}/{index}",
        task=task,
        tokens=prompt,
        mask=(False,) * len(prompt),
        logprobs=zeros,
        policy_logprobs=zeros,
        text="",
        stop_reason=reason,
        group=f"{task.id}/{step}",
        index=index,
        seconds=seconds,
        error=error,
    )
