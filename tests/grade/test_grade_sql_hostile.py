"""Queries that want to write, read elsewhere, never end, or fill the memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.core import Grade
from posttrain.grade import QueryLimits, QueryRunner, SqlResult

COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
CHAIN = ", ".join(f"c{i} AS (SELECT x.v FROM c{i - 1} x, c{i - 1} y)" for i in range(1, 40))
QUOTED = ", ".join(f'[c{i}](v) AS NOT MATERIALIZED (SELECT x.v FROM "c{i - 1}" x, `c{i - 1}`)' for i in range(1, 40))
REPLACED = "replace(" * 6 + "'aaaaaaaaaa'" + ", 'a', 'aaaaaaaaaa')" * 6

FORBIDDEN = {
    "attach": "ATTACH DATABASE 'stolen.sqlite' AS stolen",
    "detach": "DETACH DATABASE main",
    "pragma": "PRAGMA writable_schema = 1",
    "pragma read": "PRAGMA database_list",
    "pragma function": "SELECT file FROM pragma_database_list",
    "vacuum": "VACUUM INTO 'copy.sqlite'",
    "drop": "DROP TABLE fruit",
    "insert": "INSERT INTO fruit (name) VALUES ('rot')",
    "update": "UPDATE fruit SET price = 0",
    "delete": "DELETE FROM fruit",
    "delete returning": "DELETE FROM fruit RETURNING name",
    "replace": "REPLACE INTO fruit (id, name) VALUES (1, 'rot')",
    "insert with": "WITH x AS (SELECT 1) INSERT INTO fruit (name) SELECT 'rot' FROM x",
    "create": "CREATE TABLE loot AS SELECT * FROM fruit",
    "create temp": "CREATE TEMP TABLE loot AS SELECT * FROM fruit",
    "virtual table": "CREATE VIRTUAL TABLE temp.v USING fts5(x)",
    "trigger": "CREATE TRIGGER t AFTER INSERT ON fruit BEGIN SELECT 1; END",
    "alter": "ALTER TABLE fruit RENAME TO loot",
    "analyse": "ANALYZE",
    "begin": "BEGIN EXCLUSIVE",
    "savepoint": "SAVEPOINT s",
    "load_extension": "SELECT load_extension('/tmp/evil.so')",
    "fts3_tokenizer": "SELECT fts3_tokenizer('simple')",
    "readfile": "SELECT readfile('/etc/hostname')",
    "writefile": "SELECT writefile('loot.txt', 'x')",
    "dbstat": "SELECT * FROM dbstat",
    "statements": "SELECT * FROM sqlite_stmt",
    "second statement": "SELECT 1; DROP TABLE fruit",
    "second select": "SELECT 1; SELECT 2",
    "in a comment": "/* SELECT */ DROP /* nothing */ TABLE fruit",
    "after a comment": "-- SELECT 1\nDELETE FROM fruit",
    "explain": "/**/ EXPLAIN SELECT 1",
    "nul": "SELECT 1\0; DROP TABLE fruit",
    "surrogate": "SELECT '\ud800'",
    "nothing": " ; -- nothing",
    "randomblob": "SELECT length(randomblob(1000000000))",
    "random": "SELECT random()",
}

TOO_LARGE = {
    "zeroblob": "SELECT length(hex(zeroblob(1000000000)))",
    "printf width": "SELECT length(printf('%1000000000d', 1))",
    "printf star": "SELECT length(printf('%.*c', 1000000000, 'x'))",
    "format width": "SELECT length(format('%-01000000000d', 1))",
    "replace": f"SELECT length({REPLACED})",
    "concatenation": f"SELECT {' || '.join(['hex(zeroblob(40000))'] * 40)}",
    "rows": f"{COUNT} SELECT x FROM c",
    "large rows": f"{COUNT} SELECT hex(zeroblob(40000)) FROM c",
    "columns": f"SELECT {', '.join(['1'] * 5000)}",
    "terms": " UNION ALL ".join(["SELECT 1"] * 1000),
    "depth": "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "text": "SELECT '" + "x" * 100_000 + "'",
    "tables multiply": f"WITH c0 AS (SELECT 1 AS v), {CHAIN} SELECT count(*) FROM c39 LIMIT 0",
    "quoted tables multiply": f"WITH 'c0' AS (SELECT 1 AS v), {QUOTED} SELECT count(*) FROM c39 LIMIT 0",
    "function calls": f"SELECT {' + '.join(['instr(name, name)'] * 150)} FROM fruit",
}

ENDLESS = {
    "recursion": f"{COUNT} SELECT count(*) FROM c",
    "cross join": f"SELECT count(*) FROM {', '.join(f'fruit f{i}' for i in range(14))}",
    "sort": f"{COUNT} SELECT x FROM (SELECT x, hex(zeroblob(20000)) || x AS b FROM c) ORDER BY b",
    "distinct": f"{COUNT} SELECT count(*) FROM (SELECT DISTINCT hex(zeroblob(40000)) || x FROM c)",
    "aggregate": f"{COUNT} SELECT max(json_group_array(x)) OVER () FROM c",
    "instr": f"{COUNT} SELECT sum(instr(hex(zeroblob(40000)) || x, hex(zeroblob(20000)) || '1')) FROM c",
    "trim": f"{COUNT} SELECT sum(length(trim(hex(zeroblob(40000)) || x, hex(zeroblob(40000)) || '1'))) FROM c",
    "like": f"{COUNT} SELECT count(*) FROM c WHERE hex(zeroblob(40000)) || x LIKE '{'%0_' * 300}z'",
    "planner": f"SELECT count(*) FROM {', '.join(f'fruit f{i}' for i in range(60))} "
    f"WHERE {' AND '.join(f'(f{i}.id = f{i + 1}.id OR f{i}.name = f{(i + 7) % 60}.name)' for i in range(59))}",
}


@pytest.fixture
def runner() -> QueryRunner:
    return QueryRunner(QueryLimits(timeout_s=0.1, max_rows=1000))


@pytest.fixture(autouse=True)
def _unharmed(fruit_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Whatever runs, the database keeps its bytes, nothing new lies beside it, and it still answers."""
    monkeypatch.chdir(tmp_path)
    before = fruit_database.read_bytes()
    yield
    assert fruit_database.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [fruit_database.name]


def _refused(runner: QueryRunner, database: Path, sql: str, *, cpu_s: float) -> str:
    started_s = time.thread_time()
    result = runner.run(database, sql)
    assert time.thread_time() - started_s < cpu_s
    assert result.rows is None
    assert result.error
    assert runner.run(database, "SELECT count(*) FROM fruit").rows == ((7,),)
    return result.error


@pytest.mark.parametrize("sql", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_only_one_harmless_select_runs(runner: QueryRunner, fruit_database: Path, sql: str) -> None:
    _refused(runner, fruit_database, sql, cpu_s=0.5)


@pytest.mark.parametrize("sql", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_size_is_limited(runner: QueryRunner, fruit_database: Path, sql: str) -> None:
    _refused(runner, fruit_database, sql, cpu_s=1.0)


@pytest.mark.parametrize("sql", ENDLESS.values(), ids=ENDLESS.keys())
def test_time_is_limited(runner: QueryRunner, fruit_database: Path, sql: str) -> None:
    error = _refused(runner, fruit_database, sql, cpu_s=2.0)
    assert error.startswith("timeout")


def test_the_model_pays_for_what_its_query_does(grade_text: Callable[..., Grade], fruit_database: Path) -> None:
    grader = SqlResult([fruit_database], timeout_s=0.1)
    stopped = grade_text(grader, ENDLESS["recursion"], "SELECT 1")
    assert (stopped.score, stopped.parts["timeout"], stopped.parts["executes"]) == (0, 1, 0)
    refused = grade_text(grader, FORBIDDEN["delete"], "SELECT 1")
    assert (refused.score, refused.parts["timeout"]) == (0, 0)
    assert "only a single SELECT may run" in refused.rationale
