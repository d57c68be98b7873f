"""JSON over HTTP with patience: bounded concurrency, retries with back-off, Retry-After obeyed."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from typing import Any

from posttrain.core import EngineError, MissingExtraError, StopReason

# Worth another try: time-out, conflict, too many requests, and the server's own trouble.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT_S = 60.0


class RemoteFailure(EngineError):
    """A server could not be reached, refused, or gave up; `reason` is ERROR or TIMEOUT, `status` its HTTP status."""

    def __init__(self, message: str, reason: StopReason = StopReason.ERROR, status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class JsonClient:
    """Posts JSON to one server."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout_s: float,
        retries: int,
        max_concurrency: int,
        first_wait_s: float = 0.5,
        transport: Any = None,
    ) -> None:
        """Take the address, with or without "/v1", and `transport`, an httpx transport for tests.

        Raises:
            MissingExtraError: httpx is not installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "serve", "sampling from a server") from error
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self._httpx = httpx
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s, self._retries, self._first_wait_s = timeout_s, retries, first_wait_s
        self._max_concurrency, self._transport = max_concurrency, transport
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self._places: asyncio.Semaphore | None = None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's JSON reply.

        Raises:
            RemoteFailure: after the last attempt, or at once where another attempt is useless (400, 401, 404 …).
        """
        client, places = self._connected()
        async with places:
            for attempt in range(self._retries + 1):
                wait_s = min(_LONGEST_WAIT_S, self._first_wait_s * 2**attempt)
                wait_s *= 0.5 + random.random() / 2  # apart, so that clients do not come back all at once
                try:
                    reply = await client.post(f"{self.url}{path}", json=body, headers=self._headers)
                except self._httpx.TimeoutException:
                    failure = RemoteFailure(f"{self.url}: no answer within {self._timeout_s} s", StopReason.TIMEOUT)
                except self._httpx.TransportError as error:
                    failure = RemoteFailure(f"{self.url}: {type(error).__name__}: {error}")
                else:
                    if reply.status_code < 300:
                        return _json(reply, self.url)
                    told = f"{self.url}{path} answered {reply.status_code}: {reply.text[:500]}"
                    failure = RemoteFailure(told, status=reply.status_code)
                    if reply.status_code not in _PASSING:
                        raise failure
                    asked_s = _retry_after_s(reply.headers.get("retry-after"))
                    if asked_s is not None:  # never sooner than asked, and a little apart
                        wait_s = min(_LONGEST_WAIT_S, asked_s) * (1 + random.random() / 10)
                if attempt == self._retries:
                    raise failure
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = self._loop = None

    def _connected(self) -> tuple[Any, asyncio.Semaphore]:
        """Connections belong to an event loop; another loop (a second asyncio.run) gets its own."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._places is None or self._loop is not loop:
            self._loop = loop
            limits = self._httpx.Limits(max_connections=self._max_concurrency)
            self._client = self._httpx.AsyncClient(
                timeout=self._timeout_s, limits=limits, transport=self._transport, trust_env=False
            )
            self._places = asyncio.Semaphore(self._max_concurrency)
        return self._client, self._places


def _json(reply: Any, url: str) -> Any:
    try:
        return reply.json()
    except ValueError:
        raise RemoteFailure(f"{url} answered with something that is not JSON: {reply.text[:200]!r}") from None


def _retry_after_s(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header: a number, or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
