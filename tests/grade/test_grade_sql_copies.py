from __future__ import annotations

import asyncio
import gzip
import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import ConfigError, Grade, GradeError, Task, Trajectory
from posttrain.grade import (
    SqlResult,
    alternatives,
    grade_all,
    mutated_copies,
    prove,
    results_match,
    rows_match,
    trajectory_from_text,
)

GradeText = Callable[..., Grade]
_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text_to_sql" / "defog"


def test_alternatives_by_hand() -> None:
    assert alternatives("SELECT 1; SELECT ';' -- ; no\n; ") == ["SELECT 1", "SELECT ';' -- ; no"]
    assert alternatives("SELECT {a, b} FROM t") == ["SELECT a FROM t", "SELECT b FROM t", "SELECT a, b FROM t"]
    assert alternatives("SELECT {a, max(b, c)}, d FROM t WHERE x = '{'") == [
        "SELECT a, d FROM t WHERE x = '{'",
        "SELECT max(b, c), d FROM t WHERE x = '{'",
        "SELECT a, max(b, c), d FROM t WHERE x = '{'",
    ]
    assert alternatives("SELECT {a, b}, max(c) FROM t GROUP BY {}")[1:] == [
        "SELECT b, max(c) FROM t GROUP BY b",
        "SELECT a, b, max(c) FROM t GROUP BY a, b",
    ]
    assert len(alternatives("SELECT {a, b}, {c, d} FROM t")) == 9
    assert len(alternatives("SELECT {a, b, c}")) == 7
    for text in ("SELECT {a", ";", "SELECT {" + ", ".join("abcdefghij") + "}"):
        with pytest.raises(GradeError):
            alternatives(text)


def test_columns_in_another_order_or_more_of_them() -> None:
    gold = [(1, "x", 2.5), (2, "y", 2.5)]
    turned = [(2.5, 1, "x"), (2.5, 2, "y")]
    wider = [("x", 0, 1, 2.5, 9), ("y", 0, 2, 2.5, 8)]
    assert not results_match(gold, turned, ordered=True)
    assert results_match(gold, turned, ordered=True, columns="any_order")
    assert not results_match(gold, wider, ordered=True, columns="any_order")
    assert results_match(gold, wider, ordered=False, columns="superset")
    assert not results_match(gold, [row[:2] for row in gold], ordered=False, columns="superset")
    # Each column alone is there; the rows are not.
    crossed = [(2, "x", 2.5), (1, "y", 2.5)]
    assert not results_match(gold, crossed, ordered=False, columns="superset")
    assert not results_match(gold, list(reversed(turned)), ordered=True, columns="any_order")
    # One given column cannot stand for two.
    assert not results_match([(1, 1)], [(1, 2)], ordered=False, columns="superset")
    assert results_match([], [], ordered=False, columns="superset")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("ab")), max_size=5),
    st.permutations([0, 1, 2]),
)
def test_any_order_of_columns_is_found(rows: list[tuple[int, int, str]], order: list[int]) -> None:
    turned = [tuple(row[place] for place in order) for row in rows]
    assert results_match(rows, turned, ordered=True, columns="any_order")
    assert results_match(rows, [(*row, None) for row in turned], ordered=False, columns="superset")
    if order == [0, 1, 2]:
        assert rows_match(rows, turned, ordered=True)


@pytest.mark.parametrize("columns", ["same", "any_order", "superset"])
def test_the_grader_proves_itself_for_every_rule_of_columns(fruit_database: Path, columns: str) -> None:
    assert prove(SqlResult([fruit_database], columns=columns)).problems == ()  # type: ignore[arg-type]


def test_more_columns_may_be_shown(grade_text: GradeText, fruit_database: Path) -> None:
    wide = "SELECT price, id, name FROM fruit"
    assert grade_text(SqlResult([fruit_database]), wide, "SELECT name, price FROM fruit").score == 0.0
    assert (
        grade_text(SqlResult([fruit_database], columns="superset"), wide, "SELECT name, price FROM fruit").score == 1.0
    )
    with pytest.raises(ConfigError, match="columns must be"):
        SqlResult([fruit_database], columns="some")  # type: ignore[arg-type]


def _rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def _shop(path: Path) -> Path:
    connection = sqlite3.connect(path)
    with connection:
        connection.executescript(
            """
            CREATE TABLE maker (maker_id INTEGER PRIMARY KEY, name TEXT UNIQUE, city TEXT NOT NULL);
            CREATE TABLE item (id INTEGER PRIMARY KEY, maker_id INTEGER REFERENCES maker(maker_id), price REAL,
                               stock INTEGER CHECK (stock >= 0));
            CREATE TRIGGER loud AFTER UPDATE ON item BEGIN INSERT INTO maker VALUES (999, 'loud', 'x'); END;
            """
        )
        connection.executemany("INSERT INTO maker VALUES (?, ?, ?)", [(n, f"m{n}", "abc"[n % 3]) for n in range(12)])
        connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", [(n, n % 12, n * 1.5, n % 7) for n in range(40)])
    connection.close()
    return path


def test_copies_differ_and_keep_what_must_be_kept(tmp_path: Path) -> None:
    original = _shop(tmp_path / "shop.sqlite")
    before = original.read_bytes()
    copies = mutated_copies(original, tmp_path / "copies", num_copies=3, seed=1)
    assert [path.name for path in copies] == [f"shop.copy{n}.sqlite" for n in (1, 2, 3)]
    assert original.read_bytes() == before
    tables = [[_rows(path, f"SELECT * FROM {table}") for table in ("maker", "item")] for path in (original, *copies)]
    assert all(one != other for place, one in enumerate(tables) for other in tables[:place])
    for path in copies:
        assert _rows(path, "PRAGMA integrity_check") == [("ok",)]
        assert _rows(path, "SELECT count(*) FROM item WHERE stock < 0") == [(0,)]
        assert _rows(path, "SELECT count(*) FROM maker WHERE city IS NULL OR maker_id = 999") == [(0,)]
        joined = _rows(path, "SELECT count(*) FROM item JOIN maker USING (maker_id)")
        assert int(str(joined[0][0])) >= 20
        assert 30 <= int(str(_rows(path, "SELECT count(*) FROM item")[0][0])) <= 48
    again = mutated_copies(original, tmp_path / "again", num_copies=3, seed=1)
    assert [_rows(path, "SELECT * FROM item") for path in again] == [table[1] for table in tables[1:]]
    (tmp_path / "no.sqlite").write_text("x" * 5000)
    with pytest.raises(GradeError, match="cannot be copied"):
        mutated_copies(tmp_path / "no.sqlite", tmp_path)


def test_a_query_that_is_right_by_chance_is_found_out(tmp_path: Path) -> None:
    original = _shop(tmp_path / "shop.sqlite")
    task = Task(id="t", prompt="?", answer="SELECT count(*) FROM item WHERE price > 40")
    chance = f"SELECT {_rows(original, task.answer or '')[0][0]}"
    alone, several = SqlResult([original]), SqlResult([original, *mutated_copies(original, tmp_path)])
    scores = [asyncio.run(g.grade(trajectory_from_text(task, chance))).score for g in (alone, several)]
    assert scores == [1.0, 0.0]
    assert asyncio.run(several.grade(trajectory_from_text(task, task.answer or ""))).score == 1.0


def _defog(tmp_path: Path) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """Databases and questions of Defog's set; databases whose dates are relative to now are made afresh."""
    if not _FOLDER.exists():
        pytest.skip("no data folder text_to_sql/defog beside the repository")
    databases: dict[str, Path] = {}
    for packed in sorted(_FOLDER.glob("*.sqlite.gz")):
        databases[packed.name.partition(".")[0]] = path = tmp_path / packed.stem
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    for script in sorted(_FOLDER.glob("*.sqlite.sql")):
        databases[script.name.partition(".")[0]] = path = tmp_path / script.stem
        connection = sqlite3.connect(path)
        connection.executescript(script.read_text(encoding="utf-8"))
        connection.close()
    rows = []
    for name in ("questions_gen", "instruct_basic", "instruct_advanced"):
        lines = (_FOLDER / f"{name}_sqlite.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines]
    return databases, rows


@pytest.mark.slow
def test_every_gold_query_of_defog_passes_and_copies_find_more_mutants(tmp_path: Path) -> None:
    databases, rows = _defog(tmp_path)
    several = {
        name: [path, *mutated_copies(path, tmp_path / "copies", num_copies=2)] for name, path in databases.items()
    }
    own: list[Trajectory] = []
    mutants: list[Trajectory] = []
    for place, row in enumerate(rows):
        first, *others = alternatives(row["query"])
        facts = {"database": row["db_name"], "answers": others}
        task = Task(id=str(place), prompt=row["question"], answer=first, facts=facts)
        own += [trajectory_from_text(task, query) for query in (first, *others)]
        mutants += [trajectory_from_text(task, query) for query in sql_mutants(first)]

    def scores(databases: Any, trajectories: list[Trajectory]) -> list[Grade]:
        return asyncio.run(grade_all(SqlResult(databases, columns="superset"), trajectories, deadline_s=120))

    failed = [(t.text, g.error or g.rationale) for t, g in zip(own, scores(several, own), strict=True) if g.score != 1]
    assert failed == []
    assert len(rows) == 271
    ran = [grade for grade in scores(databases, mutants) if grade.parts.get("executes")]
    survive_one = sum(grade.score == 1 for grade in ran)
    survive_three = sum(grade.score == 1 for grade in scores(several, mutants))
    print(f"{len(own)} gold queries pass; {len(ran)} mutants run")
    print(f"{survive_one} of them pass on one database, {survive_three} on three")
    assert len(ran) >= 700
    assert survive_three < 0.8 * survive_one


def sql_mutants(query: str) -> list[str]:
    """Queries with one small change: what a model gets wrong."""
    changes = [
        (r">=", ">"), (r"(?<![<>!])>(?!=)", ">="), (r"\bAND\b", "OR"), (r"\bDISTINCT\b", ""), (r"\bMAX\(", "MIN("),
        (r"\bAVG\(", "SUM("), (r"\bSUM\(", "AVG("), (r"\bDESC\b", "ASC"), (r"\bASC\b", "DESC"),
        (r"\bLEFT JOIN\b", "JOIN"),
        (r"\bLIMIT (\d)\b", r"LIMIT 1\1"), (r"\bIN\b", "NOT IN"), (r"\bCOUNT\(DISTINCT ", "COUNT("),
        (r"\bHAVING\b[^)]*$", ""),
        (r"\bWHERE\b(?!.*\bGROUP\b).*$", ""), (r"(?<![\w.])(\d+)(?![\w.])", r"\g<1>1"), (r"'([A-Za-z ]+)'", r"'\1x'"),
    ]  # fmt: skip
    found = [re.sub(pattern, new, query, count=1, flags=re.IGNORECASE | re.DOTALL) for pattern, new in changes]
    return [mutant for mutant in dict.fromkeys(found) if mutant != query]
