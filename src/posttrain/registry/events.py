"""One line per event that people can read and programs can parse: time, kind, then `name=value` pairs.

2026-11-20T14:32:05.123Z checkpoint step=40 path="checkpoints/000040" seconds=1.25
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from posttrain.core import DataError

KIND = re.compile(r"[a-z][a-z0-9_.-]*\Z")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\Z")
_FIELD = re.compile(r" ([A-Za-z_][A-Za-z0-9_.-]*)=")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `events.log`."""

    time_s: float  # Unix time
    kind: str
    fields: dict[str, Any] = {}

    def to_line(self) -> bytes:
        """The line with its end. Values are JSON, so line breaks and quotes cannot forge another event."""
        if not KIND.match(self.kind):
            raise DataError(f"event kind {self.kind!r}: use lower-case letters, digits, '_', '.' and '-'")
        stamp = datetime.fromtimestamp(self.time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        parts = [stamp, self.kind]
        for name, value in self.fields.items():
            if not NAME.match(name):
                raise DataError(f"event {self.kind!r}: {name!r} is no field name")
            parts.append(f"{name}={msgspec.json.encode(value, enc_hook=str).decode()}")
        return " ".join(parts).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str, where: str = "events.log") -> Event:
        """Read a line.

        Raises:
            DataError: it is no line of events.
        """
        head, _, rest = line.rstrip("\n").partition(" ")
        kind, space, rest = rest.partition(" ")
        try:
            time_s = datetime.strptime(head, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
            fields = _parse_fields(space + rest)
        except ValueError as error:
            raise DataError(f"{where}: not a line of events: {line[:120]!r} ({error})") from error
        return cls(time_s=time_s, kind=kind, fields=fields)


def _parse_fields(text: str) -> dict[str, Any]:
    """Fields of ` a=1 b="x y=2"`. A value ends where it is whole JSON, so what it quotes is not searched."""
    fields: dict[str, Any] = {}
    while text:
        head = _FIELD.match(text)
        if not head:
            raise ValueError(f"expected name=value at {text[:40]!r}")
        end = _end_of_json(text, head.end())
        fields[head.group(1)] = msgspec.json.decode(text[head.end() : end])
        text = text[end:]
    return fields


def _end_of_json(text: str, start: int) -> int:
    depth, quoted, at = 0, False, start
    while at < len(text):
        character = text[at]
        if quoted:
            if character == "\\":
                at += 1
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == " " and depth == 0:
            return at
        at += 1
    return len(text)
