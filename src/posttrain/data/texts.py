"""The text of anything that has text: for contamination checks and duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from posttrain.core import Message, Task, UsageError
from posttrain.data.rows import CompletionRow, Content, LabelRow, PreferenceRow, PromptRow, StepsRow, TextRow, TypedRow

Item: TypeAlias = str | tuple[str, str] | Task | TypedRow  # a text, an (id, text) pair, a task or a typed row


def content_text(content: Content) -> str:
    """A prompt or completion as text, tool calls included, without system prompts, which many rows share."""
    if isinstance(content, str):
        return content
    return "\n".join(filter(None, (_message_text(message) for message in content)))


def _message_text(message: Message) -> str:
    if message.role in ("system", "developer"):
        return ""
    called = [f"{call.name} {' '.join(map(str, call.arguments.values()))}" for call in message.tool_calls]
    return "\n".join([part for part in (message.reasoning, message.content) if part] + called)


def prompt_text(item: Item) -> str:
    """The prompt of a task or row, without the answer; a text or (id, text) pair as it is."""
    if isinstance(item, str):
        return item
    if isinstance(item, tuple):
        return item[1]
    return item.text if isinstance(item, TextRow) else content_text(item.prompt)


def whole_text(item: Item) -> str:
    """All that a model would be trained on or shown: prompt and whatever answers the row has."""
    parts = [prompt_text(item)]
    match item:
        case CompletionRow() | LabelRow():
            parts.append(content_text(item.completion))
        case PreferenceRow():
            parts += [content_text(item.chosen), content_text(item.rejected)]
        case StepsRow():
            parts += item.completions
        case PromptRow() | TextRow() | Task() | str() | tuple():
            pass
    return "\n".join(parts)


def identified(items: Iterable[Item]) -> Iterator[tuple[str, Item]]:
    """Each item with its id; bare texts are counted from 0.

    Raises:
        UsageError: one text where a list of them is needed, or something without text.
    """
    if isinstance(items, str):
        raise UsageError("a list of texts, tasks or rows is needed, not one text")
    for index, item in enumerate(items):
        if isinstance(item, str):
            yield str(index), item
        elif isinstance(item, tuple):
            yield item[0], item
        elif isinstance(item, Task | TypedRow):
            yield item.id, item
        else:
            raise UsageError(f"item {index} is {type(item).__name__}: a text, (id, text), Task or typed row is needed")
