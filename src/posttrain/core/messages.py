"""What people, models and tools say to one another."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.core.record import Record

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ToolCall(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call that an assistant asks for. `arguments` is the parsed JSON object."""

    name: str
    arguments: dict[str, Any] = {}
    id: str | None = None


class ToolSpec(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class Message(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool = True  # False: an assistant turn that is context only, never a target


def user(content: str) -> Message:
    """A user's turn."""
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    """An assistant's turn."""
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    """The system prompt."""
    return Message(role="system", content=content)
