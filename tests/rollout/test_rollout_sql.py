"""Databases to work with: SQLite through the grader's runner, PostgreSQL where a server is installed."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Sampling, Task, ToolCall
from posttrain.engine import ScriptedEngine
from posttrain.grade import PostgresDatabase, QueryLimits, QueryRunner
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer
from posttrain.rollout import EpisodeLimits, SqlTools, ToolError, TurnTokens, run_episodes, sql_environment

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
def shop(postgres_server: str) -> Iterator[PostgresDatabase]:
    """Two tables of a database, by a role that may read them."""
    import psycopg

    with psycopg.connect(f"{postgres_server} dbname=postgres", autocommit=True) as owner:
        owner.execute("CREATE DATABASE episode")
        owner.execute("CREATE ROLE episode_reader LOGIN")
    with psycopg.connect(f"{postgres_server} dbname=episode") as owner:
        owner.execute("CREATE TABLE maker (id INTEGER PRIMARY KEY, city VARCHAR(20) NOT NULL)")
        owner.execute("CREATE TABLE item (name TEXT, price NUMERIC(8, 2), maker INTEGER REFERENCES maker)")
        owner.execute("INSERT INTO maker VALUES (1, 'Kyoto'), (2, 'Delft')")
        owner.execute("INSERT INTO item VALUES ('tea', 3.25, 1), ('mug', 8, 2), ('pot', 20.5, 1)")
        owner.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO episode_reader")
    dsn = psycopg.conninfo.make_conninfo(postgres_server, dbname="episode", user="episode_reader")
    database = PostgresDatabase(dsn, limits=QueryLimits(timeout_s=5.0, max_rows=50))
    yield database
    database.close()
    with psycopg.connect(f"{postgres_server} dbname=postgres", autocommit=True) as owner:
        owner.execute("DROP DATABASE episode WITH (FORCE)")
        owner.execute("DROP ROLE episode_reader")


def test_an_episode_on_postgresql_looks_errs_is_refused_and_answers(shop: PostgresDatabase) -> None:
    says = iter(
        [
            call(),
            call(sql="SELECT cost FROM item"),
            call(sql="UPDATE item SET price = 0"),
            call(sql="SELECT pg_read_file('/etc/passwd')"),
            call(
                sql="SELECT m.city, sum(i.price) FROM item i JOIN maker m ON m.id = i.maker GROUP BY 1 ORDER BY 2 DESC"
            ),
            "Kyoto",
        ]
    )
    gold = "SELECT city, sum(price) FROM item JOIN maker ON id = maker GROUP BY city ORDER BY sum(price) DESC"

    def judge(task: Task, answer: str, used: SqlTools) -> float:
        return float(shop(used.last_query).rows == shop(gold).rows) / 2 + float(answer == task.answer) / 2

    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(says), TOKENIZER),
            [Task(id="city", prompt="Whose goods are worth most?", answer="Kyoto")],
            sql_environment(lambda task: shop, judge=judge, failed_reward=-0.125),
            Sampling(max_tokens=400, n=1),
            turns=TurnTokens(Renderer(TOKENIZER)),
            seed=0,
        )
    )
    (trajectory,) = group.trajectories
    assert trajectory.error is None
    assert [message.content for message in trajectory.messages if message.role == "tool"] == [
        "CREATE TABLE item (name text, price numeric(8,2), maker integer, FOREIGN KEY (maker) REFERENCES maker(id))\n"
        "CREATE TABLE maker (id integer NOT NULL, city character varying(20) NOT NULL, PRIMARY KEY (id))",
        'Error: column "cost" does not exist (line 1, at "cost FROM item")',
        "Error: not allowed: only a single SELECT may run, not 'UPDATE item SET pric'",
        "Error: not allowed: function pg_read_file",
        "Kyoto | 23.75\nDelft | 8",
    ]
    assert trajectory.metrics["reward"] == 1.0 - 3 * 0.125
    assert (trajectory.metrics["tools/calls"], trajectory.metrics["tools/failures"]) == (5, 3)


def test_episodes_on_postgresql_run_side_by_side(shop: PostgresDatabase) -> None:
    numbers = itertools.count()

    groups = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: call(sql=f"SELECT {next(numbers)} FROM item"), TOKENIZER),
            [Task(id=str(number), prompt="?") for number in range(12)],
            sql_environment(lambda task: shop, with_schema=False),
            Sampling(max_tokens=400, n=2),
            turns=TurnTokens(Renderer(TOKENIZER)),
            limits=EpisodeLimits(max_turns=2),
            seed=0,
        )
    )
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert len(trajectories) == 24
    assert all(trajectory.error is None for trajectory in trajectories)
    assert all(trajectory.metrics["tools/failures"] == 0 for trajectory in trajectories)
