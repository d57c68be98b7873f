"""Find where a template puts the messages' own texts: private-use characters around them that survive rendering.

A conversation is rendered twice, plain and with marks. If the marked text without its marks equals the plain one, the
marks tell exactly where each message's text lies; if not, the template looks at what it prints, and the caller is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core import Message, RenderError

PLANES = ((0xF2000, 0xFFFFD), (0x100000, 0x10FFFD))  # private use
MARKS_PER_MESSAGE = 64


@dataclass(frozen=True)
class Marked:
    """A marked rendering: its plain text, and for each mark the characters before it."""

    text: str
    positions: dict[int, int]  # mark number → offset in `text`; a content's mark that came out twice is not there

    def first(self, message: int) -> int | None:
        """Where the first text of a message begins, if any of it shows."""
        return min(self._of(message), default=None)

    def last(self, message: int) -> int | None:
        """Where the last text of a message ends, if any of it shows."""
        return max(self._of(message), default=None)

    def shows(self, message: int, slot: int) -> bool:
        """Whether the marked piece `slot` of a message came out, once."""
        return MARKS_PER_MESSAGE * message + 2 * slot in self.positions

    def _of(self, message: int) -> list[int]:
        low = MARKS_PER_MESSAGE * message
        return [at for number, at in self.positions.items() if low <= number < low + MARKS_PER_MESSAGE]


@dataclass(frozen=True)
class Marker:
    """Writes marks into template messages and reads them from rendered texts.

    Slots of a message: 0 its content, 1 its reasoning, 2 … the names of its tool calls.
    """

    base: int  # code point of mark 0
    size: int  # how many code points from there on are free for marks
    names: bool = True  # also mark the names of tool calls

    @classmethod
    def for_messages(cls, messages: Sequence[Message], names: bool = True) -> Marker:
        """A marker whose characters occur in none of the messages.

        Raises:
            RenderError: the conversation is too long, or uses both private planes.
        """
        text = "".join(json.dumps(message.to_dict(), ensure_ascii=False) for message in messages)
        used = sorted(ord(character) for character in set(text) if ord(character) >= PLANES[0][0])
        size = MARKS_PER_MESSAGE * len(messages)
        for low, high in PLANES:
            for base in (low, *(point + 1 for point in used if low <= point <= high)):
                if base + size <= high and not any(base <= point < base + size for point in used):
                    return cls(base, size, names)
        raise RenderError(
            f"no private-use characters are free to locate the turns of {len(messages)} messages: "
            "split the conversation, or take such characters out of it"
        )

    def mark(self, values: dict[str, Any], message: int) -> dict[str, Any]:
        """A copy of one template message with marks around its texts."""
        marked = dict(values)
        marked["content"] = values["content"] and self._around(values["content"], message, 0)
        for key in ("reasoning_content", "thinking"):
            if key in values:
                marked[key] = self._around(values[key], message, 1)
        if self.names and "tool_calls" in values:
            marked["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "name": self._around(call["function"]["name"], message, slot)},
                }
                for slot, call in enumerate(values["tool_calls"][: MARKS_PER_MESSAGE // 2 - 2], 2)
            ] + values["tool_calls"][MARKS_PER_MESSAGE // 2 - 2 :]
        return marked

    def read(self, rendered: str) -> Marked:
        """Take the marks out of a rendered text."""
        plain: list[str] = []
        length = 0
        seen: dict[int, list[int]] = {}
        start = 0
        for match in re.finditer(f"[{chr(self.base)}-{chr(self.base + self.size - 1)}]", rendered):
            plain.append(rendered[start : match.start()])
            length += match.start() - start
            start = match.end()
            seen.setdefault(ord(match.group()) - self.base, []).append(length)
        plain.append(rendered[start:])
        # A tool's name may come again in the header of its answer; the call is the first.
        once = {number: at[0] for number, at in seen.items() if len(at) == 1 or number % MARKS_PER_MESSAGE >= 4}
        return Marked("".join(plain), once)

    def _around(self, text: str, message: int, slot: int) -> str:
        """Marks inside the white space around a text, which templates strip.

        Reasoning written inside the content, <think>…</think>, gets the marks of slot 1: templates cut it out.
        """
        cut = text.rfind("</think>")
        if slot or cut < 0:
            return self._wrapped(text, message, slot)
        begin = text.find("<think>") + len("<think>") if "<think>" in text[:cut] else 0
        thought = self._wrapped(text[begin:cut], message, 1)
        return text[:begin] + thought + "</think>" + self._wrapped(text[cut + len("</think>") :], message, 0)

    def _wrapped(self, text: str, message: int, slot: int) -> str:
        core = text.strip()
        if not core:
            return text
        lead = len(text) - len(text.lstrip())
        number = self.base + MARKS_PER_MESSAGE * message + 2 * slot
        return f"{text[:lead]}{chr(number)}{core}{chr(number + 1)}{text[lead + len(core) :]}"
