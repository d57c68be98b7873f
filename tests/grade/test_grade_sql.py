from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.core import ConfigError, Grade, GradeError, Task
from posttrain.grade import QueryLimits, QueryRunner, SqlResult, grade_all, rows_match, sql_in, trajectory_from_text
from posttrain.grade.sql_syntax import expansion, ordered_at_top

GradeText = Callable[..., Grade]


@pytest.mark.parametrize(
    ("gold", "given_rows", "ordered", "same"),
    [
        ([(1,), (2,)], [(2,), (1,)], False, True),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1,)], [(1,), (1,)], False, False),
        ([(1,)], [(1.0,)], False, True),
        ([(1,)], [(1.0,)], True, True),
        ([(1,)], [("1",)], False, False),
        ([(None,)], [(0,)], False, False),
        ([(None,)], [(None,)], True, True),
        ([("a",)], [("A",)], False, False),
        ([("a",)], [(b"a",)], False, False),
        ([(b"a",)], [(b"a",)], True, True),
        ([(1, "a")], [("a", 1)], False, False),
        ([(1, 2)], [(1,)], False, False),
        ([], [], True, True),
        ([(0.1 + 0.2, "x")], [(0.3, "x")], False, True),
        ([(0.1 + 0.2, "x")], [(0.3, "x")], True, True),
        ([(0.333,)], [(1 / 3,)], False, False),
        ([(10**15,)], [(10**15 + 1,)], False, False),  # two integers are never rounded
        # Sorted by number first, these would pair wrongly: 0.3 < 0.1 + 0.2.
        ([(0.1 + 0.2, "a"), (0.3, "b")], [(0.3, "a"), (0.1 + 0.2, "b")], False, True),
        ([(0.1 + 0.2, 1.0), (0.3, 2.0)], [(0.3, 1.0), (0.1 + 0.2, 2.0)], False, True),
        ([(0.1 + 0.2, 1.0), (0.3, 2.0)], [(0.3, 1.0), (0.1 + 0.2, 2.5)], False, False),
    ],
)
def test_rows_match_by_hand(gold: list[Any], given_rows: list[Any], ordered: bool, same: bool) -> None:
    assert rows_match(gold, given_rows, ordered=ordered) is same
    assert rows_match(given_rows, gold, ordered=ordered) is same


_VALUES = st.one_of(st.none(), st.integers(-3, 3), st.sampled_from([0.5, -1.0, 0.1]), st.sampled_from(["a", "b", ""]))


@given(st.lists(st.tuples(_VALUES, _VALUES), max_size=8), st.randoms(), st.data())
def test_rows_match_is_a_multiset_comparison(rows: list[Any], random: Any, data: st.DataObject) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    nudged = [tuple(v + 1e-13 if isinstance(v, float) else v for v in row) for row in shuffled]
    assert rows_match(rows, nudged, ordered=False)
    if rows:
        place = data.draw(st.integers(0, len(rows) - 1))
        changed = [*shuffled[:place], (shuffled[place][0], "changed"), *shuffled[place + 1 :]]
        assert not rows_match(rows, changed, ordered=False)


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT * FROM x", False),
        ("WITH x AS (SELECT a FROM t) SELECT * FROM x ORDER BY 1", True),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t /* ( */ ORDER /* x */ BY a", True),
        ("SELECT ' ORDER BY ' FROM t", False),
        ('SELECT "order" FROM t', False),
        ("SELECT a FROM t WHERE b = '(' ORDER BY a", True),
    ],
)
def test_order_counts_at_the_top_only(sql: str, ordered: bool) -> None:
    assert ordered_at_top(sql) is ordered


def test_expansion_by_hand() -> None:
    assert expansion("SELECT 1") == 0
    # a once, b = 1 + 2a = 3, c = 1 + 2b = 7
    chain = "WITH a AS (SELECT 1), b AS (SELECT * FROM a, a AS z), c AS (SELECT * FROM b x, b y) SELECT * FROM c"
    assert expansion(chain) == 7
    recursive = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 9) SELECT x FROM n"
    assert expansion(recursive) == 1


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("Here:\n```sql\nSELECT 1;\n```\nDone", "SELECT 1;"),
        ("```\nSELECT 1\n```\nbetter:\n```SQLite \nSELECT 2\n```", "SELECT 2"),
        ("```sql\nSELECT 1", "SELECT 1"),
        ("", ""),
    ],
)
def test_the_query_in_an_answer(text: str, sql: str) -> None:
    assert sql_in(text) == sql


GOLD = "SELECT name, price FROM fruit WHERE stock = 8"


@pytest.mark.parametrize(
    ("text", "score", "executes"),
    [
        ("SELECT name, price FROM fruit WHERE stock = 8", 1, 1),
        (
            "```sql\nSELECT f.name AS n, f.price p FROM fruit f WHERE f.stock IN (8, 9) ORDER BY id DESC;\n```",
            1,
            1,
        ),
        ("<think>SELECT 1?</think>\nSELECT name, price FROM fruit WHERE stock = 8 -- that is all", 1, 1),
        ("SELECT DISTINCT name, price FROM fruit WHERE stock = 8", 0, 1),
        ("SELECT price, name FROM fruit WHERE stock = 8", 0, 1),
        ("SELECT name FROM fruit WHERE stock = 8", 0, 1),
        ("SELECT name, price FROM fruit WHERE stock = 9", 0, 1),
        ("SELECT name, colour FROM fruit", 0, 0),
        ("SELEC name FROM fruit", 0, 0),
        ("", 0, 0),
        ("I do not know.", 0, 0),
    ],
)
def test_execution_accuracy(
    grade_text: GradeText, fruit_database: Path, text: str, score: float, executes: float
) -> None:
    grade = grade_text(SqlResult([fruit_database]), text, GOLD)
    assert (grade.score, grade.parts["executes"], grade.parts["match"]) == (score, executes, score)
    assert grade.parts["empty_gold"] == 0
    assert bool(grade.rationale) == (score == 0)


def test_what_went_wrong_is_said(grade_text: GradeText, fruit_database: Path) -> None:
    grader = SqlResult(fruit_database)
    assert "no such column: colour" in grade_text(grader, "SELECT colour FROM fruit", GOLD).rationale
    assert "syntax error" in grade_text(grader, "SELEC 1", GOLD).rationale
    assert "7 rows, 3 expected" in grade_text(grader, "SELECT name, price FROM fruit", GOLD).rationale


def test_order_counts_where_the_gold_query_orders(grade_text: GradeText, fruit_database: Path) -> None:
    gold, other = "SELECT id FROM fruit ORDER BY id DESC", "SELECT id FROM fruit ORDER BY id"
    assert grade_text(SqlResult([fruit_database]), other, gold).score == 0
    assert grade_text(SqlResult([fruit_database]), gold, other.partition(" ORDER")[0]).score == 1
    assert grade_text(SqlResult([fruit_database], ordered=False), other, gold).score == 1
    assert grade_text(SqlResult([fruit_database], ordered=True), gold, "SELECT id FROM fruit").score == 0


def test_a_second_database_tells_apart_what_agrees_by_chance(
    grade_text: GradeText, fruit_database: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    with connection:
        connection.execute("CREATE TABLE fruit (id INTEGER, name TEXT, price REAL, stock INTEGER)")
        connection.execute("INSERT INTO fruit VALUES (1, 'melon', 2.0, 8)")
    connection.close()
    gold, lucky = "SELECT count(*) FROM fruit WHERE stock = 8", "SELECT 3"
    assert grade_text(SqlResult([fruit_database]), lucky, gold).score == 1
    assert grade_text(SqlResult([fruit_database, other]), lucky, gold).score == 0
    assert grade_text(SqlResult([fruit_database, other]), gold, gold).score == 1


def test_databases_by_name_and_by_function(grade_text: GradeText, fruit_database: Path) -> None:
    by_name = SqlResult({"shop": fruit_database})
    assert grade_text(by_name, "SELECT 1", "SELECT 1", database="shop").score == 1
    with pytest.raises(GradeError, match=r"facts\['database'\] is 'farm'"):
        grade_text(by_name, "SELECT 1", "SELECT 1", database="farm")
    assert grade_text(SqlResult(lambda task: [fruit_database]), "SELECT 1", "SELECT 1").score == 1
    with pytest.raises(GradeError, match="no database"):
        grade_text(SqlResult([]), "SELECT 1", "SELECT 1")


def test_an_empty_gold_result_is_counted(grade_text: GradeText, fruit_database: Path) -> None:
    empty = "SELECT name FROM fruit WHERE price > 100"
    grade = grade_text(SqlResult([fruit_database]), "SELECT name FROM fruit WHERE 1 = 0", empty)
    assert (grade.score, grade.parts["empty_gold"]) == (1, 1)
    assert grade_text(SqlResult([fruit_database]), "SELECT 1", empty).parts["empty_gold"] == 1


def test_another_gold_query_may_be_right(grade_text: GradeText, fruit_database: Path) -> None:
    grader = SqlResult([fruit_database])
    assert grade_text(grader, "SELECT name, id FROM fruit", "SELECT id FROM fruit").score == 0
    also = ["SELECT name, id FROM fruit"]
    assert grade_text(grader, "SELECT name, id FROM fruit", "SELECT id FROM fruit", answers=also).score == 1


def test_a_query_that_runs_may_earn_something(grade_text: GradeText, fruit_database: Path) -> None:
    grader = SqlResult([fruit_database], executes_score=0.1)
    assert grade_text(grader, "SELECT 1", GOLD).score == pytest.approx(0.1)
    assert grade_text(grader, "SELECT nothing", GOLD).score == 0
    assert grade_text(grader, GOLD, GOLD).score == 1


def test_a_fault_of_the_gold_query_or_database_is_the_graders(
    grade_text: GradeText, fruit_database: Path, tmp_path: Path
) -> None:
    with pytest.raises(GradeError, match="its gold query fails on fruit"):
        grade_text(SqlResult([fruit_database]), GOLD, "SELECT colour FROM fruit")
    with pytest.raises(GradeError, match="no such database"):
        grade_text(SqlResult([tmp_path / "absent.sqlite"]), GOLD, GOLD)
    assert not (tmp_path / "absent.sqlite").exists()
    text = tmp_path / "notes.sqlite"
    text.write_text("this is no database, though its name says so" * 50)
    with pytest.raises(GradeError, match="cannot be opened"):
        grade_text(SqlResult([text]), GOLD, GOLD)
    with pytest.raises(ConfigError, match="ordered"):
        SqlResult([fruit_database], ordered="yes")  # type: ignore[arg-type]


def test_functions_that_are_replaced_answer_as_sqlite_does(fruit_database: Path) -> None:
    queries = [
        "SELECT printf('%08.2f|%-5s|%,d|%x', 3.14159, name, 1234567, 255) FROM fruit",
        "SELECT format('%s %s', NULL, 1.0), printf('%5.1f%%', 12.345)",
        "SELECT trim('xxaxyx', 'x'), ltrim('xya', 'yx'), rtrim('a..', '.'), trim('  a '), trim('a', '')",
        "SELECT trim(NULL, 'x'), trim(12.50, '0'), trim(100, '0'), trim('a', NULL)",
        "SELECT value FROM json_each('[1, \"a\", null]')",
    ]
    plain = sqlite3.connect(fruit_database)
    runner = QueryRunner(QueryLimits())
    for query in queries:
        assert runner.run(fruit_database, query).rows == tuple(plain.execute(query).fetchall()), query
    plain.close()


def test_virtual_tables_and_views_of_a_database_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE VIRTUAL TABLE notes USING fts5(body)")
        connection.execute("INSERT INTO notes VALUES ('red apple'), ('green pear')")
        connection.execute("CREATE VIEW shown AS SELECT upper(trim(body, 'e')) AS b FROM notes")
        connection.execute("CREATE TABLE odd (text BLOB)")
        connection.execute("INSERT INTO odd VALUES (CAST(x'ff41' AS TEXT))")  # no UTF-8
    connection.close()
    runner = QueryRunner(QueryLimits())
    assert runner.run(path, "SELECT body FROM notes WHERE notes MATCH 'pear'").rows == (("green pear",),)
    assert runner.run(path, "SELECT b FROM shown ORDER BY b").rows == (("GREEN PEAR",), ("RED APPL",))
    assert runner.run(path, "SELECT text FROM odd").rows == (("\udcffA",),)


def test_results_are_remembered_within_bounds_and_the_time_is_not(fruit_database: Path) -> None:
    runner = QueryRunner(QueryLimits(), remember_bytes=10_000)
    for number in range(100):
        runner.run(fruit_database, f"SELECT {number}")
    assert runner.remembered(fruit_database, "SELECT 99") is not None
    assert runner.remembered(fruit_database, "SELECT 0") is None
    assert runner._held_bytes <= 10_000
    runner.run(fruit_database, "SELECT datetime('now')")
    assert runner.remembered(fruit_database, "SELECT datetime('now')") is None


def test_many_databases_do_not_stay_open(fruit_database: Path, tmp_path: Path) -> None:
    runner = QueryRunner(QueryLimits())
    for number in range(40):
        copy = tmp_path / f"{number}.sqlite"
        copy.write_bytes(fruit_database.read_bytes())
        assert runner.run(copy, "SELECT count(*) FROM fruit").rows == ((7,),)
    assert len(runner._threads.sessions) <= 16


def test_threads_and_tasks_share_a_grader(fruit_database: Path) -> None:
    grader = SqlResult([fruit_database])
    task = Task(id="t", prompt="?", answer="SELECT id FROM fruit WHERE id < 3")
    texts = [f"SELECT id FROM fruit WHERE id < {number % 5}" for number in range(60)]
    scores: dict[int, list[float | None]] = {}

    def work(place: int) -> None:
        grades = asyncio.run(grade_all(grader, [trajectory_from_text(task, text) for text in texts], deadline_s=60))
        scores[place] = [grade.score for grade in grades]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(scores.values()) == [[float(number % 5 == 3) for number in range(60)]] * 4
