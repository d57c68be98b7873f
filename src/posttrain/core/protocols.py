"""The seams of the house: small Protocols that rooms and users implement without inheriting anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from posttrain.core.messages import Message
from posttrain.core.records import Completion, Grade, GradeCase, SampleRequest, Sampling, StepResult, Task, Trajectory


class SampleTokens(Protocol):
    """Tokens in, tokens out. Does not say where or how generation runs."""

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """For each request, in order, its `sampling.n` completions, by index.

        A request that fails is a completion with StopReason.ERROR and `error`; only a misuse of the sampler raises.
        The result for one request does not depend on the other requests.
        """
        ...


class Chat(Protocol):
    """Messages in, a message out: a judge, a simulated user, a teacher."""

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Message:
        """The next assistant message."""
        ...


class Environment(Protocol):
    """Answers what the policy does. One object per episode."""

    async def reset(self, task: Task) -> Sequence[Message]:
        """The messages that open the episode."""
        ...

    async def step(self, action: Message) -> StepResult:
        """What the policy's turn leads to: messages that answer it, a reward, and whether the episode is over."""
        ...

    async def close(self) -> None:
        """Free what the episode holds. Called exactly once."""
        ...


@runtime_checkable
class Grader(Protocol):
    """Says how good a trajectory is."""

    @property
    def name(self) -> str:
        """Short name; metrics are `rewards/<name>/mean`."""
        ...

    async def grade(self, trajectory: Trajectory) -> Grade:
        """The grade. May raise: the caller turns that into a grade with an error."""
        ...


@runtime_checkable
class ProvesItself(Protocol):
    """A grader that carries gold answers and near misses, run by `posttrain doctor` and by the tests."""

    def cases(self) -> Sequence[GradeCase]:
        """Answers and the range in which their score must lie."""
        ...


class Tracker(Protocol):
    """Takes metrics as they come."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One step's metrics."""
        ...


class TextTokenizer(Protocol):
    """What sampler and trainer need of a tokenizer. `posttrain.render.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer can give."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a sequence."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in the text are recognised."""
        ...

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...
