"""Answer generation requests, whole or as a stream; withdraw them when the client leaves; log them when they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from posttrain.core import EngineError, RenderError
from posttrain.serve.api_error import ApiError, bad_request, json_response
from posttrain.serve.job import Job
from posttrain.serve.model import ParsesAnswers
from posttrain.serve.payload import body, chunks, opening, sse, usage_chunk
from posttrain.serve.state import Observer, ServeState

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DELIVERY_S = 60.0  # how much longer than the generation a slow reader may take


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it, and wait until it has tidied up, when the client leaves.

    Raises:
        ClientGone: the client left first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task.cancelled():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer(Response):
    """The answer to one generation request. Made when the request is checked, at work when Starlette calls it."""

    def __init__(self, state: ServeState, job: Job, headers: dict[str, str]) -> None:
        super().__init__()
        self._state, self._job, self._extra = state, job, headers
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send."""
        work = self._stream(send) if self._job.stream else self._whole(scope, receive, send)
        try:
            with self._state.admit(len(self._job.generation.choices)):
                await while_connected(receive, work)
        except ClientGone:
            self._state.metrics.count("requests_cancelled_total")
            if not self._started:
                await Response(status_code=499)(scope, receive, send)  # nobody reads it; logs and metrics do
        except ApiError as error:
            if self._started:  # the status is out: the stream itself must tell
                await self._send_event(send, error.body(), last=True)
            else:
                await error.response()(scope, receive, send)
        finally:
            work.close()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(None)
        response = json_response(body(self._job), 200, self._extra)
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        deadline_s = self._state.settings.request_timeout_s + _DELIVERY_S
        try:
            async with asyncio.timeout(deadline_s):
                await self._generate(send)
                if self._job.include_usage:
                    await self._send_event(send, usage_chunk(self._job))
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        except TimeoutError:
            raise ClientGone from None

    async def _generate(self, send: Send | None) -> None:
        """Sample to the end, telling of every step if there is somebody to tell; then log, whatever happened."""
        generation = self._job.generation
        observer = Observer(self._state.metrics, generation.model.name, asyncio.get_running_loop().time())
        refused = False
        try:
            async with aclosing(generation.deltas(observer)) as deltas:
                async for delta in deltas:
                    if delta.ended and self._job.parses:
                        self._parse(delta.choice.index)
                    if send is not None:
                        await self._open(send)
                        for chunk in chunks(self._job, delta) if not delta.choice.error else ():
                            await self._send_event(send, chunk)
        except EngineError as error:
            refused = not generation.num_completion_tokens()
            if generation.model.context is None:  # the request is too long, in all likelihood: nobody checked
                raise bad_request(str(error)) from None
            raise ApiError(503, f"the engine refuses the request: {error}", headers={"Retry-After": "1"}) from None
        except Exception as error:
            logger.exception("request %s failed", generation.id)
            raise self._failed() from error
        finally:
            written = None if refused else self._record()
        if written is not None:
            await asyncio.shield(written)
        if generation.timed_out():
            raise ApiError(504, f"the answer was not finished after {generation.timeout_s:g} s", code="timeout")
        if generation.failure() is not None:
            raise self._failed()

    def _failed(self) -> ApiError:
        return ApiError(500, f"the generation failed; the server's log has the cause under {self._job.generation.id}")

    def _parse(self, index: int) -> None:
        choice, renderer = self._job.generation.choices[index], self._job.generation.model.renderer
        if isinstance(renderer, ParsesAnswers):
            try:
                choice.response = renderer.parse(choice.text)
            except RenderError as error:  # the model wrote no well-formed call: the client gets its text
                logger.info("request %s: %s", self._job.generation.id, error)

    def _record(self) -> asyncio.Future[None] | None:
        """Queue the request's interactions; None if there is no store."""
        generation, log = self._job.generation, self._state.log
        self._state.metrics.count(
            "prompt_tokens_total", generation.num_prompt_tokens(), model_name=generation.model.name
        )
        if log is None:
            return None
        return log.put(generation.interactions(self._job.messages, self._job.user, self._job.metadata))

    async def _open(self, send: Send) -> None:
        if self._started:
            return
        self._started = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **self._extra}
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        for chunk in opening(self._job):
            await self._send_event(send, chunk)

    async def _send_event(self, send: Send, value: dict[str, Any], last: bool = False) -> None:
        await send({"type": "http.response.body", "body": sse(value), "more_body": not last})
