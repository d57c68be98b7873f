"""SQL grading on PostgreSQL: values, limits, threads, mutated copies, and Defog's questions in their own dialect."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import ConfigError, Grade, GradeError, MissingExtraError, Task, UsageError
from posttrain.grade import (
    PostgresDatabase,
    QueryLimits,
    SqlDatabase,
    SqliteDatabase,
    SqlResult,
    alternatives,
    grade_all,
    open_database,
    postgres_copies,
    prove,
    schema_text,
    trajectory_from_text,
)
from posttrain.grade.postgres_rows import row_reader

GradeText = Callable[..., Grade]
_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text_to_sql" / "defog"

SHOP = """
CREATE TYPE state AS ENUM ('new', 'used');
CREATE TABLE maker (maker_id INTEGER PRIMARY KEY, name TEXT UNIQUE, city TEXT NOT NULL);
CREATE TABLE item (id SERIAL PRIMARY KEY, maker_id INTEGER REFERENCES maker, price NUMERIC(8, 2),
                   stock INTEGER CHECK (stock >= 0), was state, made TIMESTAMP,
                   twice INTEGER GENERATED ALWAYS AS (2 * stock) STORED);
CREATE FUNCTION loud() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO maker VALUES (999, ''loud'', ''x''); RETURN NEW; END';
INSERT INTO maker SELECT n, 'm' || n, substr('abc', n % 3 + 1, 1) FROM generate_series(0, 11) n;
INSERT INTO item (maker_id, price, stock, was, made)
    SELECT n % 12, n * 1.5, n % 7, CASE WHEN n % 2 = 0 THEN 'new'::state END,
           timestamp '2024-01-01' + n * interval '1 day'
    FROM generate_series(0, 39) n;
CREATE TRIGGER loud AFTER UPDATE ON item FOR EACH ROW EXECUTE FUNCTION loud();
CREATE SCHEMA "Other One";
CREATE TABLE "Other One".note (text TEXT);
INSERT INTO "Other One".note VALUES ('here');
"""


class Server:
    """A server, a role that may read, and the databases that are made for a module of tests."""

    def __init__(self, dsn: str) -> None:
        import psycopg

        self.psycopg, self.dsn, self.made = psycopg, dsn, list[str]()
        self.execute("CREATE ROLE grade_reader LOGIN")

    def execute(self, sql: str, database: str = "postgres") -> None:
        with self.psycopg.connect(f"{self.dsn} dbname={database}", autocommit=True) as connection:
            connection.execute(sql)

    def rows(self, sql: str, database: str) -> list[tuple[Any, ...]]:
        with self.psycopg.connect(f"{self.dsn} dbname={database}") as connection:
            found: list[tuple[Any, ...]] = connection.execute(sql).fetchall()
            return found

    def create(self, name: str, script: str) -> str:
        """A database from a script, which the reader may read; its DSN by that role."""
        self.execute(f"CREATE DATABASE {name}")
        self.made += [name]
        with self.psycopg.connect(f"{self.dsn} dbname={name}") as connection:
            connection.execute(script)
            schemas = "SELECT DISTINCT schemaname FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema$)'"
            for (schema,) in connection.execute(schemas).fetchall():
                connection.execute(f'GRANT USAGE ON SCHEMA "{schema}" TO grade_reader')
                connection.execute(f'GRANT SELECT ON ALL TABLES IN SCHEMA "{schema}" TO grade_reader')
        reader: str = self.psycopg.conninfo.make_conninfo(self.dsn, dbname=name, user="grade_reader")
        return reader

    def drop(self) -> None:
        for name in self.made:
            for copy in (name, f"{name}_copy1", f"{name}_copy2", f"{name}_copy3"):
                self.execute(f"DROP DATABASE IF EXISTS {copy} WITH (FORCE)")
        self.execute("DROP ROLE grade_reader")


@pytest.fixture(scope="module")
def server(postgres_server: str) -> Iterator[Server]:
    made = Server(postgres_server)
    yield made
    made.drop()


@pytest.fixture(scope="module")
def shop(server: Server) -> Iterator[PostgresDatabase]:
    """After two copies were made of it: nobody may be connected then."""
    reader = server.create("shop", SHOP)
    postgres_copies(f"{server.dsn} dbname=shop", 2, seed=1)
    database = PostgresDatabase(reader, limits=QueryLimits(timeout_s=5.0))
    yield database
    database.close()


def test_values_by_hand() -> None:
    read = row_reader([20, 701, 1700, 1700, 16, 1114, 1114, 1184, 17, 1042, 25, 1082, 1186])
    texts = ["7", "0.5", "8.00", "8.25", "t", "2024-01-02 00:00:00", "2024-01-02 03:04:05.5", "2024-01-02 00:00:00+00"]
    row = read([*texts, "\\x00ff", "ab  ", " x ", "2024-01-02", "1 mon 2 days"])
    assert row == (
        *(7, 0.5, 8, 8.25, "true", "2024-01-02", "2024-01-02 03:04:05.5", "2024-01-02"),
        *(b"\x00\xff", "ab", " x ", "2024-01-02", "1 mon 2 days"),
    )
    assert [type(value) for value in row[:4]] == [int, float, int, float]
    assert read([None] * 13) == (None,) * 13
    assert row_reader([701, 1700, 1700])(["NaN", "NaN", "-Infinity"]) == ("NaN", "NaN", float("-inf"))
    assert row_reader([1700])(["1" + "0" * 400]) == ("1" + "0" * 400,)


@pytest.mark.parametrize(
    ("gold", "given_sql", "same"),
    [
        ("SELECT 1.50::numeric", "SELECT 1.5::float8", True),
        ("SELECT 3", "SELECT 3.00::numeric(9, 2)", True),
        ("SELECT 3::bigint", "SELECT 3::smallint", True),
        ("SELECT 0.1::numeric + 0.2", "SELECT 0.1::float8 + 0.2::float8", True),
        ("SELECT 1::numeric / 3", "SELECT 0.33", False),
        ("SELECT 12345678901234567890::numeric", "SELECT 12345678901234567891::numeric", False),
        ("SELECT NULL::int", "SELECT NULL::text", True),
        ("SELECT NULL::int", "SELECT 0", False),
        ("SELECT NULL::text", "SELECT ''", False),
        ("SELECT 'NaN'::numeric", "SELECT 'NaN'::float8", True),
        ("SELECT '1'", "SELECT 1", False),
        ("SELECT true", "SELECT 1 = 1", True),
        ("SELECT true", "SELECT false", False),
        ("SELECT date '2024-01-02'", "SELECT date_trunc('day', timestamp '2024-01-02 10:00')", True),
        ("SELECT timestamptz '2024-01-02 12:00+02'", "SELECT timestamp '2024-01-02 10:00'", True),
        ("SELECT timestamp '2024-01-02 10:00'", "SELECT timestamp '2024-01-02 10:01'", False),
        ("SELECT date 'infinity'", "SELECT timestamp 'infinity'", True),
        ("SELECT date '0044-03-15 BC'", "SELECT date '0044-03-15 BC'", True),
        ("SELECT 'ab'::char(5)", "SELECT 'ab'", True),
        ("SELECT '{\"a\": 1}'::jsonb", "SELECT '{\"a\":1}'::jsonb", True),
        ("SELECT ARRAY[1, 2]", "SELECT ARRAY[2, 1]", False),
        ("SELECT '\\x00'::bytea", "SELECT decode('00', 'hex')", True),
        ("VALUES (1, 'a'), (1, 'a'), (2, NULL)", "VALUES (2, NULL), (1, 'a'), (1, 'a')", True),
        ("VALUES (1, 'a'), (1, 'a'), (2, NULL)", "VALUES (2, NULL), (1, 'a')", False),
        ("SELECT x FROM (VALUES (1), (2)) v(x) ORDER BY x", "SELECT x FROM (VALUES (2), (1)) v(x)", False),
        ("SELECT x FROM (VALUES (1), (2)) v(x) ORDER BY x", "VALUES (1), (2)", True),
        ("SELECT x FROM (VALUES (1), (NULL)) v(x) ORDER BY x NULLS FIRST", "VALUES (NULL), (1)", True),
        ("SELECT 1 AS a, 2 AS a", "SELECT 1, 2", True),
    ],
)
def test_results_as_postgresql_compares_them(
    shop: PostgresDatabase, grade_text: GradeText, gold: str, given_sql: str, same: bool
) -> None:
    grade = grade_text(SqlResult(shop), given_sql, gold)
    assert (grade.score, grade.parts["executes"]) == (float(same), 1.0), grade.rationale


def test_the_grader_proves_itself(shop: PostgresDatabase) -> None:
    for columns in ("same", "any_order", "superset"):
        assert prove(SqlResult([shop], columns=columns)).problems == ()  # type: ignore[arg-type]


def test_both_kinds_of_database_are_one_to_the_grader(
    shop: PostgresDatabase, fruit_database: Path, grade_text: GradeText
) -> None:
    lite = SqliteDatabase(fruit_database)
    assert isinstance(shop, SqlDatabase)
    assert isinstance(lite, SqlDatabase)
    assert schema_text(lite).startswith("CREATE TABLE fruit (id INTEGER PRIMARY KEY")
    both = SqlResult({"shop": shop, "fruit": [lite, fruit_database]})
    assert grade_text(both, "SELECT count(*) FROM item", "SELECT 40", database="shop").score == 1
    assert grade_text(both, "SELECT count(*) FROM fruit", "SELECT 7", database="fruit").score == 1
    assert grade_text(SqlResult(lambda task: shop), "SELECT 1", "SELECT 1").score == 1
    assert grade_text(SqlResult(lite), "SELECT 1", "SELECT 1").score == 1
    with pytest.raises(ConfigError):
        SqlResult(shop, ordered="sometimes")  # type: ignore[arg-type]


def test_the_tables_are_told(shop: PostgresDatabase) -> None:
    item, maker = schema_text(shop).split("\n")
    assert item.startswith(
        "CREATE TABLE item (id integer NOT NULL, maker_id integer, price numeric(8,2), stock integer"
    )
    assert "was state CHECK IN ('new', 'used')" in item
    assert item.endswith("PRIMARY KEY (id), FOREIGN KEY (maker_id) REFERENCES maker(maker_id))")
    assert maker == (
        "CREATE TABLE maker (maker_id integer NOT NULL, name text, city text NOT NULL, UNIQUE (name), "
        "PRIMARY KEY (maker_id))"
    )


def test_tables_are_looked_for_where_one_says(shop: PostgresDatabase) -> None:
    assert shop.run('SELECT text FROM "Other One".note').rows == (("here",),)
    other = PostgresDatabase(shop.dsn, schemas=["Other One", "public"])
    assert other.run("SELECT text FROM note").rows == (("here",),)
    assert "note (text text)" in schema_text(other)
    other.close()


def test_what_went_wrong_is_said_and_where(shop: PostgresDatabase, grade_text: GradeText) -> None:
    told = shop.run("SELECT id,\n       prise\nFROM item").error or ""
    assert told == (
        'column "prise" does not exist (line 2, at "prise"). Perhaps you meant to reference the column "item.price"'
    )
    assert "syntax error" in (shop.run("SELECT FROM WHERE").error or "")
    assert 'relation "items" does not exist' in grade_text(SqlResult(shop), "SELECT 1 FROM items", "SELECT 1").rationale
    with pytest.raises(GradeError, match="its gold query fails on shop: column"):
        grade_text(SqlResult(shop), "SELECT 1", "SELECT colour FROM item")


def test_limits(server: Server, shop: PostgresDatabase) -> None:
    small = PostgresDatabase(shop.dsn, limits=QueryLimits(max_rows=40, max_value_bytes=200, max_result_bytes=5_000))
    assert len(small.run("SELECT id FROM item").rows or ()) == 40
    assert small.run("SELECT id FROM item UNION ALL SELECT 0").error == "too many rows: more than 40"
    assert small.run("SELECT lpad('', 300)").error == "the row is too large: more than 200 bytes"
    assert small.run("SELECT lpad('', 150) FROM item").error == "result too large: more than 5000 bytes"
    assert small.run("SELECT 1" + " " * 20_000).error == "the query is longer than 20000 characters"
    small.close()


def test_results_are_remembered_while_they_hold(shop: PostgresDatabase) -> None:
    first = shop.run("SELECT count(*) FROM maker")
    assert shop.remembered("SELECT count(*) FROM maker") is first
    shop.run("SELECT now()")
    assert shop.remembered("SELECT now()") is None
    assert shop.remembered("SELECT 4711") is None
    forgetful = PostgresDatabase(shop.dsn, remember_bytes=10_000)
    for number in range(100):
        forgetful.run(f"SELECT {number}")
    assert forgetful._held_bytes <= 10_000
    assert forgetful.remembered("SELECT 99") is not None
    forgetful.close()


def test_threads_share_a_few_connections(server: Server, shop: PostgresDatabase) -> None:
    few = PostgresDatabase(shop.dsn, max_connections=2, limits=QueryLimits(timeout_s=10.0))
    several = [few, few.at("shop_copy1"), few.at("shop_copy2")]
    grader = SqlResult(several)
    task = Task(id="t", prompt="?", answer="SELECT maker_id FROM maker WHERE maker_id < 3")
    texts = [f"SELECT maker_id FROM maker WHERE maker_id < {number % 5}" for number in range(40)]
    scores: dict[int, list[float | None]] = {}

    def work(place: int) -> None:
        grades = asyncio.run(grade_all(grader, [trajectory_from_text(task, text) for text in texts], deadline_s=60))
        scores[place] = [grade.score for grade in grades]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(scores.values()) == [[float(number % 5 == 3) for number in range(40)]] * 4
    opened = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'grade_reader' AND datname LIKE 'shop_copy%'"
    assert server.rows(opened, "postgres")[0][0] <= 2
    few.close()
    assert few.run("SELECT 17").rows == ((17,),)
    few.close()


def test_a_lost_connection_is_made_again_and_a_lost_server_is_no_fault_of_the_query(
    server: Server, shop: PostgresDatabase, grade_text: GradeText
) -> None:
    lone = PostgresDatabase(shop.dsn)
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'grade_reader'")
    assert lone.run("SELECT 1").rows == ((1,),)
    server.execute("ALTER ROLE grade_reader NOLOGIN")
    lone.close()
    try:
        with pytest.raises(GradeError, match="cannot be reached"):
            grade_text(SqlResult(lone), "SELECT 2", "SELECT 2")
    finally:
        server.execute("ALTER ROLE grade_reader LOGIN")
    assert grade_text(SqlResult(lone), "SELECT 2", "SELECT 2").score == 1
    lone.close()


def test_who_may_do_too_much_is_refused_and_who_cannot_come_is_told(server: Server, shop: PostgresDatabase) -> None:
    with pytest.raises(UsageError, match="may only read"):
        PostgresDatabase(f"{server.dsn} dbname=shop")
    server.execute("GRANT pg_read_server_files TO grade_reader")
    try:
        with pytest.raises(UsageError, match="pg_read_server_files"):
            PostgresDatabase(shop.dsn)
    finally:
        server.execute("REVOKE pg_read_server_files FROM grade_reader")
    with pytest.raises(UsageError, match=r"postgres\.sh start") as raised:
        PostgresDatabase("host=/nowhere dbname=x user=y password=swordfish")
    assert "swordfish" not in str(raised.value)
    with pytest.raises(UsageError, match="cannot be reached"):
        open_database("postgresql:///shop?host=/nowhere")


def test_databases_by_words(shop: PostgresDatabase, fruit_database: Path) -> None:
    assert open_database(str(fruit_database)).run("SELECT count(*) FROM fruit").rows == ((7,),)
    by_words = open_database(shop.dsn)
    assert isinstance(by_words, PostgresDatabase)
    by_words.close()
    with pytest.raises(UsageError, match=r"no such database absent\.db"):
        open_database("absent.db")


def test_without_psycopg_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[postgres\]"):
        PostgresDatabase("dbname=x")


def test_copies_differ_and_keep_what_must_be_kept(server: Server, shop: PostgresDatabase) -> None:
    names = ["shop", "shop_copy1", "shop_copy2"]
    tables = [
        [server.rows(f"SELECT * FROM {table} ORDER BY 1, 2", name) for table in ("maker", "item")] for name in names
    ]
    assert len(tables[0][1]) == 40
    assert all(one != other for place, one in enumerate(tables) for other in tables[:place])
    for name in names[1:]:
        assert server.rows("SELECT count(*) FROM maker WHERE maker_id = 999", name) == [(0,)]
        assert server.rows("SELECT count(*) FROM item JOIN maker USING (maker_id)", name)[0][0] >= 20
        assert 30 <= server.rows("SELECT count(*) FROM item", name)[0][0] <= 48
        assert shop.at(name).run("SELECT count(*) FROM item WHERE stock < 0").rows == ((0,),)
    server.create("again", SHOP)
    assert postgres_copies(f"{server.dsn} dbname=again", 2, seed=1) == ["again_copy1", "again_copy2"]
    assert server.rows("SELECT * FROM item ORDER BY 1, 2", "again_copy2") == tables[2][1]
    with pytest.raises(GradeError, match="cannot be copied"):
        postgres_copies(f"{server.dsn} dbname=absent")


def test_queries_that_are_right_by_accident_are_found_out(shop: PostgresDatabase, grade_text: GradeText) -> None:
    gold = "SELECT count(*) FROM item WHERE price > 40"
    count = (shop.run(gold).rows or ())[0][0]
    alone, several = SqlResult(shop), SqlResult([shop, shop.at("shop_copy1"), shop.at("shop_copy2")])
    for lucky in (
        f"SELECT {count}",
        "SELECT count(*) FROM item WHERE id > 27",
        "SELECT count(price) FROM item WHERE id > 27",
    ):
        assert [grade_text(grader, lucky, gold).score for grader in (alone, several)] == [1.0, 0.0]
    same = "SELECT sum(CASE WHEN price > 40 THEN 1 ELSE 0 END) FROM item"
    assert [grade_text(grader, same, gold).score for grader in (alone, several)] == [1.0, 1.0]


def test_a_copy_on_which_a_gold_query_fails_is_made_again(server: Server) -> None:
    server.create("lone", "CREATE TABLE t (name TEXT); INSERT INTO t SELECT 'n' || n FROM generate_series(1, 9) n")
    gold = "SELECT (SELECT name FROM t WHERE name = 'n3')"
    for name in postgres_copies(f"{server.dsn} dbname=lone", 3, queries=[gold]):
        assert len(server.rows(gold, name)) == 1
    with pytest.raises(GradeError, match="none of 5 copies"):
        postgres_copies(f"{server.dsn} dbname=lone", 1, queries=["SELECT nothing FROM t"])


@pytest.mark.slow
def test_every_gold_query_of_defog_passes_in_its_own_dialect(server: Server) -> None:
    if not _FOLDER.exists():
        pytest.skip("no data folder text_to_sql/defog beside the repository")
    rows = [
        json.loads(line)
        for name in ("questions_gen", "instruct_basic", "instruct_advanced")
        for line in (_FOLDER / f"{name}_postgres.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    names = sorted({row["db_name"] for row in rows})
    first: PostgresDatabase | None = None
    databases: dict[str, list[PostgresDatabase]] = {}
    for name in names:
        reader = server.create(name, (_FOLDER / f"{name}.sql").read_text(encoding="utf-8"))
        golds = [query for row in rows if row["db_name"] == name for query in alternatives(row["query"])]
        copies = postgres_copies(f"{server.dsn} dbname={name}", 2, queries=golds)
        first = first or PostgresDatabase(reader, limits=QueryLimits(timeout_s=20.0))
        databases[name] = [first.at(each) for each in (name, *copies)]
    trajectories, turned = [], []
    for place, row in enumerate(rows):
        query, *others = alternatives(row["query"])
        facts = {"database": row["db_name"], "answers": others}
        task = Task(id=str(place), prompt=row["question"], answer=query, facts=facts)
        trajectories += [trajectory_from_text(task, text) for text in (query, *others)]
        turned += [trajectory_from_text(task, f"SELECT * FROM ({query.rstrip(' ;')}) AS wrong LIMIT 0")]

    def graded(databases: Any, trajectories: list[Any]) -> list[Grade]:
        return asyncio.run(grade_all(SqlResult(databases, columns="superset"), trajectories, deadline_s=120))

    grades = graded(databases, trajectories)
    failed = [(t.text, g.error or g.rationale) for t, g in zip(trajectories, grades, strict=True) if g.score != 1]
    assert failed == []
    assert (len(names), len(rows), len(trajectories)) == (11, 273, 416)
    # A query that gives nothing is right only where nothing is.
    emptied = graded(databases, turned)
    assert all(grade.parts["executes"] == 1 for grade in emptied)
    assert all((grade.score == 1) == (grade.parts["empty_gold"] == 1) for grade in emptied)
    assert sum(grade.score == 0 for grade in emptied) > 250
    print(
        f"{len(rows)} questions, {len(trajectories)} gold queries pass on {len(names)} databases and two copies of each"
    )
    assert first is not None
    first.close()
