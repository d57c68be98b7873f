"""Copies of a PostgreSQL database with other rows, on which queries that agree by chance come apart.

Source: test-suite accuracy, Zhong, Yu and Klein, 2020 (arXiv 2010.02840).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core import GradeError
from posttrain.grade.postgres_connections import import_psycopg, place_of

_DROPPED = 0.15  # share of rows that a copy lacks
_DOUBLED = 0.15  # share that it has again, under another key
_CHANGED = 0.3  # share of values, of columns that are no key, that are others
_NULL = 0.05  # share that are nothing
_MIN_ROWS = 3  # a table is not made smaller than this
_ATTEMPTS = 5
_MAX_ROWS = 20_000  # of a table; more would take minutes

_TABLES = """
SELECT c.oid, c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'
  AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e') ORDER BY 2"""
# Of each column: name, type, kind of type (N number, D date, B truth …), whether it may be NULL, whether it is of the
# primary key, whether it refers to a table or is referred to, and whether it can be written.
_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), t.typcategory, NOT a.attnotnull,
  EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'p' AND k.conrelid = a.attrelid AND a.attnum = ANY (k.conkey)),
  EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'f' AND (k.conrelid = a.attrelid AND a.attnum = ANY (k.conkey)
          OR k.confrelid = a.attrelid AND a.attnum = ANY (k.confkey)))
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum"""


@dataclass(frozen=True)
class _Column:
    name: str
    type: str
    category: str
    nullable: bool
    key: bool
    reference: bool

    @property
    def free(self) -> bool:
        """Not a key, nor named as one where references are not declared: joins still find their rows."""
        return not (self.key or self.reference or self.name.lower().endswith(("id", "_key", "code")))


class _Copy:
    """A connection to a copy, on which changes that break a constraint are taken back one by one."""

    def __init__(self, psycopg: Any, dsn: str) -> None:
        self._psycopg, self._sql = psycopg, psycopg.sql
        self.connection = psycopg.connect(dsn, client_encoding="utf8")
        self.connection.execute("SET datestyle = 'ISO, YMD'; SET intervalstyle = 'postgres'; SET timezone = 'UTC'")

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a query of our own."""
        return list(self.connection.execute(query, values or None).fetchall())

    def tried(self, query: Any, values: Sequence[object]) -> str | None:
        """The first value that a change returns; None where it would break a constraint, and nothing is changed."""
        try:
            with self.connection.transaction():
                row = self.connection.execute(query, values).fetchone()
                return None if row is None else str(row[0])
        except (self._psycopg.IntegrityError, self._psycopg.DataError, self._psycopg.errors.RaiseException):
            return None

    def change(self, table: str, rng: random.Random) -> None:
        """Change, double and drop rows of a table."""
        oid = self.rows("SELECT %s::regclass::oid", table)[0][0]
        columns = [_Column(*row) for row in self.rows(_COLUMNS, oid)]
        (count,) = self.rows(f"SELECT count(*) FROM ONLY {table}")[0]
        if count > _MAX_ROWS:
            raise GradeError(f"{table} has {count} rows, more than {_MAX_ROWS}: make copies of a smaller database")
        if not columns or not count:
            return
        # Triggers of the database's own would answer our changes with others; those of constraints stay.
        self.connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        listed = self._sql.SQL(", ").join(self._sql.SQL("{}::text").format(self._name(column)) for column in columns)
        # Physical order, which a copy keeps: the same seed gives the same rows.
        query = self._sql.SQL("SELECT ctid::text, {} FROM ONLY {} ORDER BY ctid").format(listed, self._sql.SQL(table))
        found = self.connection.execute(query).fetchall()
        pools = {column.name: [row[place + 1] for row in found] for place, column in enumerate(columns)}
        places = [self._changed(table, columns, row, pools, rng) for row in found]
        for row in rng.sample(found, int(_DOUBLED * count + rng.random())):
            self._double(table, columns, row[1:])
        gone = min(int(_DROPPED * count + rng.random()), max(0, count - _MIN_ROWS))
        for place in rng.sample(places, gone):
            self.tried(f"DELETE FROM ONLY {table} WHERE ctid = %s::tid RETURNING 1", [place])

    def _changed(
        self,
        table: str,
        columns: Sequence[_Column],
        row: Sequence[str | None],
        pools: dict[str, list[str | None]],
        rng: random.Random,
    ) -> str:
        """Change some values of a row; where it stands then."""
        place = str(row[0])
        others: dict[_Column, str | None] = {}
        for column, value in zip(columns, row[1:], strict=True):
            chance = rng.random()
            if column.free and column.nullable and chance < _NULL:
                others[column] = None
            elif column.free and chance < _NULL + _CHANGED:
                other = _another(column, value, pools[column.name], rng)
                if other != value:
                    others[column] = other
        # All at once, and where that breaks a constraint one by one.
        if others and (moved := self._set(table, place, others)) is not None:
            return moved
        for column, other in others.items():
            place = self._set(table, place, {column: other}) or place
        return place

    def _set(self, table: str, place: str, others: dict[_Column, str | None]) -> str | None:
        sets = self._sql.SQL(", ").join(
            self._sql.SQL("{} = {}").format(self._name(column), self._cast(column)) for column in others
        )
        query = self._sql.SQL("UPDATE ONLY {} SET {} WHERE ctid = %s::tid RETURNING ctid::text")
        return self.tried(query.format(self._sql.SQL(table), sets), [*others.values(), place])

    def _double(self, table: str, columns: Sequence[_Column], row: Sequence[str | None]) -> None:
        """The same row again, with the key's numbers raised above all others."""
        values: list[str | None] = []
        for column, value in zip(columns, row, strict=True):
            if column.key and not column.reference and column.category == "N":
                query = self._sql.SQL("SELECT (max({}) + 1)::text FROM {}")
                value = self.connection.execute(query.format(self._name(column), self._sql.SQL(table))).fetchone()[0]
            values.append(value)
        query = self._sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({}) RETURNING 1").format(
            self._sql.SQL(table),
            self._sql.SQL(", ").join(self._name(column) for column in columns),
            self._sql.SQL(", ").join(self._cast(column) for column in columns),
        )
        self.tried(query, values)

    def _name(self, column: _Column) -> Any:
        return self._sql.Identifier(column.name)

    def _cast(self, column: _Column) -> Any:
        return self._sql.SQL(f"%s::text::{column.type}")  # the type as the server itself writes it


def _another(column: _Column, value: str | None, values: Sequence[str | None], rng: random.Random) -> str | None:
    """Another value of the column, or for a number one near by."""
    if column.category == "N" and value is not None and rng.random() < 0.5:
        if value.lstrip("-").isdigit():
            return str(int(value) + rng.choice((-1, 1))) if abs(int(value)) > 1 else rng.choice(values)
        try:
            return f"{float(value) * rng.uniform(0.5, 1.5):.2f}"
        except ValueError:  # money is written with its currency
            return rng.choice(values)
    return rng.choice(values)


def postgres_copies(dsn: str, num_copies: int = 2, seed: int = 0, *, queries: Sequence[str] = ()) -> list[str]:
    """Make copies of a PostgreSQL database, on its own server, whose rows differ from it and from one another.

    What `mutated_copies` does for a SQLite file: in each table some rows go, some come twice under a new key, and
    values of columns that are no key and no reference are exchanged for others of the column, moved a little, or taken
    away. Constraints hold, and what would break one is left as it is; the database's own triggers are disabled. Rights
    on tables are copied with them.

    Args:
        dsn: of the original, by a role that owns it and may create databases. Nobody else may be connected: make copies
            before a `PostgresDatabase` is opened, or close it.
        num_copies: how many.
        seed: the same seed gives the same rows.
        queries: gold queries that must run on every copy. PostgreSQL refuses a scalar subquery of two rows, which a
            copy may bring about: such a copy is made again from another seed, five times at most.

    Returns:
        Names of the copies, `<name>_copy1` and so on; older ones of these names are replaced. Grade on these and the
        original: `SqlResult([shop, *map(shop.at, names)])`.

    Raises:
        MissingExtraError: psycopg is not installed.
        GradeError: the database cannot be copied, or a query does not run on any of five copies.
    """
    psycopg = import_psycopg()
    try:
        with psycopg.connect(dsn) as connection:
            original = connection.info.dbname
        names = [f"{original}_copy{number}" for number in range(1, num_copies + 1)]
        for number, name in enumerate(names, 1):
            for attempt in range(_ATTEMPTS):
                rng = random.Random(f"{seed}/{number}/{attempt}")
                problem = _make(psycopg, dsn, original, name, rng, queries)
                if problem is None:
                    break
            else:
                raise GradeError(f"{place_of(dsn)}: none of {_ATTEMPTS} copies runs its queries: {problem}")
    except psycopg.Error as error:
        raise GradeError(f"{place_of(dsn)}: the database cannot be copied: {' '.join(str(error).split())}") from error
    return names


def _make(psycopg: Any, dsn: str, original: str, name: str, rng: random.Random, queries: Sequence[str]) -> str | None:
    """Make one copy; which query does not run on it, if any."""
    # A template must have nobody connected to it, us too.
    beside = "template1" if original != "template1" else "postgres"
    identifiers = psycopg.sql.Identifier(name), psycopg.sql.Identifier(original)
    with psycopg.connect(dsn, dbname=beside, autocommit=True) as server:
        server.execute(psycopg.sql.SQL("DROP DATABASE IF EXISTS {}").format(identifiers[0]))
        server.execute(psycopg.sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*identifiers))
    copy = _Copy(psycopg, psycopg.conninfo.make_conninfo(dsn, dbname=name))
    with copy.connection:
        for _, table in copy.rows(_TABLES):
            copy.change(table, rng)
    with psycopg.connect(dsn, dbname=name) as connection:
        connection.read_only = True
        for query in queries:
            try:
                with connection.transaction(), connection.cursor() as cursor:
                    for _ in cursor.stream(query.strip().rstrip(";")):  # one statement
                        pass
            except psycopg.Error as error:
                return f"{query[:200]!r}: {' '.join(str(error).split())}"
    return None
