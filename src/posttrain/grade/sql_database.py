"""The seam behind which a SQLite file and a PostgreSQL database are the same: something that queries run on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from posttrain.core import UsageError
from posttrain.grade.postgres import PostgresDatabase
from posttrain.grade.sql_runner import QueryLimits, QueryResult, QueryRunner


@runtime_checkable
class SqlDatabase(Protocol):
    """A database that runs queries nobody has read: read-only, one statement, with limits on time, rows and values.

    `SqliteDatabase` and `PostgresDatabase` are such. Each is also a function from a query to its result, which is what
    `rollout.sql_environment` takes.
    """

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def schema_query(self) -> str:
        """A query whose first column tells the tables, a row each."""
        ...

    def run(self, sql: str) -> QueryResult:
        """Run one query; what is wrong with it is said in the result. GradeError: the database cannot be used."""
        ...

    def remembered(self, sql: str) -> QueryResult | None:
        """The result of a query that was run before, if it is still held."""
        ...

    def __call__(self, sql: str) -> QueryResult:
        """As `run`."""
        ...


class SqliteDatabase:
    """A SQLite file.

    Args:
        path: of the file, which must not change.
        runner: runs the queries; one may serve many files. A new one if not given.
    """

    schema_query = "SELECT sql FROM sqlite_master WHERE type = 'table' ORDER BY name"

    def __init__(self, path: Path, runner: QueryRunner | None = None) -> None:
        self.path = path
        self._runner = QueryRunner(QueryLimits()) if runner is None else runner

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def run(self, sql: str) -> QueryResult:
        """Run one query, or remember its result. GradeError: the file cannot be opened."""
        return self._runner.run(self.path, sql)

    def remembered(self, sql: str) -> QueryResult | None:
        """The result of a query that was run before, if it is still held."""
        return self._runner.remembered(self.path, sql)

    __call__ = run


def schema_text(database: SqlDatabase) -> str:
    """The tables of a database, a line each, as a prompt may show them.

    Raises:
        ValueError: the database cannot tell.
    """
    result = database.run(database.schema_query)
    if result.rows is None:
        raise ValueError(f"{database.name}: its tables cannot be read: {result.error}")
    return "\n".join(" ".join(str(row[0]).split()) for row in result.rows if row[0])


def open_database(named: str, *, limits: QueryLimits | None = None) -> SqlDatabase:
    """The database that words name: a PostgreSQL address, or the path of a SQLite file.

    Args:
        named: `postgresql://reader@/shop?host=/tmp/pg`, `host=/tmp/pg dbname=shop user=reader`, or `shop.db`.
        limits: what each query may use.

    Raises:
        UsageError: there is no such file, or no server answers, or its role may do too much.
        MissingExtraError: a PostgreSQL database is named and psycopg is not installed.
    """
    if named.startswith(("postgresql://", "postgres://")) or re.search(r"\b(dbname|host|service)=", named):
        return PostgresDatabase(named, limits=limits)
    path = Path(named)
    if not path.is_file():
        raise UsageError(f"no such database {named}")
    return SqliteDatabase(path, QueryRunner(limits or QueryLimits()))
