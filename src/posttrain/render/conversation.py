"""Messages and tools as the plain values that chat templates read (Hugging Face's conventions)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.core import Message, Task, ToolSpec, user
from posttrain.render.marks import Marker


@dataclass(frozen=True)
class CallForm:
    """How a template wants an assistant's message with tool calls."""

    arguments_as_text: bool = False  # JSON text in place of an object
    no_content: bool = False  # None in place of empty content


def template_message(message: Message, form: CallForm = CallForm()) -> dict[str, Any]:
    """One message as a template reads it. Keys without a value are left out: templates test for their presence.

    Args:
        message: the turn.
        form: how to write tool calls.
    """
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        values["reasoning_content"] = message.reasoning
        values["thinking"] = message.reasoning  # the name that gpt-oss's template reads
    if message.tool_calls:
        values["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False)
                    if form.arguments_as_text
                    else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
        if form.no_content and not message.content:
            values["content"] = None
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


@dataclass(frozen=True)
class Conversation:
    """One thing to render."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    add_generation_prompt: bool = False
    form: CallForm = CallForm()  # how the template wants tool calls

    def variables(self, marker: Marker | None = None, assistant_only: bool = False) -> dict[str, Any]:
        """What the template is given, with marks if asked."""
        messages = [template_message(message, self.form) for message in self.messages]
        if marker is not None:
            messages = [
                values if assistant_only and values["role"] != "assistant" else marker.mark(values, index)
                for index, values in enumerate(messages)
            ]
        tools = [template_tool(tool) for tool in self.tools] or None
        return {"messages": messages, "tools": tools, "add_generation_prompt": self.add_generation_prompt}

    def prompt(self, turn: int) -> Conversation:
        """The sampler's prompt for the message `turn`."""
        return replace(self, messages=self.messages[:turn], add_generation_prompt=True)

    def up_to(self, turn: int) -> Conversation:
        """The conversation that ends with the message `turn`."""
        return replace(self, messages=self.messages[: turn + 1], add_generation_prompt=False)

    def followed(self, turn: int) -> Conversation:
        """The conversation up to `turn` with a message after it: its tools' answers, or a user's."""
        calls = self.messages[turn].tool_calls
        answers = [Message(role="tool", content="ok", tool_call_id=call.id, name=call.name) for call in calls]
        messages = (*self.messages[: turn + 1], *(answers or [user("ok")]))
        return replace(self, messages=messages, add_generation_prompt=False)

    def turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message.role == "assistant"]

    def trained_turns(self) -> list[int]:
        """Indices of the assistant's messages that are targets."""
        return [index for index in self.turns() if self.messages[index].train]
