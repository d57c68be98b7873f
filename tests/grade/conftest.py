from __future__ import annotations

import asyncio
import gzip
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Grade, Grader, Task
from posttrain.grade import trajectory_from_text

_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture
def grade_text() -> Callable[..., Grade]:
    """Grade one text: `grade_text(grader, text, answer="…", **facts)`."""

    def grade_one(grader: Grader, text: str, answer: str | None = None, **facts: Any) -> Grade:
        task = Task(id="task", prompt="?", answer=answer, facts=facts)
        return asyncio.run(grader.grade(trajectory_from_text(task, text)))

    return grade_one


@pytest.fixture
def data_rows() -> Callable[[str], list[dict[str, Any]]]:
    """Rows of a gzipped JSON-lines file of the data folder; skips the test where it is absent."""

    def rows(name: str) -> list[dict[str, Any]]:
        path = _DATA / name
        if not path.exists():
            pytest.skip(f"no data file {name} beside the repository")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    return rows


@pytest.fixture
def fruit_database(tmp_path: Path) -> Path:
    """Seven fruits, two of them alike in all but their id; its name needs escaping in a URI."""
    path = tmp_path / "fruit ?#%25.sqlite"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE fruit (id INTEGER PRIMARY KEY, name TEXT, price REAL, stock INTEGER)")
        connection.executemany(
            "INSERT INTO fruit (name, price, stock) VALUES (?, ?, ?)",
            [
                ("apple", 0.5, 10),
                ("pear", 0.75, 4),
                ("fig", 0.1, 30),
                ("fig", 0.2, None),
                ("kiwi", 0.3, 8),
                ("plum", 0.3, 8),
                ("plum", 0.3, 8),
            ],
        )
    connection.close()
    return path
