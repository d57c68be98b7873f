"""A small client of the Model Context Protocol: sessions with servers that offer tools, over stdio or HTTP.

JSON-RPC 2.0 as the specification of 2025-06-18 has it: initialize, tools/list, tools/call, over a child process's
standard streams or over streamable HTTP. Requests that a server makes of its client (sampling, roots) are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from posttrain.core import MissingExtraError, PosttrainError

PROTOCOL_VERSION = "2025-06-18"
_LONGEST_LINE = 16_000_000  # bytes of one message of a server
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER")


class McpError(PosttrainError):
    """A server refused a request, answered nonsense, or is gone."""


class Carries(Protocol):
    """Takes messages to a server and back."""

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its response."""
        ...

    async def notify(self, message: dict[str, Any]) -> None:
        """Send what has no response."""
        ...

    async def close(self) -> None:
        """End the connection."""
        ...


class StdioTransport:
    """A server as a child process: a line of JSON for each message."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def start(
        cls, command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: str | None = None
    ) -> StdioTransport:
        """Start the server.

        Args:
            command: program and arguments.
            environment: variables that it gets besides the harmless ones (PATH, HOME, LANG …).
            folder: where it starts.
        """
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={**kept, **(environment or {})},
                cwd=folder,
                limit=_LONGEST_LINE,
            )
        except OSError as error:
            raise McpError(f"the MCP server {command[0]!r} cannot be started: {error}") from error
        return cls(process)

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """See `Carries`."""
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if self._reader.done():
            raise McpError("the MCP server has ended")
        self._waiting[message["id"]] = done
        try:
            await self.notify(message)
            return await done
        finally:
            self._waiting.pop(message["id"], None)

    async def notify(self, message: dict[str, Any]) -> None:
        """See `Carries`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise McpError("the MCP server has ended") from error

    async def close(self) -> None:
        """Close its input, then end it if it does not end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 2.0)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        problem = "the MCP server has ended"
        try:
            while line := await self._process.stdout.readline():
                await self._take(line)
        except ValueError as error:
            problem = f"the MCP server's message is too long or no JSON: {error}"
        finally:
            for done in self._waiting.values():
                if not done.done():
                    done.set_exception(McpError(problem))

    async def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        message = json.loads(line)
        if not isinstance(message, dict) or "id" not in message:
            return  # a notification
        if "method" in message:  # a request of the server: nothing is offered
            refusal = {"code": -32601, "message": "this client offers nothing"}
            outcome: dict[str, Any] = {"result": {}} if message["method"] == "ping" else {"error": refusal}
            await self.notify({"jsonrpc": "2.0", "id": message["id"], **outcome})
            return
        done = self._waiting.get(message["id"])
        if done is not None and not done.done():
            done.set_result(message)


class HttpTransport:
    """A server at an address: every message is a POST, answered by JSON or by a stream of events.

    Args:
        url: of the server's endpoint.
        headers: sent with every request, such as Authorization.
        timeout_s: for each response.
        transport: an httpx transport, for tests.

    Raises:
        MissingExtraError: httpx is not installed.
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0, transport: Any = None
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "serve", "an MCP server at an address") from error
        self._httpx = httpx
        self._url = url
        self._headers = {"Accept": "application/json, text/event-stream", **(headers or {})}
        self._client = httpx.AsyncClient(timeout=timeout_s, transport=transport)

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """See `Carries`."""
        try:
            async with self._client.stream("POST", self._url, json=message, headers=self._headers) as response:
                await self._check(response)
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    found = await self._from_events(response, message["id"])
                else:
                    found = json.loads(await response.aread())
        except (self._httpx.HTTPError, ValueError) as error:
            raise McpError(f"{self._url}: {type(error).__name__}: {error}") from error
        if message["method"] == "initialize":
            version = (found.get("result") or {}).get("protocolVersion", PROTOCOL_VERSION)
            self._headers["MCP-Protocol-Version"] = str(version)
        return found

    async def notify(self, message: dict[str, Any]) -> None:
        """See `Carries`."""
        try:
            response = await self._client.post(self._url, json=message, headers=self._headers)
            await self._check(response)
        except self._httpx.HTTPError as error:
            raise McpError(f"{self._url}: {type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """End the session, if the server has sessions."""
        if "Mcp-Session-Id" in self._headers:
            with contextlib.suppress(self._httpx.HTTPError):
                await self._client.delete(self._url, headers=self._headers)
        await self._client.aclose()

    async def _check(self, response: Any) -> None:
        if response.status_code >= 400:
            said = (await response.aread()).decode("utf-8", "replace")[:300]
            raise McpError(f"{self._url}: HTTP {response.status_code}: {said}")
        if session := response.headers.get("mcp-session-id"):
            self._headers["Mcp-Session-Id"] = session

    async def _from_events(self, response: Any, request_id: int) -> dict[str, Any]:
        """The response among a stream's events; other messages of the server are passed over."""
        async for data in _events(response.aiter_lines()):
            message = json.loads(data)
            if isinstance(message, dict) and message.get("id") == request_id and "method" not in message:
                return message
        raise McpError(f"{self._url}: the stream of events ended without the response")


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of server-sent events."""
    data: list[str] = []
    async for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)
