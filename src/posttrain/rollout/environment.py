"""What an episode asks of an environment, and the bounds that it is kept in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Protocol, runtime_checkable

from posttrain.core import Config, Environment, Grade, GradeError, ToolSpec, Trajectory, doc

EnvironmentFactory = Callable[[], Environment]


@runtime_checkable
class OffersTools(Protocol):
    """An environment whose tools the policy may call; asked after `reset`."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The tools, as the chat template shows them."""
        ...


@runtime_checkable
class TakesSeed(Protocol):
    """An environment with chance in it; told its seed before `reset`. Siblings get the same one."""

    def seed(self, seed: int) -> None:
        """Decide all chance from this number."""
        ...


class EpisodeLimits(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an episode is cut off. One that is cut keeps the rewards that it has, and is marked as clipped."""

    max_turns: Annotated[int, doc("turns of the policy", ge=1)] = 8
    max_tokens: Annotated[int, doc("tokens in all: opening, turns and answers", ge=2)] = 4096
    seconds: Annotated[float | None, doc("of an episode, from reset to close; one that is late has failed")] = None
    malformed_reward: Annotated[float, doc("for a turn whose tool calls cannot be read")] = 0.0
    max_malformed: Annotated[int | None, doc("turns with unreadable calls after which the episode is over")] = None


class EpisodeReward:
    """A grader that says what the environment said: the sum of the episode's rewards."""

    name = "environment"

    async def grade(self, trajectory: Trajectory) -> Grade:
        """The trajectory's `metrics["reward"]`.

        Raises:
            GradeError: it has none: it did not come from `run_episodes`.
        """
        if "reward" not in trajectory.metrics:
            raise GradeError(f"trajectory {trajectory.id!r} has no reward of an environment; use a grader")
        return Grade(score=trajectory.metrics["reward"], grader=self.name)


def turn_spans(trajectory: Trajectory) -> list[tuple[int, int]]:
    """Where each turn of the policy lies among the tokens: [start, end)."""
    spans: list[tuple[int, int]] = []
    start = None
    for place, wrote in enumerate((*trajectory.mask, False)):
        if wrote and start is None:
            start = place
        elif not wrote and start is not None:
            spans.append((start, place))
            start = None
    return spans


def turn_rewards(trajectory: Trajectory) -> list[float]:
    """The environment's reward for each turn, in order; 0 where it gave none."""
    return [trajectory.metrics.get(f"turn/{turn}/reward", 0.0) for turn in range(len(turn_spans(trajectory)))]


def per_turn(trajectory: Trajectory, values: Sequence[float]) -> list[float]:
    """T values from one for each turn: every token of a turn has its turn's, all others 0."""
    column = [0.0] * len(trajectory.tokens)
    for (start, end), value in zip(turn_spans(trajectory), values, strict=True):
        column[start:end] = [value] * (end - start)
    return column
