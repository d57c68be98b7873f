"""Many episodes at once over one sampler: groups of siblings, as `run_groups` gives them for single turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from statistics import fmean
from typing import Any

from posttrain.core import Completion, SampleRequest, SampleTokens, Sampling, StopReason, Task, UsageError
from posttrain.rollout.environment import EnvironmentFactory, EpisodeLimits
from posttrain.rollout.episode import Episode, EpisodeSettings
from posttrain.rollout.group import Group
from posttrain.rollout.lockstep import Lockstep
from posttrain.rollout.turn_tokens import TurnTokens


async def run_episodes(
    sampler: SampleTokens,
    tasks: Sequence[Task],
    environment_factory: EnvironmentFactory,
    sampling: Sampling,
    *,
    turns: TurnTokens,
    seed: int,
    step: int = 0,
    limits: EpisodeLimits | None = None,
    concurrency: int | None = None,
    lockstep: bool = False,
) -> list[Group]:
    """Run `sampling.n` episodes of each task, every one in an environment of its own.

    Tokens, logprobs and weight versions are the sampler's, unchanged, in one sequence for each episode: the opening,
    then in turn what the policy wrote (mask True) and what answered it (mask False). Seeds of turns derive from `seed`,
    `step`, the task's id, the sibling and the turn. Siblings whose openings are the same share the prefill of their
    first turn; with `LocalEngine(prefix_tokens=…)` every later turn reads only what is new.

    An environment that raises, a template that refuses, a sampler that fails and a deadline that passes give failed
    trajectories in their places, with `error`; only misuse (UsageError) is raised. A turn whose tool calls cannot be
    read is answered with the reason, as a user's message.

    Each trajectory's `metrics` have `reward` (the sum), `turn/<i>/reward`, `turns`, `tools/malformed`,
    `clipped_turns` and `clipped_tokens` where a limit cut it off, and the sums of the numbers in the steps' `info`.

    Args:
        sampler: where completions come from; a `Lockstep` is taken as it is.
        tasks: what to do; their ids differ.
        environment_factory: makes the environment of one episode.
        sampling: how to sample: `max_tokens` for each turn, `n` siblings; its `seed` is replaced.
        turns: the chat template.
        seed: the run's seed.
        step: the training step.
        limits: where an episode is cut off; None: the defaults.
        concurrency: tasks under way at the same time; None: all.
        lockstep: give the sampler the turns of all episodes together: for samplers that compute in the caller's
            thread, and for runs that shall repeat exactly.

    Returns:
        A group for each task, in order; trajectory ids are `<task id>/<step>/<index>`.

    Raises:
        UsageError: two tasks of one id, or settings out of range.
    """
    limits = limits or EpisodeLimits()
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise UsageError(f"rollout: task id {twice!r} comes twice in one step; its samples would be the same")
    if (concurrency is not None and concurrency < 1) or (limits.seconds is not None and limits.seconds <= 0):
        raise UsageError(f"rollout: concurrency and seconds must be above 0, not {concurrency} and {limits.seconds}")
    if lockstep and not isinstance(sampler, Lockstep):
        sampler = Lockstep(sampler)
    settings = EpisodeSettings(
        sampler=sampler,
        factory=environment_factory,
        turns=turns,
        sampling=sampling,
        limits=limits,
        seed=seed,
        step=step,
    )
    waiting = deque(tasks)
    groups: dict[str, Group] = {}
    num_workers = min(concurrency or len(tasks), len(tasks))
    await _all(_work_off(settings, waiting, groups) for _ in range(num_workers))
    return [groups[task.id] for task in tasks]


async def _work_off(settings: EpisodeSettings, waiting: deque[Task], groups: dict[str, Group]) -> None:
    """Groups one after another. A `Lockstep` waits for this worker, or else for its episodes, without a gap."""
    parties = _Parties(settings.sampler)
    parties.join(1)
    try:
        while waiting:
            task = waiting.popleft()
            groups[task.id] = await _run_group(settings, task, parties)
    finally:
        parties.leave(parties.count)


async def _run_group(settings: EpisodeSettings, task: Task, parties: _Parties) -> Group:
    """All siblings of one task."""
    episodes = [Episode(settings, task, index) for index in range(settings.sampling.n)]
    async with AsyncExitStack() as cleanup:
        for episode in episodes:
            cleanup.push_async_callback(episode.close)
        parties.join(len(episodes) - 1)
        await _all(_counted(episode.open(), parties) for episode in episodes)
        first = await _first_turns(settings, [episode for episode in episodes if episode.going])
        parties.join(max(0, len(first) - 1))
        await _all(_counted(_play(episode, completion), parties) for episode, completion in first)
    return Group(task=task, trajectories=tuple(episode.trajectory() for episode in episodes))


async def play_together(episodes: Sequence[Episode], sampler: SampleTokens | None) -> None:
    """Episodes that depend on one another, each from its opening to its end, all at the same time.

    Args:
        episodes: with settings of their own; their environments may wait for each other (`parked`).
        sampler: a `Lockstep` that they share, or anything else.
    """
    parties = _Parties(sampler)
    parties.join(len(episodes))

    async def play(episode: Episode) -> None:
        try:
            await episode.open()
            for _, completion in await _first_turns(episode.settings, [episode] if episode.going else []):
                await episode.play(completion)
            await episode.close()
        finally:
            parties.leave(1)

    await _all(play(episode) for episode in episodes)


async def _counted(part: Coroutine[Any, Any, None], parties: _Parties) -> None:
    """Do one episode's part; then the others need not wait for it. The last one's place is the group's."""
    try:
        await part
    finally:
        if parties.count > 1:
            parties.leave(1)


async def _play(episode: Episode, completion: Completion) -> None:
    await episode.play(completion)
    await episode.close()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it; where one part raises, withdraw the others and raise that."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Parties:
    """The episodes for whose turns a `Lockstep` waits; nothing for other samplers."""

    def __init__(self, sampler: SampleTokens | None) -> None:
        self._lockstep = sampler if isinstance(sampler, Lockstep) else None
        self.count = 0

    def join(self, count: int) -> None:
        self.count += count
        if self._lockstep is not None:
            self._lockstep.join(count)

    def leave(self, count: int) -> None:
        self.count -= count
        if self._lockstep is not None:
            self._lockstep.leave(count)


async def _first_turns(settings: EpisodeSettings, episodes: Sequence[Episode]) -> list[tuple[Episode, Completion]]:
    """The first completion of each sibling; those with the same opening are siblings of one request."""
    shared: dict[tuple[int, ...], list[Episode]] = {}
    for episode in episodes:
        shared.setdefault(tuple(episode.tokens), []).append(episode)
    if not shared:
        return []
    sets = list(shared.values())
    requests = [settings.request(some[0], len(some), some[0].index, 0) for some in sets]
    sampled = await _sample(settings, requests, episodes)
    if sampled is None:
        return []
    first: list[tuple[Episode, Completion]] = []
    for some, request, completions in zip(sets, requests, sampled, strict=True):
        first.extend(zip(some, completions, strict=False))
        for episode in some[len(completions) :]:
            error = f"sampler: {len(completions)} completions where {request.sampling.n} were asked for"
            episode.fail(StopReason.ERROR, error)
    return first


async def _sample(
    settings: EpisodeSettings, requests: Sequence[SampleRequest], episodes: Sequence[Episode]
) -> list[list[Completion]] | None:
    """The sampler's answer, or None where it has none: then the episodes have failed."""
    left = [episode.remaining_s() for episode in episodes]
    clock = asyncio.timeout(min((each for each in left if each is not None), default=None))
    reason, error = StopReason.ERROR, ""
    try:
        async with clock:
            sampled = await settings.sampler.sample(requests)
        if len(sampled) == len(requests):
            return sampled
        error = f"sampler: {len(requests)} requests, {len(sampled)} results"
    except UsageError:
        raise
    except TimeoutError as caught:
        reason = StopReason.TIMEOUT if clock.expired() else StopReason.ERROR
        error = f"the episode was not over after {settings.limits.seconds} s" if clock.expired() else f"{caught!r}"
    except Exception as caught:  # noqa: BLE001  a sampler that fails is these episodes' failure
        error = f"sampler: {type(caught).__name__}: {caught}"
    for episode in episodes:
        episode.fail(reason, error)
    return None


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of a step's episodes, besides `rollout_metrics`.

    Returns:
        `episodes/{mean,max}_turns`; `episodes/clipped_ratio`: share that a limit cut off; `episodes/read_tokens`: mean
        tokens that the policy did not write; `tools/call_frequency`: calls per episode; `tools/failure_frequency`:
        share of calls that failed; `tools/malformed_frequency`: turns with unreadable calls per episode; and the mean
        of every other count of the environments, by its name. Failed trajectories are left out.
    """
    finished = [t for group in groups for t in group.trajectories if not t.failed()]
    if not finished:
        return {}

    def mean(name: str) -> float:
        return fmean(t.metrics.get(name, 0.0) for t in finished)

    calls = sum(t.metrics.get("tools/calls", 0.0) for t in finished)
    failures = sum(t.metrics.get("tools/failures", 0.0) for t in finished)
    known = {"reward", "turns", "clipped_turns", "clipped_tokens", "tools/calls", "tools/failures", "tools/malformed"}
    names = {name for t in finished for name in t.metrics} - known
    return {
        "episodes/mean_turns": mean("turns"),
        "episodes/max_turns": max(t.metrics.get("turns", 0.0) for t in finished),
        "episodes/clipped_ratio": fmean(float(t.stop_reason is StopReason.LENGTH) for t in finished),
        "episodes/read_tokens": fmean(len(t.tokens) - t.num_completion_tokens() for t in finished),
        "tools/call_frequency": calls / len(finished),
        "tools/failure_frequency": failures / calls if calls else 0.0,
        "tools/malformed_frequency": mean("tools/malformed"),
        **{f"environment/{name}": mean(name) for name in sorted(names) if not name.startswith("turn/")},
    }
