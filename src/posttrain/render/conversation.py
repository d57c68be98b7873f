"""Messages and tools as the plain values that chat templates read (Hugging Face's conventions)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.core import Message, Task, ToolSpec, user


def template_message(message: Message) -> dict[str, Any]:
    """One message as a template reads it. Keys without a value are left out: templates test for their presence."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        values["reasoning_content"] = message.reasoning
        values["thinking"] = message.reasoning  # the name that gpt-oss's template reads
    if message.tool_calls:
        values["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        values["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        values["name"] = message.name
    return values


def template_tool(tool: ToolSpec) -> dict[str, Any]:
    """One tool as a template reads it: the JSON schema of a function."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def as_messages(prompt: Task | Sequence[Message] | Message | str) -> tuple[Message, ...]:
    """A prompt as messages; a text becomes a user's turn."""
    if isinstance(prompt, Task):
        prompt = prompt.prompt
    if isinstance(prompt, str):
        return (user(prompt),)
    return (prompt,) if isinstance(prompt, Message) else tuple(prompt)
