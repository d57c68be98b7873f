"""One request's sampling: all its prompts, all its choices, and what each has written so far."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from posttrain.core import Completion, Interaction, Message, SampleRequest, Sampling, StopReason
from posttrain.serve.model import ServedModel, StreamEvent

logger = logging.getLogger(__name__)

Observe = Callable[["Choice", int], None]  # a choice, and how many new tokens it has


@dataclass
class Choice:
    """One answer as it grows. `stop_reason` is None until it has ended."""

    index: int  # among all choices of the request: prompt × n + sibling
    prompt: int  # which prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the distribution that was sampled from
    policy_logprobs: list[float] = field(default_factory=list)  # of the model itself
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""
    stop_reason: StopReason | None = None
    weight_version: int = 0
    error: str | None = None
    seconds: float = 0.0  # from the request's start to the choice's end
    response: Message | None = None  # what was read out of the text, where tools were offered

    def take(self, event: StreamEvent) -> None:
        """Add what an event brings."""
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.policy_logprobs += event.policy_logprobs
        self.top_logprobs += event.top_logprobs
        self.text += event.text
        if event.completion is not None:
            self._end(event.completion)

    def _end(self, whole: Completion) -> None:
        self.tokens, self.logprobs = list(whole.tokens), list(whole.logprobs)
        self.policy_logprobs, self.top_logprobs = list(whole.policy_logprobs), list(whole.top_logprobs)
        self.text, self.stop_reason, self.error = whole.text, whole.stop_reason, whole.error
        self.weight_version = whole.weight_version


@dataclass(frozen=True)
class Delta:
    """What one event added to a choice."""

    choice: Choice
    text: str
    start: int  # the new tokens are choice.tokens[start:]
    ended: bool


class Generation:
    """Samples a request and remembers every token, so that even a withdrawn request can be logged.

    Args:
        request_id: the completion id that the client sees.
        model: the model that answers.
        prompts: token ids of each prompt.
        sampling: how to sample; `n` choices per prompt.
        timeout_s: after so long, what is unfinished ends with TIMEOUT.
    """

    def __init__(
        self,
        request_id: str,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sampling,
        timeout_s: float,
    ) -> None:
        self.id = request_id
        self.model = model
        self.prompts = list(prompts)
        self.sampling = sampling
        self.timeout_s = timeout_s
        self.created_s = time.time()
        # A choice's end brings the version that wrote it; one that is cut short keeps the version of now.
        self.choices = [
            Choice(index=i, prompt=i // sampling.n, weight_version=model.weight_version)
            for i in range(len(prompts) * sampling.n)
        ]
        self._start = time.monotonic()

    async def deltas(self, observe: Observe | None = None) -> AsyncGenerator[Delta, None]:
        """Sample, and tell of every step. Close the iterator to withdraw the request: its places are free at once.

        When it ends, in whatever way, every choice has a stop reason.

        Args:
            observe: called with each choice that grew, before its delta is given.

        Raises:
            EngineError: the engine refuses the request.
        """
        events: asyncio.Queue[tuple[int, StreamEvent] | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(number, events)) for number in range(len(self.prompts))]
        running = len(tasks)
        # The deadline comes through the queue: a timer would strike the consumer, wherever it then waits.
        alarm = asyncio.get_running_loop().call_later(self.timeout_s, events.put_nowait, TimeoutError())
        try:
            while running:
                item = await events.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield self._take(*item, observe)
        except TimeoutError:
            self._end_rest(StopReason.TIMEOUT, f"not finished after {self.timeout_s:g} s")
        except (asyncio.CancelledError, GeneratorExit):
            self._end_rest(StopReason.CANCELLED)
            raise
        except Exception as error:
            self._end_rest(StopReason.ERROR, f"{type(error).__name__}: {error}")
            raise
        finally:
            alarm.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # the places are free when this returns
            self._end_rest(StopReason.ERROR, "the engine ended the stream early")

    async def _pump(self, number: int, events: asyncio.Queue[tuple[int, StreamEvent] | BaseException | None]) -> None:
        seed = self.sampling.seed
        # Prompts of one request draw from different seeds, as if they were sent one after another.
        sampling = self.sampling if seed is None or not number else self.sampling.replace(seed=seed + number)
        request = SampleRequest(prompt=self.prompts[number], sampling=sampling, id=f"{self.id}-{number}")
        try:
            stream: Any = self.model.engine.stream(request)
            async with aclosing(stream):
                async for event in stream:
                    events.put_nowait((number, event))
        except Exception as error:  # noqa: BLE001 - handed to the consumer, which raises it
            events.put_nowait(error)
        events.put_nowait(None)

    def _take(self, number: int, event: StreamEvent, observe: Observe | None) -> Delta:
        choice = self.choices[number * self.sampling.n + event.index]
        start, shown = len(choice.tokens), len(choice.text)
        choice.take(event)
        if choice.stop_reason is not None:
            choice.seconds = time.monotonic() - self._start
            if choice.error:
                logger.error("request %s, choice %d: %s", self.id, choice.index, choice.error)
        if observe is not None:
            observe(choice, len(choice.tokens) - start)
        return Delta(choice=choice, text=choice.text[shown:], start=start, ended=choice.stop_reason is not None)

    def _end_rest(self, reason: StopReason, error: str | None = None) -> None:
        for choice in self.choices:
            if choice.stop_reason is None:
                choice.stop_reason, choice.error = reason, error
                choice.seconds = time.monotonic() - self._start

    def failure(self) -> str | None:
        """Why a choice failed in the engine, if one did."""
        return next((choice.error or "" for choice in self.choices if choice.stop_reason is StopReason.ERROR), None)

    def timed_out(self) -> bool:
        """True if the deadline passed before all choices had ended."""
        return any(choice.stop_reason is StopReason.TIMEOUT for choice in self.choices)

    def num_prompt_tokens(self) -> int:
        """Over all prompts; siblings share theirs."""
        return sum(map(len, self.prompts))

    def num_completion_tokens(self) -> int:
        """Over all choices."""
        return sum(len(choice.tokens) for choice in self.choices)

    def interactions(
        self, messages: tuple[Message, ...] | None, user: str | None, metadata: dict[str, Any]
    ) -> list[Interaction]:
        """The records of this request, one per choice.

        Args:
            messages: of a chat request.
            user: whom the client asks for.
            metadata: of the request, written into each record.
        """
        decode = self.model.renderer.tokenizer.decode
        texts = [decode(prompt, skip_special_tokens=False) for prompt in self.prompts]
        return [
            Interaction(
                id=self.id,
                choice=choice.index,
                model=self.model.model_id,
                model_name=self.model.name,
                messages=messages,
                prompt=texts[choice.prompt],
                prompt_tokens=self.prompts[choice.prompt],
                tokens=tuple(choice.tokens),
                logprobs=tuple(choice.logprobs),
                text=choice.text,
                stop_reason=choice.stop_reason or StopReason.ERROR,
                sampling=self.sampling,
                weight_version=choice.weight_version,
                user=user,
                created_s=self.created_s,
                seconds=choice.seconds,
                metadata=_choice_metadata(choice, metadata),
            )
            for choice in self.choices
        ]


def _choice_metadata(choice: Choice, metadata: dict[str, Any]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if choice.error is not None:
        extra["error"] = choice.error
    if choice.response is not None:
        extra["response"] = choice.response.to_dict()
    return {**metadata, **extra}


def shown_logprob(value: float) -> float:
    """A logprob as JSON can carry it: OpenAI writes −9999 for impossible."""
    return max(value, -9999.0) if math.isfinite(value) or value < 0 else -9999.0
