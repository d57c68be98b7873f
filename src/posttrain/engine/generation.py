"""One request on its way through the engine, and what its caller sees of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

from posttrain.core import Completion, EngineError, Record, SampleRequest, derive_seed


class StreamEvent(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one sibling has written since its last event. `text` pieces concatenate to the completion's text."""

    index: int  # which of the n siblings
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    policy_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[int, float], ...] = ()
    completion: Completion | None = None  # set on the sibling's last event


class Generation:
    """Handle of a submitted request. Events and completions come from the engine's thread."""

    def __init__(
        self,
        request: SampleRequest,
        *,
        seed: int,
        streaming: bool,
        timeout_s: float | None,
        cancel: Callable[[Generation], None],
    ) -> None:
        self.request = request
        self.streaming = streaming
        self.deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self.timeout_s = timeout_s
        self.num_started = 0  # siblings that have sampled their first token
        self._seed = seed
        self._cancel = cancel
        self._completions: list[Completion | None] = [None] * request.sampling.n
        self._num_finished = 0
        self._done = threading.Event()
        self._events: deque[StreamEvent] = deque()
        self._waker: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def seed(self, index: int) -> int:
        """Seed of one sibling."""
        return derive_seed(self._seed, index)

    @property
    def done(self) -> bool:
        """True once every sibling has its completion."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Withdraw the request: its slots are free before the next step, unfinished siblings end as CANCELLED."""
        self._cancel(self)

    def result(self, timeout_s: float | None = None) -> list[Completion]:
        """Wait for all siblings, by index.

        Raises:
            EngineError: they were not finished after `timeout_s`; the request goes on.
        """
        if not self._done.wait(timeout_s):
            raise EngineError(
                f"request {self.request.id!r} is not finished after {timeout_s} s; wait longer or cancel it"
            )
        return [completion for completion in self._completions if completion is not None]

    async def wait(self) -> list[Completion]:
        """Like `result`, without blocking the event loop. Cancelling the wait cancels the request."""
        woken = self._listen()
        try:
            while not self.done:
                await woken.wait()
                woken.clear()
        finally:
            self._leave()
        return self.result()

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """Events as they come, until every sibling has finished. Closing the generator cancels the request."""
        woken = self._listen()
        try:
            while True:
                finished = self.done  # looked at first: an event may come between the two
                while self._events:
                    yield self._events.popleft()
                if finished:
                    return
                await woken.wait()
                woken.clear()
        finally:
            self._leave()

    def _listen(self) -> asyncio.Event:
        woken = asyncio.Event()
        self._waker = (asyncio.get_running_loop(), woken)
        return woken

    def _leave(self) -> None:
        self._waker = None
        if not self.done:
            self.cancel()

    def emit(self, event: StreamEvent) -> None:
        """Called by the engine: something was written."""
        self._events.append(event)

    def finish(self, index: int, completion: Completion) -> None:
        """Called by the engine: one sibling ended."""
        if self._completions[index] is None:
            self._completions[index] = completion
            self._num_finished += 1
            if self._num_finished == len(self._completions):
                self._done.set()

    def unfinished(self) -> list[int]:
        """Indices of siblings without a completion."""
        return [index for index, completion in enumerate(self._completions) if completion is None]

    @property
    def waker(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """Whom to wake, if somebody waits in an event loop."""
        return self._waker


def wake(generations: Iterable[Generation]) -> None:
    """Wake the waiting callers of these requests: one call per event loop, not one per request."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for generation in generations:
        if (waker := generation.waker) is not None:
            by_loop.setdefault(waker[0], []).append(waker[1])
    for loop, events in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, events)
        except RuntimeError:  # the caller's loop was closed: nobody waits any more
            for generation in generations:
                if (waker := generation.waker) is not None and waker[0] is loop:
                    generation.cancel()


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
