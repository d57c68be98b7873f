"""Reading a judge's reply: tolerant about what stands around the JSON, strict about what it says."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, TypeVar

import msgspec

from posttrain.core import GradeError

V = TypeVar("V", bound=msgspec.Struct)

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_MAX_REPLY = 200_000  # characters that are searched; a longer reply is no verdict
_UNCOMPARED = ("rationale",)


class ReplyUnreadable(GradeError):
    """A judge's reply holds no verdict, or more than one."""


@functools.lru_cache(maxsize=256)
def reply_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema of a verdict, closed and with every field required, as strict structured output wants it.

    The same dict every time: do not change it.
    """
    schema = msgspec.json.schema(kind)
    definitions: dict[str, Any] = schema.pop("$defs", {})
    root: dict[str, Any] = definitions.pop(kind.__name__, schema)
    for part in (root, *definitions.values()):
        if part.get("type") == "object":
            part["additionalProperties"] = False
            part["required"] = list(part.get("properties", {}))
    return {**root, "$defs": definitions} if definitions else root


def read_reply(text: str, kind: type[V]) -> V:
    """The verdict in a reply.

    Reasoning, prose and code fences around the JSON object are passed over, extra keys too, and `"4"` is read as 4. In
    the end the object must have every field, of its type and in its range. Where several objects fit and say different
    things (a judge that quotes a verdict out of the answer it judges), the reply is unreadable rather than guessed at.

    Raises:
        ReplyUnreadable: says what was missing or wrong.
    """
    if len(text) > _MAX_REPLY:
        raise ReplyUnreadable(f"the reply has {len(text)} characters, more than a verdict may have")
    found: dict[str, V] = {}
    problem = "it holds no JSON object"
    for value in _objects(_without_thinking(text)):
        try:
            verdict = msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError as error:
            problem = str(error)
            continue
        plain: dict[str, Any] = msgspec.to_builtins(verdict)
        key = json.dumps({name: part for name, part in plain.items() if name not in _UNCOMPARED}, sort_keys=True)
        found.setdefault(key, verdict)
    if len(found) > 1:
        raise ReplyUnreadable(f"the reply holds {len(found)} different verdicts: {', '.join(found)[:300]}")
    if not found:
        raise ReplyUnreadable(f"the reply holds no verdict: {problem}; it reads {text[:200]!r}")
    return next(iter(found.values()))


def read_pattern(text: str, pattern: re.Pattern[str]) -> str:
    """The text that a pattern's first group catches; all its matches must agree.

    Raises:
        ReplyUnreadable: no match, or several that differ.
    """
    caught = {match.group(1).strip() for match in pattern.finditer(_without_thinking(text)[:_MAX_REPLY])}
    if len(caught) != 1:
        said = "no match" if not caught else f"{len(caught)} different matches"
        raise ReplyUnreadable(f"the reply has {said} of {pattern.pattern!r}; it ends {text[-200:]!r}")
    return caught.pop()


def _without_thinking(text: str) -> str:
    """What follows the reasoning; a text that never ends it is all reasoning."""
    text = _THINKING.sub("", text)
    head, closed, tail = text.rpartition("</think>")  # some servers strip the opening tag
    text = tail if closed else head + tail
    return text.partition("<think>")[0]


def _objects(text: str) -> list[Any]:
    """Every JSON object that stands in a text, outermost ones."""
    decoder = json.JSONDecoder()
    found: list[Any] = []
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            found.append(value)
        place = text.find("{", end)
    return found
