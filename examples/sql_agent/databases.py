"""The schemas of defog-data as SQLite files, and what their columns hold."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TextColumn:
    """A column of words: its values, each once."""

    database: str
    table: str
    name: str
    values: tuple[str, ...]


def load_databases(source: Path, folder: Path) -> dict[str, Path]:
    """Every database of a folder of `NAME.sqlite.gz` files and `NAME.sqlite.sql` scripts, as files that can be opened.

    Args:
        source: where they are (defog-data's databases, made SQLite's).
        folder: where the SQLite files are written; those that are there stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Path] = {}
    for path in sorted(source.glob("*.sqlite.*")):
        name = path.name.partition(".")[0]
        target = made[name] = folder / f"{name}.db"
        if target.exists():
            continue
        part = target.with_suffix(".part")
        part.unlink(missing_ok=True)
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as packed, part.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        else:
            with closing(sqlite3.connect(part)) as connection:
                connection.executescript(path.read_text(encoding="utf-8"))
                connection.commit()
        part.rename(target)
    if not made:
        raise FileNotFoundError(f"{source}: no *.sqlite.gz or *.sqlite.sql files")
    return made


def repeated_copy(path: Path, folder: Path) -> Path:
    """A copy in which a table's first row comes once, its second twice, and so on.

    A query that asks for another value than the right one often gives the same count where every value comes once;
    here it does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    if target.exists():
        return target
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)
    with closing(sqlite3.connect(part)) as copy:
        copy.execute("ATTACH DATABASE ? AS original", (str(path),))
        for table, columns in tables(path).items():
            copy.execute(f'CREATE TABLE "{table}" AS SELECT * FROM original."{table}" WHERE 0')
            rows = copy.execute(f'SELECT * FROM original."{table}" ORDER BY rowid').fetchall()
            places = ", ".join("?" * len(columns))
            repeated = [row for place, row in enumerate(rows) for _ in range(place + 1)]
            copy.executemany(f'INSERT INTO "{table}" VALUES ({places})', repeated)
        copy.commit()
    part.rename(target)
    return target


def tables(path: Path) -> dict[str, list[str]]:
    """By table, its columns."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        listed = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        return {
            name: [row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')]
            for (name,) in listed
            if not name.startswith("sqlite_")
        }


def text_columns(name: str, path: Path, *, longest: int = 20, most: int = 12) -> list[TextColumn]:
    """The columns that hold nothing but words: two to `most` different ones, of at most `longest` characters."""
    found = []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        for table, columns in tables(path).items():
            for column in columns:
                rows = connection.execute(f'SELECT DISTINCT "{column}" FROM "{table}" ORDER BY rowid').fetchall()
                values = [value for (value,) in rows if value is not None]
                if 2 <= len(values) <= most and all(is_word(value, longest) for value in values):
                    found.append(TextColumn(name, table, column, tuple(values)))
    return found


def number_columns(path: Path, table: str) -> list[str]:
    """The columns of a table that hold nothing but numbers, keys and references aside."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [
            column
            for column in tables(path)[table]
            if not column.lower().endswith("id")
            and {kind for (kind,) in connection.execute(f'SELECT DISTINCT typeof("{column}") FROM "{table}"')}
            <= {"integer", "real"}
        ]


def is_word(value: object, longest: int) -> bool:
    """Text that a person might ask for: short, in ASCII, with a letter, without quotes; no links."""
    return (
        isinstance(value, str)
        and 2 <= len(value) <= longest
        and value.isascii()
        and any(character.isalpha() for character in value)
        and not any(character in value for character in "'\"\\;{}<>|\n")
        and "://" not in value
    )
