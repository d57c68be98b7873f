"""The schemas of defog-data as SQLite files, and what their columns hold."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TextColumn:
    """A column of words: its values and in how many rows each comes."""

    database: str
    table: str
    name: str
    counts: dict[str, int]


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
            connection = sqlite3.connect(part)
            connection.executescript(path.read_text(encoding="utf-8"))
            connection.commit()
            connection.close()
        part.rename(target)
    if not made:
        raise FileNotFoundError(f"{source}: no *.sqlite.gz or *.sqlite.sql files")
    return made


def tables(path: Path) -> dict[str, list[str]]:
    """By table, its columns."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    found = {name: [row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')] for name in names}
    connection.close()
    return {name: columns for name, columns in found.items() if not name.startswith("sqlite_")}


def text_columns(name: str, path: Path, longest: int = 30) -> list[TextColumn]:
    """The columns that hold words of at most `longest` characters, with at least two different values."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    found = []
    for table, columns in tables(path).items():
        for column in columns:
            rows = connection.execute(f'SELECT "{column}", count(*) FROM "{table}" GROUP BY 1').fetchall()
            counts = {value: count for value, count in rows if is_word(value, longest)}
            if len(counts) >= 2:
                found.append(TextColumn(name, table, column, counts))
    connection.close()
    return found


def is_word(value: object, longest: int) -> bool:
    """Text that a person might ask for: short, in ASCII, with a letter, without quotes; no dates, links or keys."""
    return (
        isinstance(value, str)
        and 2 <= len(value) <= longest
        and value.isascii()
        and any(character.isalpha() for character in value)
        and not any(character in value for character in "'\"\\;{}<>\n")
        and "://" not in value
    )
