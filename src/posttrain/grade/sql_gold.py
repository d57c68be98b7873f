"""Gold queries as data sets write them: several joined by semicolons, or one with optional columns in braces.

Source: Defog's SQL-Eval (github.com/defog-ai/sql-eval), whose SQLite questions join alternatives by ";" and whose
PostgreSQL questions list in {a, b} columns of which any that are not none will do.
"""

from __future__ import annotations

import itertools
import re

from posttrain.core import GradeError

_PIECE = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|.", re.DOTALL)
_MAX_ALTERNATIVES = 256


def alternatives(query: str) -> list[str]:
    """The queries of a text, parted at semicolons outside quotes and comments, with optional columns unfolded.

    `SELECT {a, b}, c FROM t GROUP BY {}` unfolds into `SELECT a, c FROM t GROUP BY a`, the same with b, and with both.

    Raises:
        GradeError: a brace is not closed, or there are more than 256 alternatives.
    """
    found: list[str] = []
    for one in _parted(query, ";"):
        if one.strip():
            found += _unfolded(one.strip())
    unique = list(dict.fromkeys(found))
    if not unique or len(unique) > _MAX_ALTERNATIVES:
        raise GradeError(f"{len(unique)} queries in {query[:80]!r}: there must be 1 to {_MAX_ALTERNATIVES}")
    return unique


def _parted(text: str, mark: str) -> list[str]:
    """Pieces between marks that stand outside quotes, comments and parentheses."""
    parts, depth = [""], 0
    for piece in _PIECE.findall(text):
        depth += (piece == "(") - (piece == ")")
        if piece == mark and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _unfolded(query: str) -> list[str]:
    pieces = _PIECE.findall(query)
    if "{" not in pieces:
        return [query]
    start = pieces.index("{")
    if "}" not in pieces[start:]:
        raise GradeError(f"a brace is not closed in the query {query[:80]!r}")
    end = pieces.index("}", start)
    columns = [column.strip() for column in _parted("".join(pieces[start + 1 : end]), ",") if column.strip()]
    head, tail = "".join(pieces[:start]), "".join(pieces[end + 1 :])
    chosen = (some for size in range(1, len(columns) + 1) for some in itertools.combinations(columns, size))
    found: list[str] = []
    for some in chosen:
        # An empty pair of braces further on (GROUP BY {}) stands for the same columns.
        same = ", ".join(some)
        found += _unfolded(f"{head}{same}{tail.replace('{}', same)}")
        if len(found) > _MAX_ALTERNATIVES:
            break
    return found
