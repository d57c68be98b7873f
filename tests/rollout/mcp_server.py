"""A small MCP server on standard streams, as a child process of the tests: tools that add, fail, hang and die."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
TOOLS = [
    {"name": "add", "description": "Add.", "inputSchema": SCHEMA},
    {"name": "fail", "inputSchema": {"type": "object", "properties": {}}},
    {"name": "hang", "inputSchema": {"type": "object", "properties": {}}},
    {"name": "die", "inputSchema": {"type": "object", "properties": {}}},
    {"name": "environment", "inputSchema": {"type": "object", "properties": {}}},
]


def answer(message: dict[str, Any], state: dict[str, int]) -> dict[str, Any]:
    """The response to a request."""
    method, parameters = message["method"], message.get("params", {})
    if method == "initialize":
        version = parameters["protocolVersion"]
        return {"result": {"protocolVersion": version, "capabilities": {}, "serverInfo": {"name": "tests"}}}
    if method == "tools/list":  # one page for each tool, so that paging is walked
        place = int(parameters.get("cursor", 0))
        more = {"nextCursor": str(place + 1)} if place + 1 < len(TOOLS) else {}
        return {"result": {"tools": [TOOLS[place]], **more}}
    if method == "tools/call":
        return called(parameters["name"], parameters["arguments"], state)
    return {"error": {"code": -32601, "message": f"no method {method}"}}


def called(name: str, arguments: dict[str, Any], state: dict[str, int]) -> dict[str, Any]:
    """What a tool gives."""
    state["calls"] = state.get("calls", 0) + 1
    if name == "add":
        text = str(arguments["a"] + arguments["b"])
        return {"result": {"content": [{"type": "text", "text": text}, {"type": "image", "data": "", "mimeType": "x"}]}}
    if name == "environment":
        return {"result": {"content": [{"type": "text", "text": " ".join(sorted(os.environ))}]}}
    if name == "hang":
        time.sleep(60)
    if name == "die":
        os._exit(3)
    if name == "fail":
        return {"result": {"content": [{"type": "text", "text": "out of paper"}], "isError": True}}
    return {"error": {"code": -32602, "message": f"Unknown tool: {name}"}}


def main() -> None:
    """Answer requests until the input ends; between them speak as servers do."""
    state: dict[str, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message or "method" not in message:
            continue
        note = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "working"}}
        asking = {"jsonrpc": "2.0", "id": "s1", "method": "roots/list"}
        print(json.dumps(note), json.dumps(asking), "", sep="\n")
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer(message, state)}), flush=True)


if __name__ == "__main__":
    main()
