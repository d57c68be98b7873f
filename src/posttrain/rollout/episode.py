"""One episode: the policy's turns and what the environment answers, as one growing list of tokens."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.core import (
    Completion,
    Environment,
    Message,
    PosttrainError,
    SampleRequest,
    SampleTokens,
    Sampling,
    StopReason,
    Task,
    ToolSpec,
    Trajectory,
    UsageError,
    derive_seed,
    user,
)
from posttrain.rollout.environment import EnvironmentFactory, EpisodeLimits, OffersTools, TakesSeed
from posttrain.rollout.turn_tokens import TurnTokens

_FAILED = (StopReason.ERROR, StopReason.TIMEOUT, StopReason.CANCELLED)
_CLOSE_S = 10.0  # an environment that does not close holds up nobody for longer


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """What the episodes of one call have in common."""

    sampler: SampleTokens
    factory: EnvironmentFactory
    turns: TurnTokens
    sampling: Sampling
    limits: EpisodeLimits
    seed: int
    step: int

    def request(self, episode: Episode, count: int, *names: int) -> SampleRequest:
        """The request for an episode's next turn; its seed derives from the names of the turn alone."""
        room = self.limits.max_tokens - len(episode.tokens)
        seed = derive_seed(self.seed, "episode", self.step, episode.task.id, *names)
        changes = {"max_tokens": min(self.sampling.max_tokens, room), "n": count, "seed": seed}
        stops = tuple(sorted({*self.sampling.stop_tokens, *self.turns.stop_tokens}))
        sampling = self.sampling.replace(stop_tokens=stops, **changes)
        return SampleRequest(
            prompt=tuple(episode.tokens), sampling=sampling, id=f"{episode.task.id}/{self.step}/{names}"
        )


class EpisodeOver(Exception):
    """The episode cannot go on; `args` are its StopReason and, where it failed, the cause."""


class Episode:
    """One sibling on its way. Failures of any kind end it and are kept; only misuse is raised."""

    def __init__(self, settings: EpisodeSettings, task: Task, index: int) -> None:
        self.settings, self.task, self.index = settings, task, index
        self.tokens: list[int] = []
        self.mask: list[bool] = []
        self.logprobs: list[float] = []
        self.policy_logprobs: list[float] = []
        self.opening: tuple[Message, ...] = ()
        self.messages: list[Message] = []
        self.tools: tuple[ToolSpec, ...] = ()
        self.text = ""
        self.stop_reason: StopReason | None = None  # None: it goes on
        self.error: str | None = None
        self.versions: list[int] = []
        self.rewards: list[float] = []
        self.counts: dict[str, float] = defaultdict(float)
        self._started_s = time.perf_counter()
        self._seconds = 0.0
        self._environment: Environment | None = None

    @property
    def going(self) -> bool:
        """Whether there is another turn."""
        return self.stop_reason is None

    async def open(self) -> None:
        """Make the environment and read its opening."""
        await self._guarded(self._open())

    async def play(self, completion: Completion) -> None:
        """From the first turn, which was sampled, to the end."""
        await self._guarded(self._play(completion))

    def fail(self, reason: StopReason, error: str) -> None:
        """End it as a failure, unless it has ended."""
        if self.going:
            self.stop_reason, self.error = reason, error[:500]

    async def close(self) -> None:
        """Have the environment free what it holds."""
        self._seconds = time.perf_counter() - self._started_s
        if self._environment is None:
            return
        environment, self._environment = self._environment, None
        try:
            async with asyncio.timeout(_CLOSE_S):
                await environment.close()
        except UsageError:
            raise
        except Exception:  # noqa: BLE001  what was sampled stays as it is, whatever closing does; it is counted
            self.counts["environment/close_failed"] += 1

    def remaining_s(self) -> float | None:
        """Seconds until its deadline; None: it has none."""
        limit = self.settings.limits.seconds
        return None if limit is None else max(0.0, self._started_s + limit - time.perf_counter())

    def trajectory(self) -> Trajectory:
        """What came of it."""
        metrics = {
            **self.counts,
            **{f"turn/{turn}/reward": reward for turn, reward in enumerate(self.rewards)},
            "reward": float(sum(self.rewards)),
            "turns": float(len(self.rewards)),
        }
        return Trajectory(
            id=f"{self.task.id}/{self.settings.step}/{self.index}",
            task=self.task,
            tokens=tuple(self.tokens),
            mask=tuple(self.mask),
            logprobs=tuple(self.logprobs),
            policy_logprobs=tuple(self.policy_logprobs),
            text=self.text,
            stop_reason=self.stop_reason or StopReason.ERROR,
            messages=tuple(self.messages),
            group=f"{self.task.id}/{self.settings.step}",
            index=self.index,
            weight_version=min(self.versions, default=0),
            last_weight_version=max(self.versions, default=0),
            seconds=self._seconds,
            error=self.error if self.stop_reason in _FAILED else None,
            metrics=metrics,
        )

    async def _guarded(self, work: object) -> None:
        """Run a part of the episode; whatever goes wrong in it is the episode's own failure."""
        limit = self.settings.limits.seconds
        clock = asyncio.timeout(self.remaining_s())
        try:
            async with clock:
                await work  # type: ignore[misc]
        except EpisodeOver as over:
            self.stop_reason, self.error = over.args
        except UsageError:
            raise
        except TimeoutError as error:
            if clock.expired():
                self.fail(StopReason.TIMEOUT, f"the episode was not over after {limit:g} s")
            else:
                self.fail(StopReason.ERROR, f"environment: TimeoutError: {error}")
        except PosttrainError as error:
            self.fail(StopReason.ERROR, f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001  an environment may fail in any way; that is data
            self.fail(StopReason.ERROR, f"environment: {type(error).__name__}: {error}")

    async def _open(self) -> None:
        self._environment = environment = self.settings.factory()
        if isinstance(environment, TakesSeed):
            environment.seed(derive_seed(self.settings.seed, "environment", self.settings.step, self.task.id))
        self.opening = tuple(await environment.reset(self.task))
        self.tools = tuple(environment.tools) if isinstance(environment, OffersTools) else self.task.tools
        self.messages = list(self.opening)
        tokens = self.settings.turns.opening(self.opening, self.tools)
        self._check_room(len(tokens))
        self._read(tokens)

    async def _play(self, completion: Completion) -> None:
        while True:
            self._wrote(completion)
            turn, answers = await self._answered(completion)
            ended = completion.stop_reason is StopReason.EOS
            if len(self.rewards) >= self.settings.limits.max_turns:
                self.counts["clipped_turns"] = 1.0
                raise EpisodeOver(StopReason.LENGTH, None)
            tokens = await self.settings.turns.answer(self.opening, turn, answers, self.tools, ended=ended)
            self._check_room(len(tokens))
            self._read(tokens)
            request = self.settings.request(self, 1, self.index, len(self.rewards))
            ((completion,),) = await self._sampled(request)

    async def _sampled(self, request: SampleRequest) -> list[list[Completion]]:
        try:
            return await self.settings.sampler.sample([request])
        except PosttrainError as error:
            raise EpisodeOver(StopReason.ERROR, f"sampler: {type(error).__name__}: {error}"[:500]) from error

    def _read(self, tokens: Sequence[int]) -> None:
        """Append what the policy did not write."""
        self.tokens.extend(tokens)
        for column in (self.logprobs, self.policy_logprobs):
            column.extend([0.0] * len(tokens))
        self.mask.extend([False] * len(tokens))

    def _check_room(self, num_more: int) -> None:
        """Whether so many tokens can be read, and one be written after them."""
        limit = self.settings.limits.max_tokens
        if len(self.tokens) + num_more < limit:
            return
        if not self.tokens:
            raise EpisodeOver(StopReason.ERROR, f"the opening has {num_more} tokens, and an episode at most {limit}")
        self.counts["clipped_tokens"] = 1.0
        raise EpisodeOver(StopReason.LENGTH, None)

    def _wrote(self, completion: Completion) -> None:
        """Append what the policy wrote, token for token."""
        num = len(completion.tokens)
        if not num == len(completion.logprobs) == len(completion.policy_logprobs):
            raise EpisodeOver(StopReason.ERROR, f"sampler: {num} tokens, {len(completion.logprobs)} logprobs")
        self.tokens.extend(completion.tokens)
        self.mask.extend([True] * num)
        self.logprobs.extend(completion.logprobs)
        self.policy_logprobs.extend(completion.policy_logprobs)
        self.versions += [completion.weight_version, completion.last_weight_version]
        if completion.stop_reason in _FAILED:
            raise EpisodeOver(completion.stop_reason, completion.error or f"sampler: {completion.stop_reason.value}")

    async def _answered(self, completion: Completion) -> tuple[Message, Sequence[Message]]:
        """The policy's turn as a message, and what answers it.

        Raises:
            EpisodeOver: the turn was cut off, or the environment says so.
        """
        read = self.settings.turns.read(completion, self.tools, self.settings.sampling.stop)
        turn = self._with_ids(read.message)
        self.messages.append(turn)
        self.text = turn.content
        if completion.stop_reason is StopReason.LENGTH:
            self.rewards.append(0.0)
            self.counts["clipped_tokens"] = 1.0
            raise EpisodeOver(StopReason.LENGTH, None)
        if read.error is not None:
            return turn, self._malformed(read.error, completion.stop_reason)
        assert self._environment is not None
        result = await self._environment.step(turn)
        self.rewards.append(float(result.reward))
        for name, value in result.info.items():
            if isinstance(value, int | float):
                self.counts[name] += float(value)
        self.messages.extend(result.messages)
        if result.done:
            raise EpisodeOver(completion.stop_reason, None)
        if not result.messages:
            raise EpisodeOver(StopReason.ERROR, "environment: a step gave no messages, and the episode is not over")
        return turn, result.messages

    def _malformed(self, error: str, stop_reason: StopReason) -> Sequence[Message]:
        limits = self.settings.limits
        self.counts["tools/malformed"] += 1
        self.rewards.append(limits.malformed_reward)
        if limits.max_malformed is not None and self.counts["tools/malformed"] >= limits.max_malformed:
            raise EpisodeOver(stop_reason, None)
        # A user's message: templates take a tool's only after a call.
        answer = user(f"Error: {error}")
        self.messages.append(answer)
        return [answer]

    def _with_ids(self, turn: Message) -> Message:
        """The turn's calls with ids of nine characters, which every family takes, where they have none."""
        first = sum(len(message.tool_calls) for message in self.messages)
        calls = tuple(
            call if call.id is not None else call.replace(id=f"call{first + place:05d}")
            for place, call in enumerate(turn.tool_calls)
        )
        return turn.replace(tool_calls=calls) if calls else turn
