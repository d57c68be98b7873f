"""Databases to work with: SQLite through the grader's runner, PostgreSQL where there is one."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import MissingExtraError, Sampling, Task, ToolCall, UsageError
from posttrain.engine import ScriptedEngine
from posttrain.grade import QueryLimits, QueryRunner
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer
from posttrain.rollout import PostgresQueries, SqlTools, ToolError, TurnTokens, run_episodes, sql_environment

TOKENIZER = Tokenizer.train_bpe(["SELECT name FROM item"], 300, ("<|im_end|>", "<|im_start|>"))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE item (name TEXT,\n price REAL, stock INTEGER);"
            "INSERT INTO item VALUES ('tea', 3.25, 4), ('mug', 8, NULL), ('pot', 20.125, 1);"
        )
    connection.close()
    return path


@pytest.fixture
def tools(database: Path) -> SqlTools:
    return SqlTools(partial(QueryRunner(QueryLimits(timeout_s=0.5)).run, database), max_rows=2, max_value=5)


def test_the_schema_and_rows_are_shown(tools: SqlTools) -> None:
    assert asyncio.run(tools.schema()) == "CREATE TABLE item (name TEXT, price REAL, stock INTEGER)"
    assert asyncio.run(tools.query("SELECT * FROM item WHERE name <> 'pot'")) == "tea | 3.25 | 4\nmug | 8 | NULL"
    assert tools.last_query == "SELECT * FROM item WHERE name <> 'pot'"
    assert asyncio.run(tools.query("SELECT name || ' of China', price FROM item")).split("\n") == [
        "tea o… | 3.25",
        "mug o… | 8",
        "… 1 rows more",
    ]
    assert asyncio.run(tools.query("SELECT 1 WHERE 0")) == "no rows"


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("SELECT colour FROM item", "no such column: colour"),
        ("DELETE FROM item", "not allowed"),
        ("PRAGMA table_info(item)", "not allowed"),
        ("SELECT load_extension('x')", "not allowed"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n", "timeout"),
    ],
)
def test_bad_queries_are_told_and_do_nothing(tools: SqlTools, sql: str, why: str) -> None:
    with pytest.raises(ToolError, match=why):
        asyncio.run(tools.query(sql))
    assert asyncio.run(tools.query("SELECT count(*) FROM item")) == "3"
    assert tools.last_query == "SELECT count(*) FROM item"


def call(**arguments: Any) -> str:
    name = "query" if arguments else "schema"
    return CALL_SYNTAXES["hermes"].write([ToolCall(name=name, arguments=arguments)])


def test_an_episode_looks_errs_and_tries_again(database: Path) -> None:
    says = iter([call(), call(sql="SELECT cost FROM item"), call(sql="SELECT max(price) FROM item"), "20.125"])
    runner = QueryRunner(QueryLimits())

    def judge(task: Task, answer: str, used: SqlTools) -> float:
        return float(answer == task.answer and "max" in used.last_query)

    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(says), TOKENIZER),
            [Task(id="dear", prompt="What does the dearest cost?", answer="20.125", facts={"db": str(database)})],
            sql_environment(lambda task: partial(runner.run, Path(task.facts["db"])), judge=judge, failed_reward=-0.25),
            Sampling(max_tokens=200, n=1),
            turns=TurnTokens(Renderer(TOKENIZER)),
            seed=0,
        )
    )
    (trajectory,) = group.trajectories
    told = [message.content for message in trajectory.messages if message.role == "tool"]
    assert (
        told
        == [
            "CREATE TABLE item (name TEXT, price REAL, stock INTEGER)",
            "Error: no such column: cost",
            "20.125",
        ]
        or told[2] == "20.125"
    )
    assert trajectory.metrics["reward"] == 0.75
    assert (trajectory.metrics["tools/calls"], trajectory.metrics["tools/failures"]) == (3, 1)


# PostgreSQL


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The DSN of a role that may read, on a server of our own: POSTTRAIN_TEST_POSTGRES names another."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (the extra postgres)")
    if named := os.environ.get("POSTTRAIN_TEST_POSTGRES"):
        yield named
        return
    binaries = [shutil.which("initdb"), shutil.which("postgres")]
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").exists() else []
    folder = Path(binaries[0]).parent if binaries[0] else (found[-1] if found else None)
    if folder is None:
        pytest.skip("no PostgreSQL server is installed (or name one: POSTTRAIN_TEST_POSTGRES)")
    place = Path(tempfile.mkdtemp(prefix="pg-"))  # a short path: that of a socket may have 107 characters
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = {"user": "nobody"}
        shutil.chown(place, "nobody")
    run = partial(subprocess.run, check=True, capture_output=True, cwd=place, timeout=120, **as_user)
    run([folder / "initdb", "-D", place / "data", "-U", "owner", "--auth=trust", "-N"])
    options = f"-k {place} -c listen_addresses='' -c fsync=off"
    run([folder / "pg_ctl", "-D", place / "data", "-w", "-l", place / "log", "-o", options, "start"])
    try:
        import psycopg

        with psycopg.connect(f"host={place} dbname=postgres user=owner", autocommit=True) as owner:
            owner.execute("CREATE TABLE item (name TEXT, price REAL)")
            owner.execute("INSERT INTO item VALUES ('tea', 3.25), ('mug', 8)")
            owner.execute("CREATE ROLE reader LOGIN")
            owner.execute("GRANT SELECT ON item TO reader")
        yield f"host={place} dbname=postgres user=reader"
    finally:
        run([folder / "pg_ctl", "-D", place / "data", "-m", "immediate", "stop"])
        shutil.rmtree(place, ignore_errors=True)


def test_postgres_reads(postgres: str) -> None:
    queries = PostgresQueries(postgres, timeout_s=1.0, max_rows=5)
    used = SqlTools(queries)
    assert asyncio.run(used.schema()) == "item(name text, price real)"
    assert asyncio.run(used.query("SELECT name, price FROM item ORDER BY price")) == "tea | 3.25\nmug | 8"
    assert asyncio.run(used.query("SELECT name FROM item WHERE name LIKE '%e%'")) == "tea"
    queries.close()


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("SELECT colour FROM item", 'column "colour" does not exist'),
        ("INSERT INTO item VALUES ('pot', 1)", "permission denied|read-only"),
        ("CREATE TEMP TABLE x (a INT)", "read-only"),
        ("SELECT 1; COMMIT; DROP TABLE item", "multiple commands"),
        ("COMMIT", "."),
        ("SELECT pg_sleep(30)", "statement timeout"),
        ("SELECT a.name FROM item a, item b, generate_series(1, 50) c", "too many rows"),
        ("SELECT pg_read_file('/etc/passwd')", "permission denied"),
        ("COPY item TO PROGRAM 'id'", "permission denied|must be superuser|COPY"),
    ],
)
def test_postgres_refuses(postgres: str, sql: str, why: str) -> None:
    queries = PostgresQueries(postgres, timeout_s=0.5, max_rows=50)
    with pytest.raises(ToolError, match=why):
        asyncio.run(SqlTools(queries).query(sql))
    assert queries("SELECT count(*) FROM item").rows == [(2,)], "it goes on, and nothing has changed"
    queries.close()


def test_a_superuser_is_refused(postgres: str) -> None:
    if "user=reader" not in postgres:
        pytest.skip("not our own server")
    with pytest.raises(UsageError, match="superuser"):
        PostgresQueries(postgres.replace("user=reader", "user=owner"))
    with pytest.raises(UsageError, match="cannot be used"):
        PostgresQueries(postgres.replace("user=reader", "user=nobody_at_all"))


def test_without_psycopg_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[postgres\]"):
        PostgresQueries("dbname=x")
