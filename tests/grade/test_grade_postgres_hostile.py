"""Queries to PostgreSQL that want to write, read elsewhere, never end, or fill the memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from posttrain.core import Grade
from posttrain.grade import PostgresDatabase, QueryLimits, SqlResult
from posttrain.grade.postgres_syntax import Forbidden, Refused, authorised, tokens

COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"

FORBIDDEN = {
    "insert": "INSERT INTO fruit (name) VALUES ('rot')",
    "update": "UPDATE fruit SET price = 0",
    "delete": "DELETE FROM fruit",
    "delete returning": "DELETE FROM fruit RETURNING name",
    "insert with": "WITH x AS (SELECT 1) INSERT INTO fruit (name) SELECT 'rot' FROM x",
    "delete in with": "WITH x AS (DELETE FROM fruit RETURNING name) SELECT name FROM x",
    "merge": "MERGE INTO fruit USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE",
    "truncate": "TRUNCATE fruit",
    "drop": "DROP TABLE fruit",
    "create": "CREATE TABLE loot AS SELECT * FROM fruit",
    "create temp": "CREATE TEMP TABLE loot AS SELECT * FROM fruit",
    "create function": "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "create role": "CREATE ROLE thief SUPERUSER LOGIN",
    "extension": "CREATE EXTENSION dblink",
    "select into": "SELECT * INTO loot FROM fruit",
    "for update": "SELECT * FROM fruit FOR UPDATE",
    "for share": "(SELECT * FROM fruit FOR SHARE)",
    "lock": "LOCK TABLE fruit IN ACCESS EXCLUSIVE MODE",
    "copy out": "COPY fruit TO '/tmp/loot'",
    "copy program": "COPY fruit TO PROGRAM 'id > /tmp/loot'",
    "copy in": "COPY fruit FROM STDIN",
    "do": "DO $$ BEGIN DELETE FROM fruit; END $$",
    "call": "CALL p()",
    "set": "SET default_transaction_read_only = off",
    "set transaction": "SET TRANSACTION READ WRITE",
    "set role": "SET ROLE owner",
    "set timeout": "SET statement_timeout = 0",
    "reset": "RESET ALL",
    "set_config": "SELECT set_config('transaction_read_only', 'off', false)",
    "set_config quoted": """SELECT pg_catalog . "set_config" ('statement_timeout', '0', false)""",
    "begin": "BEGIN READ WRITE",
    "commit": "COMMIT",
    "prepare": "PREPARE p AS DELETE FROM fruit",
    "execute": "EXECUTE p",
    "declare": "DECLARE c CURSOR WITH HOLD FOR SELECT * FROM fruit",
    "explain": "EXPLAIN SELECT 1",
    "explain analyse": "EXPLAIN (ANALYZE) DELETE FROM fruit",
    "show": "SHOW data_directory",
    "listen": "LISTEN x",
    "notify": "NOTIFY x",
    "vacuum": "VACUUM fruit",
    "grant": "GRANT ALL ON fruit TO public",
    "second statement": "SELECT 1; DROP TABLE fruit",
    "second select": "SELECT 1; SELECT 2",
    "commit first": "SELECT 1; COMMIT; DELETE FROM fruit",
    "out of the parentheses": "SELECT 1) AS x; DELETE FROM fruit; SELECT * FROM (SELECT 1",
    "parentheses turned": "SELECT 1) AS a CROSS JOIN (SELECT 2",
    "in a comment": "/* SELECT */ DROP /* nothing */ TABLE fruit",
    "after a comment": "-- SELECT 1\nDELETE FROM fruit",
    "nested comment": "/* /* */ SELECT 1 */ DELETE FROM fruit",
    "sleep": "SELECT pg_sleep(30)",
    "sleep in a list": "SELECT DISTINCT ON (1) pg_sleep(30)",
    "sleep in capitals": "SELECT PG_CATALOG.PG_SLEEP(30)",
    "sleep spread": "SELECT pg_sleep /* x */\n-- y\n (30)",
    "sleep after a tricked text": r"SELECT E'\'' || pg_sleep(30) || ''''",
    "sleep after a continued text": "SELECT E'a'\n'\\', pg_sleep(30) --'",
    "sleep after dollars": "SELECT $a$'$a$, pg_sleep(30), $b$'$b$",
    "sleep by another name": r"""SELECT U&"pg\005fsleep"(30)""",
    "sleep in a default": "SELECT coalesce(NULL, pg_sleep(30)::text)",
    "sleep in order": "SELECT name FROM fruit ORDER BY pg_sleep(1)",
    "sleep from": "SELECT * FROM ROWS FROM (pg_sleep(30)) AS f",
    "sleep after operator": "SELECT 1 OPERATOR(pg_catalog.+) pg_sleep(30)::text::int",
    "sleep after a number": "SELECT 1 WHERE 1=1OR pg_sleep(30) IS NULL",
    "read file": "SELECT pg_read_file('/etc/passwd')",
    "read binary": "SELECT pg_read_binary_file('/etc/passwd')",
    "list folder": "SELECT pg_ls_dir('/')",
    "stat file": "SELECT * FROM pg_stat_file('/etc/passwd')",
    "large object in": "SELECT lo_import('/etc/passwd')",
    "large object out": "SELECT lo_export(1, '/tmp/loot')",
    "large object new": "SELECT lo_from_bytea(0, 'x')",
    "dblink": "SELECT * FROM dblink('host=/tmp', 'DELETE FROM fruit') AS t(x int)",
    "query to xml": "SELECT query_to_xml('DELETE FROM fruit RETURNING 1', true, true, '')",
    "cursor to xml": "SELECT table_to_xml('fruit', true, true, '')",
    "xml": "SELECT xmlparse(DOCUMENT '<a/>')",
    "terminate": "SELECT pg_terminate_backend(pg_backend_pid())",
    "reload": "SELECT pg_reload_conf()",
    "switch log": "SELECT pg_rotate_logfile()",
    "advisory lock": "SELECT pg_advisory_lock(1)",
    "notify by function": "SELECT pg_notify('x', 'y')",
    "next value": "SELECT nextval('fruit_id_seq')",
    "set value": "SELECT setval('fruit_id_seq', 1)",
    "current setting": "SELECT current_setting('data_directory')",
    "random": "SELECT random()",
    "definer": "SELECT spoil()",
    "definer of the row": "SELECT fruit.spoilt FROM fruit",
    "passwords": "SELECT * FROM pg_shadow",
    "others' queries": "SELECT query FROM pg_stat_activity",
    "quoted catalogue": """SELECT query FROM pg_catalog."pg_stat_activity" """,
    "catalogue as TABLE": "TABLE pg_authid",
    "settings": "SELECT * FROM pg_settings",
    "files": "SELECT * FROM pg_hba_file_rules",
    "statistics": "SELECT most_common_vals FROM pg_stats",
    "another table": "SELECT * FROM secret",
    "parameter": "SELECT $1",
    "nul": "SELECT 1\0; DROP TABLE fruit",
    "surrogate": "SELECT '\ud800'",
    "no closing quote": "SELECT 'x",
    "no closing comment": "SELECT 1 /* x",
    "nothing": " ; -- nothing",
    "no text": "",
}

TOO_LARGE = {
    "repeat": "SELECT repeat('x', 1000000000)",
    "pad": "SELECT rpad('x', 1000000)",
    "pad a gigabyte": "SELECT lpad('x', 2000000000)",
    "doubling": "WITH RECURSIVE r(n, x) AS (SELECT 1, 'a' UNION ALL SELECT n + 1, x || x FROM r WHERE n < 20) "
    "SELECT x FROM r",
    "aggregate": "SELECT string_agg(name, '') FROM fruit, generate_series(1, 30000)",
    "rows": f"{COUNT} SELECT x FROM c",
    "series": "SELECT generate_series(1, 2000)",
    "large rows": "SELECT rpad('x', 90000) FROM generate_series(1, 900)",
    "columns": f"SELECT {', '.join(['1'] * 5000)}",
    "text": "SELECT '" + "x" * 100_000 + "'",
}

ENDLESS = {
    "recursion": f"{COUNT} SELECT count(*) FROM c",
    "cross join": f"SELECT count(*) FROM {', '.join(f'fruit f{i}' for i in range(18))}",
    "series": "SELECT count(*) FROM generate_series(1, 1000000000000)",
    "sort": f"{COUNT} SELECT x FROM (SELECT x, lpad(x::text, 1000) AS b FROM c) AS s ORDER BY b",
    "distinct": f"{COUNT} SELECT count(*) FROM (SELECT DISTINCT lpad(x::text, 1000) FROM c) AS s",
    "back reference": f"{COUNT} SELECT count(*) FROM c WHERE lpad('', 300, 'a') || x ~ '^(a*)(a*)(a*)\\1\\2\\3b$'",
    "like": f"{COUNT} SELECT count(*) FROM c WHERE lpad('', 5000, 'a') || x LIKE '{'%a_' * 300}z'",
}


@pytest.fixture(scope="module")
def fruit(postgres_server: str) -> Iterator[tuple[PostgresDatabase, Callable[[], str]]]:
    """A database by a role that may read one table and call two functions that write; and a hash of all there is."""
    import psycopg

    with psycopg.connect(f"{postgres_server} dbname=postgres", autocommit=True) as owner:
        owner.execute("CREATE DATABASE hostile")
        owner.execute("CREATE ROLE hostile_reader LOGIN")
    with psycopg.connect(f"{postgres_server} dbname=hostile") as owner:
        owner.execute("CREATE TABLE fruit (id SERIAL PRIMARY KEY, name TEXT, price REAL)")
        owner.execute("CREATE TABLE secret (word TEXT)")
        owner.execute("INSERT INTO fruit (name, price) VALUES ('apple', 0.5), ('pear', 0.75), ('fig', 0.1)")
        owner.execute("INSERT INTO secret VALUES ('swordfish')")
        writes = "LANGUAGE sql SECURITY DEFINER AS 'DELETE FROM fruit; SELECT 1'"
        owner.execute(f"CREATE FUNCTION spoil() RETURNS int {writes}")
        owner.execute(f"CREATE FUNCTION spoilt(fruit) RETURNS int {writes}")
        owner.execute("GRANT SELECT ON fruit TO hostile_reader")

    def contents() -> str:
        with psycopg.connect(f"{postgres_server} dbname=hostile") as owner:
            found = [
                owner.execute(query).fetchall()
                for query in (
                    "SELECT * FROM fruit ORDER BY id",
                    "SELECT * FROM secret",
                    "SELECT last_value, is_called FROM fruit_id_seq",
                    "SELECT relname, relacl::text FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1",
                    "SELECT rolname, rolsuper FROM pg_roles ORDER BY 1",
                    "SELECT count(*) FROM pg_largeobject_metadata",
                    "SELECT extname FROM pg_extension ORDER BY 1",
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
                )
            ]
        return hashlib.sha256(repr(found).encode()).hexdigest()

    dsn = psycopg.conninfo.make_conninfo(postgres_server, dbname="hostile", user="hostile_reader")
    limits = QueryLimits(timeout_s=0.4, max_rows=1000, max_result_bytes=5_000_000)
    database = PostgresDatabase(dsn, limits=limits)
    yield database, contents
    database.close()
    with psycopg.connect(f"{postgres_server} dbname=postgres", autocommit=True) as owner:
        owner.execute("DROP DATABASE hostile WITH (FORCE)")
        owner.execute("DROP ROLE hostile_reader")


def _refused(fruit: tuple[PostgresDatabase, Callable[[], str]], sql: str, *, within_s: float) -> str:
    database, contents = fruit
    before = contents()
    started_s = time.perf_counter()
    result = database.run(sql)
    assert time.perf_counter() - started_s < within_s
    assert result.rows is None
    assert result.error
    assert contents() == before
    assert database.run("SELECT count(*) FROM fruit").rows == ((3,),)
    return result.error


@pytest.mark.parametrize("sql", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_only_one_harmless_select_runs(fruit: tuple[PostgresDatabase, Callable[[], str]], sql: str) -> None:
    error = _refused(fruit, sql, within_s=5.0)
    assert "timeout" not in error, "it was not even begun"


@pytest.mark.parametrize("sql", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_size_is_limited(fruit: tuple[PostgresDatabase, Callable[[], str]], sql: str) -> None:
    _refused(fruit, sql, within_s=10.0)


@pytest.mark.parametrize("sql", ENDLESS.values(), ids=ENDLESS.keys())
def test_time_is_limited(fruit: tuple[PostgresDatabase, Callable[[], str]], sql: str) -> None:
    error = _refused(fruit, sql, within_s=10.0)
    # Whichever comes first: the clock, or the server's bound on temporary files.
    assert error.startswith("timeout") or "temporary file" in error


# A lock lasts as long as its session, and a session may end itself: these the first wall holds alone.
SECOND = {name: sql for name, sql in (FORBIDDEN | TOO_LARGE).items() if name not in ("advisory lock", "terminate")}


@pytest.mark.parametrize("name", SECOND)
def test_the_server_itself_refuses_or_undoes(fruit: tuple[PostgresDatabase, Callable[[], str]], name: str) -> None:
    """The second wall: what reading the query's words would let by, parentheses, role and transaction hold."""
    database, contents = fruit
    if name in ("nul", "surrogate"):
        return  # these have no bytes to send
    before = contents()
    database._run(SECOND[name])
    assert contents() == before
    assert database.run("SELECT count(*) FROM fruit").rows == ((3,),)


def test_a_function_may_be_allowed_and_is_stopped_by_the_clock(
    fruit: tuple[PostgresDatabase, Callable[[], str]],
) -> None:
    database = PostgresDatabase(fruit[0].dsn, limits=QueryLimits(timeout_s=0.2), functions=["pg_sleep"])
    result = database.run("SELECT pg_sleep(30)")
    assert (result.timed_out, result.error) == (True, "timeout: more than 0.2 s")
    assert database.run("SELECT 1").rows == ((1,),)
    database.close()


def test_the_model_pays_for_what_its_query_does(
    fruit: tuple[PostgresDatabase, Callable[[], str]], grade_text: Callable[..., Grade]
) -> None:
    grader = SqlResult(fruit[0])
    stopped = grade_text(grader, ENDLESS["recursion"], "SELECT 1")
    assert (stopped.score, stopped.parts["timeout"], stopped.parts["executes"]) == (0, 1, 0)
    refused = grade_text(grader, FORBIDDEN["delete"], "SELECT 1")
    assert (refused.score, refused.parts["timeout"]) == (0, 0)
    assert "only a single SELECT may run" in refused.rationale


BANNED = Forbidden(functions=frozenset({"pg_sleep"}), tables=frozenset({"pg_class"}))


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 'pg_sleep(1)'",
        "SELECT $$pg_sleep(1)$$",
        "SELECT $x$ $$ ; pg_sleep(1) $x$",
        "SELECT 1 -- ; pg_sleep(1)",
        "SELECT /* ; /* pg_sleep(1) */ ' */ 1",
        "SELECT E'\\'; pg_sleep(1)'",
        "SELECT pg_sleep FROM t",
        "SELECT a$b$c FROM t",
        "((SELECT 1))",
        "with a(b) as (select 1) select ';' from a;;  ",
        "VALUES (1), (2)",
        "TABLE fruit",
        'SELECT "a""b; (" FROM t',
        "SELECT 'it''s', U&'d\\0061t', B'01', x'1F'",
    ],
)
def test_what_looks_bad_and_is_not(sql: str) -> None:
    assert authorised(sql, BANNED)


_PIECES = ["'", '"', "E'", "$$", "$a$", "/*", "*/", "--", "\n", "\\", ";", "(", ")", "a", "U&", "1", ".", " "]


@given(st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
@example("E'\\''")
def test_reading_ends_and_covers_the_text(text: str) -> None:
    try:
        found = tokens(text)
    except Refused:
        return
    starts = [token.start for token in found]
    assert starts == sorted(set(starts))
