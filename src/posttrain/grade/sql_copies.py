"""Copies of a database with other rows, on which queries that agree by chance come apart.

Source: test-suite accuracy, Zhong, Yu and Klein, 2020 (arXiv 2010.02840): a query that gives the gold rows on one
database may be wrong; one that does so on several of the same schema seldom is.
"""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from posttrain.core import GradeError
from posttrain.grade.sql_compare import Value

_DROPPED = 0.15  # share of rows that a copy lacks
_DOUBLED = 0.15  # share that it has again, under another key
_CHANGED = 0.3  # share of values, of columns that are no key, that are others
_NULL = 0.05  # share that are nothing
_MIN_ROWS = 3  # a table is not made smaller than this


def mutated_copies(database: Path, folder: Path, num_copies: int = 2, seed: int = 0) -> list[Path]:
    """Write copies of a SQLite database whose rows differ from it and from one another.

    In each table some rows go, some come twice under a new key, and values of columns that are no key and no reference
    are exchanged for others of the column, moved a little, or taken away; so joins still find their rows. Triggers are
    dropped, constraints hold: what would break one is left as it is.

    Args:
        database: the original, which is not changed.
        folder: where the copies go, as `<name>.copy<n>.sqlite`.
        num_copies: how many.
        seed: the same seed gives the same rows.

    Returns:
        Paths of the copies. Grade on these and the original: `SqlResult([database, *copies])`.

    Raises:
        GradeError: it is no SQLite database.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for number in range(1, num_copies + 1):
        path = folder / f"{database.stem}.copy{number}.sqlite"
        path.unlink(missing_ok=True)
        try:
            with contextlib.ExitStack() as stack:
                source = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
                original = stack.enter_context(contextlib.closing(source))
                copy = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
                original.backup(copy)
                _change(copy, random.Random(f"{seed}/{number}"))
        except sqlite3.DatabaseError as error:
            raise GradeError(f"{database}: cannot be copied as a SQLite database: {error}") from error
        copies.append(path)
    return copies


def _change(copy: sqlite3.Connection, rng: random.Random) -> None:
    copy.execute("PRAGMA foreign_keys = OFF")
    copy.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    made = "SELECT type, name, sql FROM sqlite_master WHERE type IN ('table', 'trigger') AND name NOT LIKE 'sqlite_%'"
    listed = copy.execute(made).fetchall()
    referenced = _referenced(copy, [name for kind, name, _ in listed if kind == "table"])
    tables = [(name, sql or "") for kind, name, sql in listed if kind == "table"]
    with copy:
        for kind, name, _ in listed:
            if kind == "trigger":
                copy.execute(f"DROP TRIGGER {_quoted(name)}")
        for name, sql in tables:
            if not re.search(r"^\s*create\s+virtual|without\s+rowid", sql, re.IGNORECASE):
                _change_table(copy, name, referenced.get(name.lower(), set()), rng)
    copy.execute("VACUUM")


def _referenced(copy: sqlite3.Connection, tables: Sequence[str]) -> dict[str, set[str]]:
    """Of each table, in lower case, its columns that refer to another or are referred to."""
    found: dict[str, set[str]] = {}
    for table in tables:
        for row in copy.execute(f"PRAGMA foreign_key_list({_quoted(table)})"):
            found.setdefault(table.lower(), set()).add(str(row[3]).lower())
            found.setdefault(str(row[2]).lower(), set()).add(str(row[4] or "").lower())
    return found


def _change_table(copy: sqlite3.Connection, table: str, references: set[str], rng: random.Random) -> None:
    columns = copy.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
    keys = {name for _, name, _, _, _, key in columns if key}
    # Without declared references, columns that are named as keys are taken for such, or joins would find nothing.
    free = [
        name
        for _, name, *_ in columns
        if name not in keys and name.lower() not in references and not name.lower().endswith(("id", "_key", "code"))
    ]
    required = {name for _, name, _, not_null, _, _ in columns if not_null}
    rowids = [rowid for (rowid,) in copy.execute(f"SELECT rowid FROM {_quoted(table)} ORDER BY rowid")]
    for column in free:
        _change_column(copy, table, column, rowids, rng, nullable=column not in required)
    chosen = rng.sample(rowids, int(_DOUBLED * len(rowids) + rng.random()) if rowids else 0)
    for rowid in chosen:
        _double(copy, table, [name for _, name, *_ in columns], keys, rowid)
    gone = min(int(_DROPPED * len(rowids) + rng.random()), max(0, len(rowids) - _MIN_ROWS))
    for rowid in rng.sample(rowids, gone):
        copy.execute(f"DELETE FROM {_quoted(table)} WHERE rowid = ?", (rowid,))


def _change_column(
    copy: sqlite3.Connection, table: str, column: str, rowids: Sequence[int], rng: random.Random, *, nullable: bool
) -> None:
    name = _quoted(column)
    values: list[Value] = [value for (value,) in copy.execute(f"SELECT {name} FROM {_quoted(table)} ORDER BY rowid")]
    for rowid, value in zip(rowids, values, strict=True):
        if nullable and rng.random() < _NULL:
            other: Value = None
        elif rng.random() < _CHANGED:
            other = _another(value, values, rng)
        else:
            continue
        with contextlib.suppress(sqlite3.IntegrityError):  # the constraint holds and the value stays
            copy.execute(f"UPDATE {_quoted(table)} SET {name} = ? WHERE rowid = ?", (other, rowid))


def _another(value: Value, values: Sequence[Value], rng: random.Random) -> Value:
    """Another value of the column, or for a number one near by."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 and rng.random() < 0.5:
        return value + rng.choice((-1, 1))
    if isinstance(value, float) and rng.random() < 0.5:
        return round(value * rng.uniform(0.5, 1.5), 2)
    return rng.choice(values)


def _double(copy: sqlite3.Connection, table: str, columns: Sequence[str], keys: set[str], rowid: int) -> None:
    """The same row again, with the key's whole numbers raised above all others."""
    chosen = ", ".join(map(_quoted, columns))
    row = copy.execute(f"SELECT {chosen} FROM {_quoted(table)} WHERE rowid = ?", (rowid,)).fetchone()
    values = list(row)
    for place, column in enumerate(columns):
        if column in keys and isinstance(values[place], int):
            (highest,) = copy.execute(f"SELECT max({_quoted(column)}) FROM {_quoted(table)}").fetchone()
            values[place] = int(highest) + 1
    marks = ", ".join("?" * len(columns))
    with contextlib.suppress(sqlite3.IntegrityError):
        copy.execute(f"INSERT INTO {_quoted(table)} ({chosen}) VALUES ({marks})", values)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
