"""The base of every record: frozen, keyword-only, strict about unknown fields, with a stable content hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from posttrain.core.errors import DataError

R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen value that crosses a door between rooms.

    Records that stand alone on disk carry a tag `record: "<name>/<version>"`; reading one with another tag is an error,
    so a file of an older version is never half-understood.
    """

    def to_json(self) -> bytes:
        """One line of JSON, UTF-8, without the line's end."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls: type[R], line: bytes | str, where: str = "") -> R:
        """Read one record from JSON.

        Args:
            line: JSON text of one record.
            where: file and line, named in the error.

        Raises:
            DataError: the text is no JSON, a field is unknown, missing, or of the wrong type.
        """
        try:
            return msgspec.json.decode(line, type=cls)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise DataError(f"{where or cls.__name__}: not a valid {cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_dict(cls: type[R], values: dict[str, Any], where: str = "") -> R:
        """The inverse of `to_dict`, with the errors of `from_json`."""
        try:
            return msgspec.convert(values, type=cls)
        except msgspec.ValidationError as error:
            raise DataError(f"{where or cls.__name__}: not a valid {cls.__name__}: {error}") from error

    def replace(self: R, **changes: Any) -> R:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def content_hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON: the same content gives the same hash on every machine."""
        return content_hash(self)


def content_hash(value: object) -> str:
    """SHA-256 (hex) of any JSON-like value or record, keys sorted."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def read_jsonl(path: Path, kind: type[R]) -> list[R]:
    """All records of a `.jsonl` file; an error names the file and line."""
    with path.open("rb") as lines:
        return [kind.from_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
