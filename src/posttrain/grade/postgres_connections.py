"""Connections to the databases of one PostgreSQL server, on which nothing can be written."""

from __future__ import annotations

import importlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from posttrain.core import GradeError, MissingExtraError
from posttrain.grade.postgres_rows import text_adapters

# Of a session; nothing that a query may say changes them.
_SETTINGS = {
    "default_transaction_read_only": "on",
    "standard_conforming_strings": "on",  # postgres_syntax reads texts so
    "client_min_messages": "error",
    "work_mem": "16MB",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
}


class PostgresConnections:
    """Connections that are kept for the next query, together no more than so many; threads wait for their turn.

    Args:
        settings: of every session, besides those that make it read-only and its texts predictable.
        max_connections: open at a time, to all databases together.

    Raises:
        MissingExtraError: psycopg is not installed.
    """

    def __init__(self, settings: Mapping[str, str], max_connections: int) -> None:
        self._psycopg = import_psycopg()
        self._adapters = text_adapters(self._psycopg)
        self._settings = {**settings, **_SETTINGS}
        self._turns = threading.BoundedSemaphore(max_connections)
        self._max_connections = max_connections
        self._idle: deque[tuple[str, Any]] = deque()  # with their DSN; the one used last at the right
        self._lock = threading.Lock()

    def open(self, dsn: str) -> Any:
        """A new connection, which is the caller's to close. psycopg.Error: there is none to be had."""
        connection = self._psycopg.connect(
            dsn, connect_timeout=10, autocommit=True, context=_Context(self._adapters), client_encoding="utf8"
        )
        for name, value in self._settings.items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        connection.autocommit = False
        connection.read_only = True
        return connection

    @contextmanager
    def transaction(self, dsn: str) -> Iterator[Any]:
        """A connection in a read-only transaction, for one query, rolled back at its end.

        Raises:
            GradeError: the server does not answer.
        """
        with self._turns:
            connection = self._begun(dsn)
            try:
                yield connection
            finally:
                try:
                    connection.rollback()
                except self._psycopg.OperationalError:
                    connection.close()
                if not connection.closed:
                    self.keep(dsn, connection)

    def keep(self, dsn: str, connection: Any) -> None:
        """Hold an idle connection for the next query, and close the one that was idle longest if there are too many."""
        with self._lock:
            self._idle.append((dsn, connection))
            dropped = self._idle.popleft()[1] if len(self._idle) > self._max_connections else None
        if dropped is not None:
            dropped.close()

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            closing = [connection for _, connection in self._idle]
            self._idle.clear()
        for connection in closing:
            connection.close()

    def _begun(self, dsn: str) -> Any:
        connection = self._taken(dsn)
        try:
            if connection is not None:
                try:
                    connection.execute("SELECT 1")  # begins the transaction
                    return connection
                except self._psycopg.OperationalError:  # it was lost while idle; the server may be there again
                    connection.close()
            connection = self.open(dsn)
            connection.execute("SELECT 1")
        except self._psycopg.Error as error:
            raise GradeError(unreachable(dsn, error)) from error
        return connection

    def _taken(self, dsn: str) -> Any | None:
        """The idle connection to a database that was used last; where there is none, room is made for a new one."""
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                if self._idle[place][0] == dsn:
                    connection = self._idle[place][1]
                    del self._idle[place]
                    return connection
            dropped = self._idle.popleft()[1] if len(self._idle) == self._max_connections else None
        if dropped is not None:
            dropped.close()
        return None


class _Context:
    """How psycopg is told of adapters before there is a connection."""

    connection = None

    def __init__(self, adapters: Any) -> None:
        self.adapters = adapters


def import_psycopg() -> Any:
    """psycopg, with the parts that are used. MissingExtraError: it is not installed."""
    try:
        psycopg = importlib.import_module("psycopg")
        for part in ("conninfo", "sql", "types.string"):
            importlib.import_module(f"psycopg.{part}")
    except ImportError as error:
        raise MissingExtraError("psycopg", "postgres", "a PostgreSQL database") from error
    return psycopg


def place_of(dsn: str) -> str:
    """What a DSN names, without its password."""
    psycopg = import_psycopg()
    try:
        known = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        return "the DSN"
    return " ".join(f"{key}={known[key]}" for key in ("host", "port", "dbname", "user") if key in known) or "the DSN"


def unreachable(dsn: str, error: Exception) -> str:
    """That a database cannot be reached, why, and how to start a server."""
    why = " ".join(str(error).split())[:300]
    return (
        f"the PostgreSQL database of {place_of(dsn)} cannot be reached: {why}. If no server runs there, start one "
        "('scripts/postgres.sh start', see docs/howto_postgresql.md); else correct the DSN"
    )
