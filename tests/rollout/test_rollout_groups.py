from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest

from posttrain.core import (
    Completion,
    ConfigError,
    EngineError,
    Message,
    RenderError,
    RolloutError,
    SampleRequest,
    Sampling,
    StopReason,
    Task,
    UsageError,
    derive_seed,
    user,
)
from posttrain.rollout import Group, SingleTurn, check_failures, run_groups


def _completion(tokens: Sequence[int], **changes: object) -> Completion:
    values = {
        "tokens": tuple(tokens),
        "logprobs": tuple(-0.5 - 0.125 * token for token in tokens),
        "policy_logprobs": tuple(-0.25 - 0.125 * token for token in tokens),
        "text": " ".join(map(str, tokens)),
        "stop_reason": StopReason.EOS,
        "weight_version": 3,
        "last_weight_version": 4,
        **changes,
    }
    return Completion(**values)  # type: ignore[arg-type]


class Seeded:
    """Answers from the request's seed alone, as the protocol demands; keeps what it was asked."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.calls: list[list[SampleRequest]] = []
        self.delay_s = delay_s
        self.running = self.peak = 0

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        self.calls.append(list(requests))
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(self.delay_s)
        self.running -= 1
        return [
            [
                _completion([derive_seed(request.sampling.seed or 0, index) % 1000, 2], index=index)
                for index in range(request.sampling.n)
            ]
            for request in requests
        ]


class Odd:
    """A sampler made of one function."""

    def __init__(self, sample: Callable[[Sequence[SampleRequest]], list[list[Completion]]]) -> None:
        self._sample = sample

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        return self._sample(requests)


def _tasks(*ids: str) -> list[Task]:
    return [Task(id=id, prompt=f"prompt {id}") for id in ids]


def _prompt(task: Task) -> tuple[int, ...]:
    return tuple(task.prompt_text().encode())


SAMPLING = Sampling(n=2, max_tokens=5)


def _run(sampler: object, tasks: Sequence[Task], **settings: object) -> list[Group]:
    values = {"prompt_tokens": _prompt, "seed": 7, **settings}
    return asyncio.run(run_groups(sampler, tasks, SAMPLING, **values))  # type: ignore[arg-type]


def test_a_trajectory_is_the_completion_token_for_token() -> None:
    sampler = Odd(lambda requests: [[_completion([11, 12]), _completion([13], stop_reason=StopReason.LENGTH)]])
    (group,) = _run(sampler, _tasks("a"), prompt_tokens=lambda task: [5, 6, 7], step=9)
    first, second = group.trajectories
    assert first.tokens == (5, 6, 7, 11, 12)
    assert first.mask == (False, False, False, True, True)
    assert first.logprobs == (0.0, 0.0, 0.0, -1.875, -2.0)
    assert first.policy_logprobs == (0.0, 0.0, 0.0, -1.625, -1.75)
    assert (first.text, first.stop_reason, first.error) == ("11 12", StopReason.EOS, None)
    assert (first.weight_version, first.last_weight_version) == (3, 4)
    assert (first.id, second.id, first.group, second.index) == ("a/9/0", "a/9/1", "a/9", 1)
    assert second.stop_reason is StopReason.LENGTH
    assert not second.failed()
    assert group.id == "a/9"
    assert first.messages == ()


def test_a_conversation_is_kept_as_a_view() -> None:
    sampler = Odd(lambda requests: [[_completion([1]), _completion([2])]])
    (group,) = _run(sampler, [Task(id="a", prompt=(user("hi"),))])
    assert group.trajectories[1].messages == (user("hi"), Message(role="assistant", content="2"))


def test_samples_depend_on_seed_step_and_task_alone() -> None:
    def tokens(groups: list[Group]) -> dict[str, list[tuple[int, ...]]]:
        return {group.task.id: [t.tokens for t in group.trajectories] for group in groups}

    whole = tokens(_run(Seeded(), _tasks("a", "b", "c"), step=4))
    for settings in ({}, {"concurrency": 1}, {"deadline_s": 30.0}):
        assert tokens(_run(Seeded(), _tasks("c", "a"), step=4, **settings)) == {"c": whole["c"], "a": whole["a"]}
    assert tokens(_run(Seeded(), _tasks("a"), step=5))["a"] != whole["a"]
    assert tokens(_run(Seeded(), _tasks("a"), step=4, seed=8))["a"] != whole["a"]
    assert len({sample for samples in whole.values() for sample in samples}) == 6  # all differ


def test_one_call_for_all_or_one_each_within_the_concurrency() -> None:
    sampler = Seeded()
    _run(sampler, _tasks("a", "b", "c"))
    assert [[request.id for request in call] for call in sampler.calls] == [["a/0", "b/0", "c/0"]]
    assert sampler.calls[0][0].sampling.seed == derive_seed(7, "rollout", 0, "a")
    sampler = Seeded(delay_s=0.01)
    groups = _run(sampler, _tasks(*"abcdef"), concurrency=2)
    assert [len(call) for call in sampler.calls] == [1] * 6
    assert sampler.peak == 2
    assert [group.task.id for group in groups] == list("abcdef")
    assert _run(Seeded(), []) == []


def test_single_turn_is_run_groups_with_settings() -> None:
    episodes = SingleTurn(Seeded(), SAMPLING, prompt_tokens=_prompt, seed=7)
    once = asyncio.run(episodes.run(_tasks("a"), step=2))
    again = _run(Seeded(), _tasks("a"), step=2)
    assert [t.tokens for t in once[0].trajectories] == [t.tokens for t in again[0].trajectories]


def test_a_deadline_fails_the_slow_and_spares_the_quick() -> None:
    class Slow(Seeded):
        async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            if requests[0].id.startswith("slow"):
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    await asyncio.sleep(0.3)  # takes its time to stop
            return await super().sample(requests)

    started_s = time.perf_counter()
    quick, slow = _run(Slow(), _tasks("quick", "slow"), deadline_s=0.2)
    assert time.perf_counter() - started_s < 5
    assert not any(t.failed() for t in quick.trajectories)
    assert [t.stop_reason for t in slow.trajectories] == [StopReason.TIMEOUT] * 2
    assert [t.id for t in slow.trajectories] == ["slow/0/0", "slow/0/1"]
    assert slow.trajectories[0].error == "no completions within 0.2 s"
    assert slow.trajectories[0].tokens == _prompt(slow.task)
    assert slow.trajectories[0].num_completion_tokens() == 0


def test_a_sampler_that_raises_is_data() -> None:
    def sample(requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        if requests[0].id == "b/0":
            raise EngineError("cache is full")
        return [[_completion([1]), _completion([2])] for _ in requests]

    good, bad = _run(Odd(sample), _tasks("a", "b"), concurrency=1)
    assert not any(t.failed() for t in good.trajectories)
    assert {t.error for t in bad.trajectories} == {"sampler: EngineError: cache is full"}
    everything = _run(Odd(sample), _tasks("b", "a"))
    assert all(t.failed() for group in everything for t in group.trajectories)


def test_misuse_of_the_sampler_is_raised() -> None:
    def refuse(requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        raise ConfigError("top_logprobs is not supported")

    with pytest.raises(ConfigError, match="top_logprobs"):
        _run(Odd(refuse), _tasks("a"))


@pytest.mark.parametrize(
    ("completions", "errors"),
    [
        ([], ["1 requests, 0 results"] * 2),
        ([[]], ["0 completions where 2 were asked for"] * 2),
        ([[_completion([1])]], [None, "1 completions where 2"]),
        ([[_completion([1]), _completion([2], logprobs=())]], [None, "1 tokens with 0 logprobs"]),
        ([[_completion([1]), _completion([2], policy_logprobs=(0.0, 0.0))]], [None, "and 2 policy logprobs"]),
        ([[_completion([1]), _completion([2], stop_reason=StopReason.ERROR, error="lost")]], [None, "lost"]),
        ([[_completion([1]), _completion([], stop_reason=StopReason.CANCELLED)]], [None, "cancelled, no reason"]),
    ],
)
def test_nonsense_from_the_sampler_is_data(completions: list[list[Completion]], errors: list[str | None]) -> None:
    (group,) = _run(Odd(lambda requests: completions), _tasks("a"))
    assert len(group.trajectories) == 2
    for trajectory, error in zip(group.trajectories, errors, strict=True):
        assert trajectory.failed() == (error is not None)
        assert (error or "") in (trajectory.error or "")
        lengths = {len(column) for column in (trajectory.tokens, trajectory.mask, trajectory.logprobs)}
        assert lengths == {len(trajectory.policy_logprobs)}


def test_a_prompt_that_cannot_be_made_is_data() -> None:
    def prompt(task: Task) -> tuple[int, ...]:
        if task.id == "bad":
            raise RenderError("no such role")
        return () if task.id == "empty" else (1,)

    sampler = Seeded()
    bad, good, empty = _run(sampler, _tasks("bad", "good", "empty"), prompt_tokens=prompt)
    assert bad.trajectories[0].error == "prompt: RenderError: no such role"
    assert empty.trajectories[1].error == "prompt: it has no tokens"
    assert not any(t.failed() for t in good.trajectories)
    assert [request.id for call in sampler.calls for request in call] == ["good/0"]


def test_misuse_is_raised() -> None:
    with pytest.raises(UsageError, match="'a' comes twice"):
        _run(Seeded(), _tasks("a", "b", "a"))
    for settings in ({"concurrency": 0}, {"deadline_s": 0.0}):
        with pytest.raises(UsageError, match="above 0"):
            _run(Seeded(), _tasks("a"), **settings)


def test_a_withdrawn_rollout_withdraws_the_sampler() -> None:
    cancelled: list[str] = []

    class Endless:
        async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(requests[0].id)
                raise
            return []

    async def withdraw() -> None:
        work = asyncio.create_task(run_groups(Endless(), _tasks("a"), SAMPLING, prompt_tokens=_prompt, seed=0))
        await asyncio.sleep(0.05)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(withdraw())
    assert cancelled == ["a/0"]


def test_groups_survive_the_disk() -> None:
    (group,) = _run(Seeded(), _tasks("a"))
    assert Group.from_json(group.to_json()) == group


@pytest.mark.parametrize(
    ("bad", "of", "stops"), [(0, 8, False), (1, 8, False), (2, 8, True), (5, 100, False), (6, 100, True), (1, 1, True)]
)
def test_too_many_failures_stop_the_run(bad: int, of: int, stops: bool) -> None:
    def sample(requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        failed = [_completion([], stop_reason=StopReason.ERROR, error="lost") for _ in range(bad)]
        return [[*failed, *[_completion([1]) for _ in range(of - bad)]]]

    groups = asyncio.run(run_groups(Odd(sample), _tasks("a"), Sampling(n=of), prompt_tokens=_prompt, seed=0))
    if stops:
        with pytest.raises(RolloutError, match=rf"{bad} of {of} rollouts failed .*\n  {bad} × lost"):
            check_failures(groups)
    else:
        check_failures(groups)
