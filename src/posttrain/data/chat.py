"""Messages and tools as data sets write them, read into the records of `core`.

Understood: OpenAI's messages (`role`, `content`, `tool_calls` with arguments as JSON text or object), ShareGPT turns
(`from`, `value`, function_call, observation), typed content parts, and tools as a list or as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import Message, Role, ToolCall, ToolSpec
from posttrain.data.rows import RowFault

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")


def parse_messages(value: object, field: str) -> tuple[Message, ...]:
    """A conversation, turns in a sensible order.

    Args:
        value: a list of turns, or JSON text of one (CSV files have no lists).
        field: the column, named in faults.

    Raises:
        RowFault: not a list of turns, an unknown role, content of the wrong type, an empty turn, a nonsensical order.
    """
    messages = parse_turns(value, field)
    check_order(messages, field)
    return messages


def parse_turns(value: object, field: str) -> tuple[Message, ...]:
    """As `parse_messages`, for a part of a conversation: the order is not checked."""
    if isinstance(value, str):
        value = _json(value, field)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowFault(field, "is not a list of messages", f"it is {type(value).__name__}")
    if not value:
        raise RowFault(field, "has no messages")
    messages: list[Message] = []
    for index, turn in enumerate(value):
        message = parse_message(turn, f"{field}[{index}]", field)
        if message.role == "system" and not message.content.strip():
            continue  # an empty system prompt says the same as none
        if messages and _continues(messages[-1], message, turn):
            calls = (*messages[-1].tool_calls, *message.tool_calls)
            messages[-1] = messages[-1].replace(tool_calls=calls)
        else:
            messages.append(message)
    return tuple(messages)


def _continues(before: Message, message: Message, turn: Mapping[str, Any]) -> bool:
    """Whether a ShareGPT function_call turn belongs to the assistant turn before it: one turn, several calls."""
    return before.role == "assistant" and message.role == "assistant" and _role_name(turn) in CALL_ROLES


def _role_name(turn: Mapping[str, Any]) -> str | None:
    name = turn.get("role") or turn.get("from")
    return name.strip().lower() if isinstance(name, str) else None


def parse_message(turn: object, where: str, field: str) -> Message:
    """One turn. `where` says which, `field` is the column under which a fault is counted."""
    if not isinstance(turn, Mapping):
        raise RowFault(field, "has a message that is not an object", f"{where} is {type(turn).__name__}")
    name = _role_name(turn)
    if name is None:
        raise RowFault(field, "has a message without role", f"{where} has keys {', '.join(map(str, turn)) or 'none'}")
    role = ROLES.get(name)
    if role is None:
        raise RowFault(field, "has an unknown role", f"{where} has {name!r}; known are {', '.join(ROLES)}")
    if name in CALL_ROLES:
        calls = parse_tool_calls(turn.get("value", turn.get("content")), where, field)
        return Message(role="assistant", tool_calls=calls, train=_trained(turn))
    text, reasoning, calls = _content(turn.get("content", turn.get("value", turn.get("text"))), where, field)
    calls += parse_tool_calls(turn.get("tool_calls") or turn.get("function_call") or [], where, field)
    for key in REASONING_KEYS:
        if isinstance(turn.get(key), str) and turn[key]:
            reasoning = turn[key] if reasoning is None else f"{reasoning}\n{turn[key]}"
    if calls and role != "assistant":
        raise RowFault(field, "has tool calls in a turn that is not the assistant's", where)
    if not text.strip() and not calls and role in ("user", "assistant", "developer"):
        raise RowFault(field, f"has an empty {role} turn", where)
    return Message(
        role=role,
        content=text,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_text(turn, "tool_call_id", where, field),
        name=_optional_text(turn, "name", where, field),
        train=_trained(turn),
    )


def _trained(turn: Mapping[str, Any]) -> bool:
    """`weight: 0` (OpenAI's fine-tuning format) or `train: false` make an assistant turn context only."""
    return turn.get("weight") not in (0, 0.0) and turn.get("train") is not False


def _optional_text(turn: Mapping[str, Any], key: str, where: str, field: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise RowFault(field, f"has a {key} that is not text", f"{where} has {type(value).__name__}")
    return value or None


def _content(value: object, where: str, field: str) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    """Text, reasoning and tool calls of a turn's content: text, nothing, or typed parts."""
    if value is None:
        return "", None, ()
    if isinstance(value, str):
        return value, None, ()
    if not isinstance(value, list):
        raise RowFault(field, "has content that is neither text nor parts", f"{where} has {type(value).__name__}")
    texts: list[str] = []
    reasonings: list[str] = []
    calls: list[ToolCall] = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
        if kind is None:
            raise RowFault(field, "has a content part without type", where)
        if kind in ("text", "input_text", "output_text"):
            texts.append(_part_text(part, ("text", "value", "content"), where, field))
        elif kind in REASONING_KEYS:
            reasonings.append(_part_text(part, ("value", "text", *REASONING_KEYS), where, field))
        elif kind in CALL_ROLES:
            calls.extend(parse_tool_calls(part.get("value", part.get(kind)), where, field))
        else:
            raise RowFault(field, "has a content part that is not text", f"{where} has a part of type {kind!r}")
    return "".join(texts), "\n".join(reasonings) or None, tuple(calls)


def _part_text(part: object, keys: tuple[str, ...], where: str, field: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        for key in keys:
            if isinstance(part.get(key), str):
                return str(part[key])
    raise RowFault(field, "has a content part without text", where)


def parse_tool_calls(value: object, where: str, field: str) -> tuple[ToolCall, ...]:
    """Calls as a list, one object, or JSON text of either."""
    if isinstance(value, str):
        value = _json(value, field)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowFault(field, "has tool calls that are not a list", f"{where} has {type(value).__name__}")
    return tuple(_tool_call(call, where, field) for call in value)


def _tool_call(call: object, where: str, field: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise RowFault(field, "has a tool call that is not an object", where)
    inner = call.get("function") if isinstance(call.get("function"), Mapping) else call
    assert isinstance(inner, Mapping)
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise RowFault(field, "has a tool call without name", where)
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, field) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        detail = f"{where}, call of {name}: {type(arguments).__name__}"
        raise RowFault(field, "has tool call arguments that are not an object", detail)
    identifier = call.get("id")
    return ToolCall(name=name, arguments=arguments, id=identifier if isinstance(identifier, str) else None)


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault(field, "has text that should be JSON and is not", str(error)) from error


def parse_tools(value: object) -> tuple[ToolSpec, ...]:
    """The tools of a row: a list of specifications (bare or OpenAI's `{"type": "function", "function": …}`), or JSON
    text of one; nothing or "" is no tools.

    Raises:
        RowFault: another shape.
    """
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowFault("tools", "is not a list of tools", f"it is {type(value).__name__}")
    return tuple(_tool_spec(item) for item in value)


def _tool_spec(item: object) -> ToolSpec:
    if isinstance(item, str):
        item = _json(item, "tools")
    if not isinstance(item, Mapping):
        raise RowFault("tools", "has a tool that is not an object", type(item).__name__)
    inner = item.get("function") if isinstance(item.get("function"), Mapping) else item
    assert isinstance(inner, Mapping)
    name, description, parameters = (inner.get(key) for key in ("name", "description", "parameters"))
    description, parameters = "" if description is None else description, {} if parameters is None else parameters
    if not isinstance(name, str) or not name:
        raise RowFault("tools", "has a tool without name")
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise RowFault("tools", "has a tool whose description or parameters are of the wrong type", name)
    return ToolSpec(name=name, description=description, parameters=parameters)


def check_order(messages: Sequence[Message], field: str) -> None:
    """Turns must alternate: [system] user assistant [tool … assistant] user …

    Raises:
        RowFault: says which turn follows which.
    """
    before: Message | None = None
    for index, message in enumerate(messages):
        place = f"turn {index + 1} is {message.role}" + (f" after {before.role}" if before else "")
        role = message.role
        if role in ("system", "developer"):
            if before is not None and before.role not in ("system", "developer"):
                raise RowFault(field, "has a system turn after the conversation began", place)
        elif role == "user":
            if before is not None and before.role in ("user", "tool"):
                raise RowFault(field, "has roles in a nonsensical order", place)
        elif role == "assistant":
            if before is None or before.role not in ("user", "tool"):
                raise RowFault(field, "has roles in a nonsensical order", place)
        elif before is None or (before.role != "tool" and not before.tool_calls):
            raise RowFault(field, "has a tool result without a tool call", place)
        before = message
    if before is None or before.role in ("system", "developer"):
        raise RowFault(field, "has no user turn")
