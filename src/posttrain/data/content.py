"""Single columns read into prompts, completions, labels and numbers, with faults that name the column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from posttrain.core import Message, assistant, system, user
from posttrain.data.chat import check_order, parse_messages, parse_turns
from posttrain.data.rows import Content, RowFault


def required(values: Mapping[str, Any], field: str) -> Any:
    """The value of a column that must be there and not null."""
    value = values.get(field)
    if value is None:
        cause = "is null" if field in values else "is missing"
        raise RowFault(field, cause, f"columns present: {', '.join(name for name in values) or 'none'}")
    return value


def text(values: Mapping[str, Any], field: str, *, may_be_empty: bool = False) -> str:
    """A column that must be text, not blank."""
    value = required(values, field)
    if not isinstance(value, str):
        raise RowFault(field, "is not text", f"it is {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise RowFault(field, "is empty")
    return value


def optional_text(values: Mapping[str, Any], field: str) -> str:
    """A column that may be missing, null or blank; "" then."""
    return "" if values.get(field) is None else text(values, field, may_be_empty=True)


def turns(values: Mapping[str, Any], field: str) -> Content:
    """A column of text or of turns whose order makes sense only together with other columns."""
    value = required(values, field)
    return text(values, field) if isinstance(value, str) else parse_turns(value, field)


def prompt(values: Mapping[str, Any], field: str) -> Content:
    """A prompt: text, or turns that do not end with the assistant's; a `system` column goes before it."""
    value = required(values, field)
    if isinstance(value, str) and field not in ("messages", "conversations", "conversation"):
        return with_system(text(values, field), values)
    messages = parse_messages(value, field)
    if messages[-1].role == "assistant":
        raise RowFault(field, "ends with an assistant turn", "a prompt ends with a user or tool turn")
    return with_system(messages, values)


def with_system(content: Content, values: Mapping[str, Any]) -> Content:
    """The content behind the row's system prompt, if the row has a column `system` and no system turn of its own."""
    instruction = optional_text(values, "system")
    if not instruction.strip():
        return content
    messages = as_prompt_messages(content)
    return messages if messages[0].role == "system" else (system(instruction), *messages)


def as_prompt_messages(content: Content) -> tuple[Message, ...]:
    """Text as a user's turn; messages as they are."""
    return (user(content),) if isinstance(content, str) else content


def as_completion_messages(content: Content) -> tuple[Message, ...]:
    """Text as an assistant's turn; messages as they are."""
    return (assistant(content),) if isinstance(content, str) else content


def join(before: Content, after: Content, field: str) -> tuple[Content, Content]:
    """A prompt and what follows it, both text or both messages.

    Raises:
        RowFault: what follows does not begin or end with an assistant's turn, or the turns are in a nonsensical order.
    """
    if isinstance(before, str) and isinstance(after, str):
        return before, after
    prompt_messages, messages = as_prompt_messages(before), as_completion_messages(after)
    if messages[0].role != "assistant" or messages[-1].role != "assistant":
        place = f"it goes from {messages[0].role} to {messages[-1].role}"
        raise RowFault(field, "does not begin and end with an assistant turn", place)
    check_order((*prompt_messages, *messages), field)
    return prompt_messages, messages


def last_text(content: Content) -> str:
    """The text itself, or that of the last turn."""
    return content if isinstance(content, str) else content[-1].content


def label(values: Mapping[str, Any], field: str) -> bool:
    """A yes or no: a boolean, 0 or 1, or such a word (CSV files know only words)."""
    value = required(values, field)
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "1"):
        return True
    if word in (False, "false", "0"):
        return False
    raise RowFault(field, "is not a label", f"{value!r} is neither true, false, 0 nor 1")


def number(values: Mapping[str, Any], field: str) -> float | None:
    """A finite number, or None where the column is missing or null."""
    value = values.get(field)
    if value is None or value == "":
        return None
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowFault(field, "is not a finite number", repr(value))
    return found
