"""Read-only queries on a PostgreSQL database, each in a transaction of its own that is rolled back."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core import MissingExtraError, UsageError

POSTGRES_SCHEMA = """
SELECT table_name || '(' || string_agg(column_name || ' ' || data_type, ', ' ORDER BY ordinal_position) || ')'
FROM information_schema.columns WHERE table_schema = ANY (current_schemas(false)) GROUP BY table_name ORDER BY 1"""
_MAX_SQL = 20_000  # characters


@dataclass(frozen=True)
class PostgresAnswer:
    """Rows, or why there are none."""

    rows: Sequence[Sequence[Any]] | None = None
    error: str | None = None


class PostgresQueries:
    """Runs queries that nobody has read. Usable from any thread: each has a connection of its own.

    Every query is a single statement in a read-only transaction with a statement time-out, rolled back at its end. That
    bounds time, rows and writing, not what may be read or which functions may be called: give it the DSN of a role that
    may only read what the policy may see, and is no superuser.

    Args:
        dsn: of the database, as libpq reads it.
        timeout_s: for each query.
        max_rows: more than these are an error.

    Raises:
        MissingExtraError: psycopg is not installed.
        UsageError: the database cannot be reached, or the role is a superuser.
    """

    schema_query = POSTGRES_SCHEMA

    def __init__(self, dsn: str, *, timeout_s: float = 2.0, max_rows: int = 1000) -> None:
        try:
            self._psycopg: Any = importlib.import_module("psycopg")
        except ImportError as error:
            raise MissingExtraError("psycopg", "postgres", "a PostgreSQL database") from error
        self._dsn, self._timeout_s, self._max_rows = dsn, timeout_s, max_rows
        self._own = threading.local()
        self._open: list[Any] = []
        found = self("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        if found.rows is None:
            raise UsageError(f"the database cannot be used: {found.error}")
        if found.rows[0][0]:
            raise UsageError("the role is a superuser: queries could read files and run programs; give another")

    def __call__(self, sql: str) -> PostgresAnswer:
        """Run one query."""
        if len(sql) > _MAX_SQL:
            return PostgresAnswer(error=f"the query is longer than {_MAX_SQL} characters")
        try:
            return self._run(self._connection(), sql)
        except self._psycopg.Error as error:
            return PostgresAnswer(error=str(error).strip() or type(error).__name__)

    def close(self) -> None:
        """Close the connections of all threads."""
        while self._open:
            self._open.pop().close()
        self._own = threading.local()

    def _connection(self) -> Any:
        connection = getattr(self._own, "connection", None)
        if connection is None or connection.closed:
            connection = self._psycopg.connect(self._dsn, connect_timeout=10)
            connection.read_only = True
            self._own.connection = connection
            self._open.append(connection)
        return connection

    def _run(self, connection: Any, sql: str) -> PostgresAnswer:
        rows: list[Sequence[Any]] = []
        try:
            with connection.cursor() as cursor:
                milliseconds = max(1, int(self._timeout_s * 1000))
                cursor.execute(f"SELECT set_config('statement_timeout', '{milliseconds}', true)")  # and a snapshot
                # Streamed queries go by the extended protocol, which takes a single statement: no COMMIT comes after.
                for row in cursor.stream(sql):
                    if len(rows) == self._max_rows:
                        return PostgresAnswer(error=f"too many rows: more than {self._max_rows}")
                    rows.append(tuple(row))
                if cursor.description is None:
                    return PostgresAnswer(error="not a query")
        finally:
            connection.rollback()
        return PostgresAnswer(rows=rows)
