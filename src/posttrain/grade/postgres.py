"""Runs queries that nobody has read on a PostgreSQL database: read-only, with limits on time, rows and values."""

from __future__ import annotations

import copy
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.core import GradeError, UsageError
from posttrain.grade.postgres_connections import PostgresConnections, import_psycopg, place_of, unreachable
from posttrain.grade.postgres_rows import row_reader
from posttrain.grade.postgres_syntax import SAFE_FUNCTIONS, Forbidden, Refused, authorised, line_of
from posttrain.grade.sql_compare import Row
from posttrain.grade.sql_runner import QueryLimits, QueryResult

POSTGRES_SCHEMA = """
SELECT format('CREATE %s %s (%s)', CASE WHEN t.relkind IN ('v', 'm') THEN 'VIEW' ELSE 'TABLE' END,
       t.oid::regclass, concat_ws(', ', c.columns, k.constraints))
FROM pg_class t
CROSS JOIN LATERAL (
    SELECT string_agg(quote_ident(a.attname) || ' ' || format_type(a.atttypid, a.atttypmod)
        || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
        || coalesce((SELECT format(' CHECK IN (%s)',
                         string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder))
                     FROM pg_enum e WHERE e.enumtypid = a.atttypid HAVING count(*) > 0), ''), ', ' ORDER BY a.attnum)
        AS columns
    FROM pg_attribute a WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped) c
CROSS JOIN LATERAL (
    SELECT string_agg(pg_get_constraintdef(n.oid), ', ' ORDER BY n.contype DESC, n.conname) AS constraints
    FROM pg_constraint n WHERE n.conrelid = t.oid AND n.contype IN ('p', 'u', 'f')) k
WHERE t.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT t.relispartition AND pg_table_is_visible(t.oid)
  AND t.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
  AND has_any_column_privilege(t.oid, 'SELECT')
ORDER BY t.relname"""
_NAMES = """
SELECT 'functions', p.proname FROM pg_proc p
UNION SELECT 'attributes', p.proname FROM pg_proc p JOIN pg_type t ON t.oid = p.proargtypes[0]
      WHERE p.pronamespace <> 'pg_catalog'::regnamespace AND t.typtype IN ('c', 'p')
UNION SELECT 'tables', c.relname FROM pg_class c WHERE c.relnamespace = 'pg_catalog'::regnamespace"""
_POWERS = """
SELECT string_agg(r.rolname, ', ') FROM pg_roles r WHERE pg_has_role(current_user, r.oid, 'MEMBER')
  AND (r.rolsuper OR r.rolreplication
       OR r.rolname IN ('pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program'))"""
_TIME_DEPENDENT = re.compile(r"now|current_|local|clock_|_timestamp|age\s*\(", re.IGNORECASE)
_MAX_SQL = 20_000  # characters
_TOO_LARGE = "the row is too large"
# Of the server itself or the way to it: the query is not to blame, or cannot be known to be.
_LOST = ("57P", "08", "58")


class PostgresDatabase:
    """A PostgreSQL database. Usable from any thread; also a function from a query to its result.

    A query is put in parentheses after FROM, where the server's parser takes nothing but one query, and goes by the
    protocol's form for a single statement, in a read-only transaction that is rolled back. Before that its own words
    are read: functions that are not on a list of those that only calculate, the server's own tables, and `EXPLAIN` are
    refused. Time is the server's clock, rows are counted by a LIMIT, and the size of a row is looked at before it is
    sent. The memory of a server process is the server's to bound (`scripts/postgres.sh` does).

    What the database's owner made runs as it was made: views, operators and casts. Its functions are refused unless
    named in `functions`. What a role may read, queries may read: give one that may read what the policy may see.

    Args:
        dsn: of the database, as libpq reads it: `host=/tmp/pg dbname=shop user=reader` or `postgresql://…`.
        limits: what each query may use; `timeout_s` is of the wall clock, here.
        functions: names of functions that queries may call besides `postgres_syntax.SAFE_FUNCTIONS`.
        schemas: where tables are looked for (`search_path`); as the role has it if not given.
        max_connections: queries that run at a time, on this and the databases `at` its server; others wait.
        remember_bytes: results that are kept; the least recently used go first. The database must not change, then.

    Raises:
        MissingExtraError: psycopg is not installed.
        UsageError: no server answers, or the role is a superuser or may use the server's files.
    """

    schema_query = POSTGRES_SCHEMA

    def __init__(
        self,
        dsn: str,
        *,
        limits: QueryLimits | None = None,
        functions: Iterable[str] = (),
        schemas: Sequence[str] = (),
        max_connections: int = 8,
        remember_bytes: int = 64_000_000,
    ) -> None:
        self._psycopg = import_psycopg()
        self.dsn, self.limits = dsn, limits or QueryLimits(timeout_s=2.0)
        self._functions = frozenset(functions)
        settings = {"statement_timeout": str(max(1, round(1000 * self.limits.timeout_s)))}
        if schemas:
            settings["search_path"] = ", ".join('"' + schema.replace('"', '""') + '"' for schema in schemas)
        self._connections = PostgresConnections(settings, max_connections)
        self._row_alias = f"row_{secrets.token_hex(8)}"  # a column of that name would hide the row
        self._head = f"SELECT {self._row_alias}.* FROM (SELECT * FROM (\n"
        self._remember_bytes = remember_bytes
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        """Look at the database and the role, once."""
        self._results: OrderedDict[str, QueryResult] = OrderedDict()
        self._held_bytes = 0
        try:
            connection = self._connections.open(self.dsn)
        except self._psycopg.Error as error:
            raise UsageError(unreachable(self.dsn, error)) from error
        self.name: str = connection.info.dbname
        role = connection.info.user
        powers = connection.execute(_POWERS).fetchone()[0]
        if powers:
            connection.close()
            raise UsageError(
                f"{place_of(self.dsn)}: the role {role!r} has the rights of {powers}: queries could "
                "read files and run programs; give a role that may only read (docs/howto_postgresql.md)"
            )
        kinds: dict[str, set[str]] = {"functions": set(), "attributes": set(), "tables": set()}
        for kind, name in connection.execute(_NAMES):
            kinds[kind].add(name)
        self._forbidden = Forbidden(
            functions=frozenset(kinds["functions"] - SAFE_FUNCTIONS),
            attributes=frozenset(kinds["attributes"]),
            tables=frozenset(kinds["tables"]),
        )
        connection.rollback()
        self._connections.keep(self.dsn, connection)

    def at(self, database: str) -> PostgresDatabase:
        """Another database of the same server: same role, same limits, and its connections count with those of this."""
        other = copy.copy(self)
        other.dsn = self._psycopg.conninfo.make_conninfo(self.dsn, dbname=database)
        other._lock = threading.Lock()
        other._begin()
        return other

    def close(self) -> None:
        """Close the connections that are idle, those of its other databases too. The next query opens another."""
        self._connections.close()

    def remembered(self, sql: str) -> QueryResult | None:
        """The result of a query that was run before, if it is still held."""
        with self._lock:
            result = self._results.get(sql)
            if result is not None:
                self._results.move_to_end(sql)
            return result

    def run(self, sql: str) -> QueryResult:
        """Run one query, or remember its result.

        Raises:
            GradeError: the server does not answer, or went away.
        """
        if (result := self.remembered(sql)) is not None:
            return result
        if len(sql) > _MAX_SQL:
            return QueryResult(error=f"the query is longer than {_MAX_SQL} characters")
        try:
            sql.encode("utf-8")
            query = sql if sql == self.schema_query else authorised(sql, self._forbidden, self._functions)
        except Refused as refused:
            return QueryResult(error=str(refused))
        except UnicodeEncodeError:
            return QueryResult(error="the query is no valid Unicode text")
        result = self._run(query)
        if not _TIME_DEPENDENT.search(sql) and not result.timed_out:
            self._remember(sql, result)
        return result

    __call__ = run

    def _run(self, query: str) -> QueryResult:
        row = self._row_alias
        guarded = (
            # OFFSET 0: the condition below is not moved into the query. Each row is looked at as it would be sent.
            f"{self._head}{query}\n) AS query OFFSET 0) AS {row} WHERE CASE WHEN octet_length({row}::text) <= "
            f"{self.limits.max_value_bytes} THEN true ELSE (left({row}::text, 0) || '{_TOO_LARGE}')::boolean END "
            f"LIMIT {self.limits.max_rows + 1}"
        )
        with self._connections.transaction(self.dsn) as connection:
            try:
                return self._fetch(connection, guarded)
            except self._psycopg.Error as error:
                return self._failed(error, query)

    def _fetch(self, connection: Any, guarded: str) -> QueryResult:
        rows: list[Row] = []
        size = 0
        read = None
        with connection.cursor() as cursor:
            # Streamed: by the extended protocol, which takes one statement, and a row at a time.
            for texts in cursor.stream(guarded):
                if read is None:
                    read = row_reader([column.type_code for column in cursor.description])
                if len(rows) == self.limits.max_rows:
                    return QueryResult(error=f"too many rows: more than {self.limits.max_rows}")
                size += 64 + sum(16 if text is None else len(text) for text in texts)
                if size > self.limits.max_result_bytes:
                    return QueryResult(error=f"result too large: more than {self.limits.max_result_bytes} bytes")
                rows.append(read(texts))
        return QueryResult(rows=tuple(rows), size=size)

    def _failed(self, error: Any, query: str) -> QueryResult:
        """What the policy is told: what, where, and what the server thinks was meant."""
        state, diagnosis = error.sqlstate, error.diag
        if state is None or (
            state.startswith(_LOST) and state != "08P01"
        ):  # a violation of the protocol is the query's
            raise GradeError(unreachable(self.dsn, error)) from error
        if state == "57014":
            return QueryResult(error=f"timeout: more than {self.limits.timeout_s:g} s", timed_out=True)
        message = diagnosis.message_primary or str(error)
        if _TOO_LARGE in message:
            return QueryResult(error=f"{_TOO_LARGE}: more than {self.limits.max_value_bytes} bytes")
        position = int(diagnosis.statement_position or 0) - 1 - len(self._head)
        if 0 <= position <= len(query):
            message += f" ({line_of(query, position)})"
        more = [text for text in (diagnosis.message_detail, diagnosis.message_hint) if text]
        return QueryResult(error=". ".join([message, *(text.rstrip(".") for text in more)])[:1000])

    def _remember(self, sql: str, result: QueryResult) -> None:
        cost = result.size + len(sql) + 500
        with self._lock:
            if cost > self._remember_bytes // 4 or sql in self._results:
                return
            self._results[sql] = result
            self._held_bytes += cost
            while self._held_bytes > self._remember_bytes:
                known, oldest = self._results.popitem(last=False)
                self._held_bytes -= oldest.size + len(known) + 500
