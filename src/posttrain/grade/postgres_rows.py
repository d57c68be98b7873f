"""PostgreSQL's values as the texts it sends, and as what results are compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from posttrain.grade.sql_compare import Row, Value

# Object identifiers of built-in types: they are the same on every server.
_BOOL, _BYTEA, _BPCHAR, _FLOATS, _NUMERIC = 16, 17, 1042, (700, 701), 1700
_MAX_DIGITS = 300  # of a number; a longer one stays a text
_INTEGERS = (20, 21, 23, 26)
_TIMESTAMPS = (1114, 1184)


def text_adapters(psycopg: Any) -> Any:
    """Adapters that leave every value as the text that the server sent.

    Python's own types cannot hold some that are sent: dates before Christ or at infinity, intervals of months.
    """
    text_loader = psycopg.types.string.TextLoader
    adapters = psycopg.adapt.AdaptersMap(psycopg.adapters)
    for info in psycopg.adapters.types:
        for oid in filter(None, (info.oid, info.array_oid)):
            adapters.register_loader(oid, text_loader)
    return adapters


def row_reader(oids: Sequence[int]) -> Callable[[Sequence[str | None]], Row]:
    """A function from the texts of a row to values that compare as PostgreSQL compares them.

    Integers and numerics without a fraction become int, other numbers float, `bytea` bytes; everything else stays the
    server's text. Truth is `true` and `false`. A timestamp at midnight is written as the date that equals it, one with
    a time zone in UTC without its offset; `char(n)` loses its padding.

    Args:
        oids: the type of each column.
    """
    readers = [_reader(oid) for oid in oids]

    def read(row: Sequence[str | None]) -> Row:
        return tuple(None if text is None else of(text) for of, text in zip(readers, row, strict=True))

    return read


def _reader(oid: int) -> Callable[[str], Value]:
    if oid in _INTEGERS:
        return int
    if oid in _FLOATS:
        return _float
    if oid in _TIMESTAMPS:
        return _moment
    special: dict[int, Callable[[str], Value]] = {
        _NUMERIC: _numeric,
        _BOOL: lambda text: "true" if text == "t" else "false",
        _BYTEA: lambda text: bytes.fromhex(text.removeprefix("\\x")),
        _BPCHAR: lambda text: text.rstrip(" "),
    }
    return special.get(oid, str)


def _float(text: str) -> Value:
    # NaN equals itself in PostgreSQL and not in Python.
    return "NaN" if text == "NaN" else float(text)


def _numeric(text: str) -> Value:
    if text in ("NaN", "Infinity", "-Infinity"):
        return _float(text)
    number = Decimal(text)
    if number.adjusted() > _MAX_DIGITS:
        return text
    if number == number.to_integral_value():
        return int(number)
    return float(number)


def _moment(text: str) -> str:
    """Of a timestamp as the server writes it in UTC, style ISO."""
    return text.removesuffix("+00").removesuffix(" 00:00:00")
