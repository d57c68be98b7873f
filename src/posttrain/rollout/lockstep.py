"""Turns in step: requests of many episodes go to the sampler together, in an order that does not depend on time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType

from posttrain.core import Completion, SampleRequest, SampleTokens

_current: ContextVar[Lockstep | None] = ContextVar("lockstep", default=None)

Waiting = tuple[Sequence[SampleRequest], asyncio.Future[list[list[Completion]]]]


class Lockstep:
    """A sampler for many parties that waits until each of them waits for it. Implements `SampleTokens`.

    The requests then go to the sampler in one call, ordered by their ids: whole batches for a sampler that computes in
    the caller's thread, and, where environments are deterministic, the same batches whenever the work is repeated. A
    slow environment holds up the others; without `Lockstep` requests go to the sampler as they come.

    A party that also samples elsewhere, such as a simulated user of the same engine, does it through the same object.
    """

    def __init__(self, sampler: SampleTokens) -> None:
        self.sampler = sampler
        self._num_parties = 0
        self._waiting: list[Waiting] = []
        self._in_flight: set[asyncio.Task[None]] = set()

    def join(self, count: int = 1) -> None:
        """So many parties more."""
        self._num_parties += count
        _current.set(self)

    def leave(self, count: int = 1) -> None:
        """So many parties less; the others may go on."""
        self._num_parties -= count
        self._go_on()

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """See `SampleTokens`; returns once every party has asked and the sampler has answered all."""
        done: asyncio.Future[list[list[Completion]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((requests, done))
        self._go_on()
        try:
            return await done
        finally:
            self._waiting = [waiting for waiting in self._waiting if waiting[1] is not done]

    def _go_on(self) -> None:
        if not self._waiting or self._in_flight or len(self._waiting) < self._num_parties:
            return
        batch, self._waiting = self._waiting, []
        batch.sort(key=lambda waiting: waiting[0][0].id if waiting[0] else "")
        task = asyncio.get_running_loop().create_task(self._dispatch(batch))
        self._in_flight.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._go_on()

    async def _dispatch(self, batch: list[Waiting]) -> None:
        try:
            results = await self.sampler.sample([request for requests, _ in batch for request in requests])
        except Exception as error:  # noqa: BLE001  whoever waits is told; a request that is refused must not take others along
            if len(batch) == 1:
                _settle(batch[0][1], error)
            else:
                for waiting in batch:
                    await self._dispatch([waiting])
            return
        at = 0
        for requests, done in batch:
            _settle(done, results[at : at + len(requests)])
            at += len(requests)


def _settle(done: asyncio.Future[list[list[Completion]]], result: list[list[Completion]] | Exception) -> None:
    if done.done():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        done.set_result(result)


class Parked:
    """While an environment waits for another episode, the others' turns do not wait for its own.

    with Parked() as place: … wait …      whoever wakes it may say so at once, with `place.resume()`
    """

    def __init__(self) -> None:
        self._lockstep = _current.get()
        self._away = False

    def resume(self) -> None:
        """It goes on: the others' turns wait for it again."""
        if self._away and self._lockstep is not None:
            self._away = False
            self._lockstep.join()

    def __enter__(self) -> Parked:
        if self._lockstep is not None:
            self._away = True
            self._lockstep.leave()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()
