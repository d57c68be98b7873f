"""Tools of MCP servers, for the policy to call like any others."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import ToolSpec
from posttrain.rollout.mcp_client import PROTOCOL_VERSION, Carries, HttpTransport, McpError, StdioTransport
from posttrain.rollout.tools import ToolError


class McpSession:
    """One session with a server. Make it with `connect_stdio` or `connect_http`; `close` it.

    One session may serve many episodes at once where the server keeps no state between calls; a server that does gets a
    session, or a process, for every episode: `ToolEnvironment(tools=lambda task: …)` and `on_close`.
    """

    def __init__(self, transport: Carries, *, timeout_s: float = 30.0) -> None:
        self._transport, self._timeout_s = transport, timeout_s
        self._ids = itertools.count(1)
        self.server: dict[str, Any] = {}  # the server's name and version

    async def open(self) -> None:
        """Introduce each other.

        Raises:
            McpError: the server does not answer as a server of this protocol would.
        """
        introduction = {
            "protocolVersion": PROTOCOL_VERSION,
            "capabilities": {},
            "clientInfo": {"name": "posttrain", "version": "1"},
        }
        result = await self._request("initialize", introduction)
        if "protocolVersion" not in result:
            raise McpError("the server's answer to initialize names no protocol version")
        self.server = dict(result.get("serverInfo") or {})
        await self._transport.notify({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def tools(self, *, only: Sequence[str] | None = None) -> list[McpTool]:
        """The server's tools.

        Args:
            only: these, by name.

        Raises:
            McpError: the server refuses, or lacks one of `only`.
        """
        found: dict[str, McpTool] = {}
        cursor = None
        while True:
            result = await self._request("tools/list", {} if cursor is None else {"cursor": cursor})
            for described in result.get("tools", ()):
                spec = ToolSpec(
                    name=described["name"],
                    description=described.get("description") or "",
                    parameters=described.get("inputSchema") or {},
                )
                found[spec.name] = McpTool(self, spec)
            cursor = result.get("nextCursor")
            if cursor is None:
                break
        missing = [name for name in only or () if name not in found]
        if missing:
            raise McpError(f"the server has no tool {missing[0]!r}; it has {', '.join(found)}")
        return [tool for name, tool in found.items() if only is None or name in only]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What a tool answers, as text.

        Raises:
            ToolError: the tool says that it failed, or the server refuses the call.
        """
        try:
            result = await self._request("tools/call", {"name": name, "arguments": dict(arguments)})
        except McpError as error:
            raise ToolError(str(error)) from error
        text = "\n".join(_text_of(part) for part in result.get("content", ()))
        if result.get("isError"):
            raise ToolError(text or "the tool failed")
        return text or str(result.get("structuredContent", ""))

    async def close(self) -> None:
        """End the session."""
        await self._transport.close()

    async def _request(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        message = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": parameters}
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._transport.request(message)
        except TimeoutError:
            raise McpError(f"{method}: no response within {self._timeout_s:g} s") from None
        if "error" in response:
            error = response["error"]
            raise McpError(f"{method}: {error.get('message', error)} (code {error.get('code')})")
        result = response.get("result")
        if not isinstance(result, dict):
            raise McpError(f"{method}: the response has no result")
        return result


class McpTool:
    """One tool of a server. Satisfies `Tool`."""

    def __init__(self, session: McpSession, spec: ToolSpec) -> None:
        self._session, self._spec = session, spec

    @property
    def spec(self) -> ToolSpec:
        """As the server describes it."""
        return self._spec

    async def call(self, arguments: dict[str, Any]) -> str:
        """See `Tool`; the server checks the arguments."""
        return await self._session.call(self._spec.name, arguments)


async def connect_stdio(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    timeout_s: float = 30.0,
) -> McpSession:
    """A session with a server that is started as a child process.

    Args:
        command: program and arguments.
        environment: variables that it gets besides PATH, HOME, LANG and the like.
        folder: where it starts.
        timeout_s: for each response.

    Raises:
        McpError: it cannot be started, or is no MCP server.
    """
    return await _opened(
        await StdioTransport.start(command, environment=environment, folder=folder), timeout_s=timeout_s
    )


async def connect_http(
    url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 30.0, transport: Any = None
) -> McpSession:
    """A session with a server at an address (streamable HTTP).

    Args:
        url: of its endpoint, often ending in /mcp.
        headers: sent with every request, such as Authorization.
        timeout_s: for each response.
        transport: an httpx transport, for tests.

    Raises:
        McpError: it does not answer, or is no MCP server.
        MissingExtraError: httpx is not installed.
    """
    return await _opened(
        HttpTransport(url, headers=headers, timeout_s=timeout_s, transport=transport), timeout_s=timeout_s
    )


async def _opened(transport: Carries, *, timeout_s: float) -> McpSession:
    session = McpSession(transport, timeout_s=timeout_s)
    try:
        await session.open()
    except BaseException:
        await session.close()
        raise
    return session


def _text_of(part: dict[str, Any]) -> str:
    if part.get("type") == "text":
        return str(part.get("text", ""))
    if part.get("type") == "resource" and "text" in (part.get("resource") or {}):
        return str(part["resource"]["text"])
    return f"({part.get('type', 'something')} that cannot be shown as text)"
