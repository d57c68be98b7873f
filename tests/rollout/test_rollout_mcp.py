"""Tools of MCP servers: over a child process, over HTTP, and, where it is installed, from the reference package."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Sampling, Task, ToolCall
from posttrain.engine import ScriptedEngine
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer
from posttrain.rollout import (
    McpError,
    McpSession,
    Toolbox,
    ToolEnvironment,
    ToolError,
    TurnTokens,
    connect_http,
    connect_stdio,
    run_episodes,
)

sys.path.insert(0, str(Path(__file__).parent))
from mcp_server import answer

httpx = pytest.importorskip("httpx", reason="the extra serve is not installed")
SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def with_child(use: Callable[[McpSession], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        session = await connect_stdio(SERVER, **options)
        try:
            return await use(session)
        finally:
            await session.close()

    return asyncio.run(run())


class Server:
    """The same server behind HTTP: answers as JSON or as events; keeps what it was sent."""

    def __init__(self, *, events: bool = False, status: int = 200) -> None:
        self.events, self.status = events, status
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.state: dict[str, int] = {}

    def __call__(self, request: Any) -> Any:
        body = json.loads(request.content) if request.content else None
        self.seen.append((request.method, dict(request.headers), body))
        if self.status != 200:
            return httpx.Response(self.status, text="not today")
        if request.method == "DELETE" or "id" not in body:
            return httpx.Response(202)
        response = {"jsonrpc": "2.0", "id": body["id"], **answer(body, self.state)}
        headers = {"Mcp-Session-Id": "s-1"} if body["method"] == "initialize" else {}
        if not self.events:
            return httpx.Response(200, json=response, headers=headers)
        note = json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": {}})
        text = f": hello\n\nevent: message\ndata: {note}\n\nevent: message\ndata: {json.dumps(response)}\n\n"
        return httpx.Response(200, text=text, headers={**headers, "content-type": "text/event-stream; charset=utf-8"})


def with_http(server: Server, use: Callable[[McpSession], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        session = await connect_http("http://tests/mcp", transport=httpx.MockTransport(server))
        try:
            return await use(session)
        finally:
            await session.close()

    return asyncio.run(run())


async def add(session: McpSession) -> tuple[list[str], str]:
    tools = {tool.spec.name: tool for tool in await session.tools()}
    return list(tools), await tools["add"].call({"a": 2, "b": 3})


# Over a child process


def test_tools_of_a_child_process() -> None:
    names, result = with_child(add)
    assert names == ["add", "fail", "hang", "die", "environment"]
    assert result == "5\n(image that cannot be shown as text)"


def test_calls_at_the_same_time_find_their_answers() -> None:
    async def many(session: McpSession) -> list[str]:
        return await asyncio.gather(*(session.call("add", {"a": n, "b": 0}) for n in range(40)))

    assert [text.split("\n")[0] for text in with_child(many)] == [str(n) for n in range(40)]


def test_failures_of_tools_are_told_to_the_policy() -> None:
    async def box(session: McpSession) -> list[str]:
        toolbox = Toolbox(await session.tools(only=["add", "fail"]))
        calls = [ToolCall(name="fail"), ToolCall(name="add", arguments={"a": 1, "b": 2})]
        return [outcome.message.content for outcome in await toolbox.call_all(calls)]

    assert with_child(box)[0] == "Error: out of paper"

    async def unknown(session: McpSession) -> str:
        return await session.call("nothing", {})

    with pytest.raises(ToolError, match=r"Unknown tool: nothing \(code -32602\)"):
        with_child(unknown)


def test_lateness_death_and_absence() -> None:
    async def hang(session: McpSession) -> str:
        return await session.call("hang", {})

    async def die(session: McpSession) -> str:
        return await session.call("die", {})

    with pytest.raises(ToolError, match=r"no response within 0\.5 s"):
        with_child(hang, timeout_s=0.5)
    with pytest.raises(ToolError, match="the MCP server has ended"):
        with_child(die)
    with pytest.raises(McpError, match="cannot be started"):
        asyncio.run(connect_stdio(["no-such-program-anywhere"]))
    with pytest.raises(McpError, match="has ended"):
        asyncio.run(connect_stdio([sys.executable, "-c", "pass"]))
    with pytest.raises(McpError, match="no tool 'x'; it has add, fail"):
        with_child(lambda session: session.tools(only=["x"]))


def test_a_server_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")

    async def variables(session: McpSession) -> list[str]:
        return (await session.call("environment", {})).split()

    seen = with_child(variables, environment={"MINE": "1"})
    assert "MINE" in seen
    assert "API_KEY" not in seen


# Over HTTP


@pytest.mark.parametrize("events", [False, True])
def test_tools_at_an_address(events: bool) -> None:
    server = Server(events=events)
    names, result = with_http(server, add)
    assert (len(names), result.split("\n")[0]) == (5, "5")
    methods = [(method, (body or {}).get("method")) for method, _, body in server.seen]
    assert methods[:2] == [("POST", "initialize"), ("POST", "notifications/initialized")]
    assert methods[-1] == ("DELETE", None), "the session is ended"
    first, later = server.seen[0][1], server.seen[2][1]
    assert "mcp-session-id" not in first
    assert (later["mcp-session-id"], later["mcp-protocol-version"]) == ("s-1", "2025-06-18")
    assert later["accept"] == "application/json, text/event-stream"


def test_a_server_that_refuses() -> None:
    with pytest.raises(McpError, match="HTTP 503: not today"):
        with_http(Server(status=503), add)


# In an episode


def test_an_episode_with_a_server_of_its_own() -> None:
    tokenizer = Tokenizer.train_bpe(["add"], 280, ("<|im_end|>", "<|im_start|>"))
    sessions: list[McpSession] = []

    def make() -> ToolEnvironment:
        own: list[McpSession] = []

        async def tools(task: Task) -> Any:
            own.append(await connect_stdio(SERVER))
            sessions.extend(own)
            return await own[0].tools(only=["add"])

        async def close() -> None:
            await own[0].close()

        return ToolEnvironment(tools, on_close=close, judge=lambda task, messages: float("5" in messages[-1].content))

    call = CALL_SYNTAXES["hermes"].write([ToolCall(name="add", arguments={"a": 2, "b": 3})])
    turn = iter([call, call, "It is 5.", "It is 5."])
    engine = ScriptedEngine(lambda request: next(turn), tokenizer)
    (group,) = asyncio.run(
        run_episodes(
            engine,
            [Task(id="sum", prompt="2 + 3?")],
            make,
            Sampling(max_tokens=100, n=2),
            turns=TurnTokens(Renderer(tokenizer)),
            seed=0,
            lockstep=True,
        )
    )
    assert [t.metrics["reward"] for t in group.trajectories] == [1.0, 1.0]
    assert [m.content.split("\n")[0] for m in group.trajectories[0].messages if m.role == "tool"] == ["5"]
    assert len(sessions) == 2


# The reference implementation

_REFERENCE = """
try:
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server
server = Server("reference")

@server.tool()
def multiply(a: int, b: int) -> int:
    "Multiply two numbers."
    if b == 13:
        raise ValueError("unlucky")
    return a * b

server.run()
"""


def reference_interpreter() -> str:
    """An interpreter that has the package `mcp`: this one, or the one that POSTTRAIN_MCP_PYTHON names."""
    if importlib.util.find_spec("mcp") is not None:
        return sys.executable
    named = os.environ.get("POSTTRAIN_MCP_PYTHON", "")
    if not named:
        pytest.skip("the package mcp is not installed (or name an interpreter that has it: POSTTRAIN_MCP_PYTHON)")
    return named


def test_the_reference_server_is_understood(tmp_path: Path) -> None:
    interpreter = reference_interpreter()
    script = tmp_path / "server.py"
    script.write_text(_REFERENCE, encoding="utf-8")

    async def use() -> tuple[Any, str, str]:
        session = await connect_stdio([interpreter, str(script)])
        try:
            (tool,) = await session.tools()
            product = await tool.call({"a": 6, "b": 7})
            outcome = await Toolbox([tool]).call(ToolCall(name="multiply", arguments={"a": 1, "b": 13}))
            return tool.spec, product, outcome.message.content
        finally:
            await session.close()

    spec, product, failed = asyncio.run(use())
    assert (spec.name, spec.description) == ("multiply", "Multiply two numbers.")
    assert spec.parameters["properties"]["a"]["type"] == "integer"
    assert product == "42"
    assert failed.startswith("Error:")
    assert "unlucky" in failed or "multiply" in failed
