"""All the registry's SQL. Today SQLite: one file, write-ahead log, many readers beside one writer.

The class speaks plain rows; what they mean is decided elsewhere. Another database is another class with these methods.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.core import RegistryError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 30_000

SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, recipe TEXT NOT NULL, path TEXT NOT NULL, status TEXT NOT NULL, started_s REAL NOT NULL,
    ended_s REAL, fingerprint TEXT NOT NULL, config TEXT NOT NULL, code TEXT NOT NULL
);
CREATE TABLE artifacts (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, path TEXT NOT NULL, storage TEXT NOT NULL,
    num_bytes INTEGER NOT NULL, files TEXT NOT NULL, meta TEXT NOT NULL, code TEXT NOT NULL,
    run TEXT REFERENCES runs(id), created_s REAL NOT NULL
);
CREATE INDEX artifacts_by_kind ON artifacts(kind, created_s);
CREATE TABLE names (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, artifact TEXT NOT NULL REFERENCES artifacts(id)
);
CREATE INDEX names_by_name ON names(name, seq);
CREATE TABLE parents (
    child TEXT NOT NULL REFERENCES artifacts(id), parent TEXT NOT NULL REFERENCES artifacts(id),
    seq INTEGER NOT NULL, PRIMARY KEY (child, parent)
);
CREATE TABLE reports (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, artifact TEXT NOT NULL REFERENCES artifacts(id),
    model TEXT NOT NULL REFERENCES artifacts(id), suite TEXT NOT NULL, suite_hash TEXT NOT NULL,
    created_s REAL NOT NULL, UNIQUE (artifact, model)
);
CREATE INDEX reports_by_model ON reports(model, seq);
CREATE TABLE promotions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, project TEXT NOT NULL, action TEXT NOT NULL,
    card TEXT NOT NULL REFERENCES artifacts(id), base INTEGER REFERENCES promotions(seq), record TEXT NOT NULL
);
CREATE INDEX promotions_by_project ON promotions(project, seq);
CREATE TABLE champions (
    project TEXT PRIMARY KEY, promotion INTEGER NOT NULL REFERENCES promotions(seq)
);
"""

Row = dict[str, Any]


class Database:
    """One connection, shared by the threads of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(
            path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        try:
            self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a promotion that returned survives a power cut
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise RegistryError(f"{path}: cannot be used as a registry: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        with self.transaction():
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in SCHEMA.split(";"):
                    if statement.strip():
                        self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise RegistryError(
                    f"{self.path}: the registry's schema is version {version}, this package knows {SCHEMA_VERSION}. "
                    "Use the posttrain version that wrote it"
                )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else writes meanwhile. Does not nest."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise RegistryError(f"{self.path}: cannot start a transaction: {error}") from error
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def check(self) -> None:
        """Ask the database whether it is whole.

        Raises:
            RegistryError: it is damaged or a reference points nowhere.
        """
        damage = [row[0] for row in self._all("PRAGMA integrity_check") if row[0] != "ok"]
        damage += [f"dangling reference in {row['table']}" for row in self._all("PRAGMA foreign_key_check")]
        if damage:
            raise RegistryError(f"{self.path}: damaged: {'; '.join(damage[:5])}")

    def put_run(self, row: Row) -> None:
        """Insert a run, or bring what is known of it up to date."""
        self._put("runs", row, update=[name for name in row if name != "id"])

    def put_artifact(self, row: Row) -> None:
        """Insert an artifact, or replace its place, metadata and run."""
        self._put("artifacts", row, update=["path", "storage", "meta", "run"])

    def put_name(self, name: str, artifact: str) -> None:
        """Let a name mean this artifact from now on."""
        self._all("INSERT INTO names (name, artifact) VALUES (?, ?)", name, artifact)

    def put_parent(self, child: str, parent: str) -> None:
        """Add an edge; parents keep the order in which they came."""
        self._all(
            "INSERT INTO parents VALUES (?1, ?2, (SELECT count(*) FROM parents WHERE child = ?1)) "
            "ON CONFLICT DO NOTHING",
            child,
            parent,
        )

    def put_report(self, row: Row) -> None:
        """Note that a report speaks of a model."""
        self._put("reports", row, update=None)

    def put_promotion(self, row: Row) -> int:
        """Append to the history; returns its place."""
        self._put("promotions", row, update=None)
        return int(self._all("SELECT last_insert_rowid() AS seq")[0]["seq"])

    def set_champion(self, project: str, promotion: int) -> None:
        """Let a project's champion be the model of this promotion."""
        self._put("champions", {"project": project, "promotion": promotion}, update=["promotion"])

    def artifact(self, artifact_id: str) -> Row | None:
        """One artifact."""
        return self._first("SELECT * FROM artifacts WHERE id = ?", artifact_id)

    def artifacts(self, kind: str | None) -> list[Row]:
        """All artifacts, oldest first."""
        return self._rows("SELECT * FROM artifacts WHERE ?1 IS NULL OR kind = ?1 ORDER BY created_s, rowid", kind)

    def artifact_ids(self, prefix: str) -> list[str]:
        """Ids that start so."""
        # A range, because the index answers it: ids are hexadecimal, so "g" is above every digit that may follow.
        return [row["id"] for row in self._rows("SELECT id FROM artifacts WHERE id >= ?1 AND id < ?1 || 'g'", prefix)]

    def named(self, name: str) -> str | None:
        """The artifact that bears a name now."""
        row = self._first("SELECT artifact FROM names WHERE name = ? ORDER BY seq DESC LIMIT 1", name)
        return None if row is None else str(row["artifact"])

    def all_names(self) -> list[str]:
        """Every name."""
        return [row["name"] for row in self._rows("SELECT DISTINCT name FROM names ORDER BY name")]

    def parents(self, child: str) -> list[str]:
        """What an artifact was made from."""
        return [row["parent"] for row in self._rows("SELECT parent FROM parents WHERE child = ? ORDER BY seq", child)]

    def run(self, run_id: str) -> Row | None:
        """One run."""
        return self._first("SELECT * FROM runs WHERE id = ?", run_id)

    def runs(self) -> list[Row]:
        """All runs, oldest first."""
        return self._rows("SELECT * FROM runs ORDER BY started_s, id")

    def reports(self, model: str, suite: str | None) -> list[Row]:
        """Reports about a model, newest first."""
        return self._rows(
            "SELECT * FROM reports WHERE model = ?1 AND (?2 IS NULL OR suite = ?2) ORDER BY seq DESC", model, suite
        )

    def champion(self, project: str) -> Row | None:
        """The promotion that made the present champion."""
        return self._first(
            "SELECT promotions.* FROM champions JOIN promotions ON promotions.seq = champions.promotion "
            "WHERE champions.project = ?",
            project,
        )

    def promotion(self, seq: int) -> Row | None:
        """One entry of the history."""
        return self._first("SELECT * FROM promotions WHERE seq = ?", seq)

    def promotions(self, project: str) -> list[Row]:
        """A project's history, oldest first."""
        return self._rows("SELECT * FROM promotions WHERE project = ? ORDER BY seq", project)

    def projects(self) -> list[str]:
        """Every project that has a history."""
        return [row["project"] for row in self._rows("SELECT DISTINCT project FROM promotions ORDER BY project")]

    def _put(self, table: str, row: Row, update: Sequence[str] | None) -> None:
        columns = ", ".join(row)
        marks = ", ".join("?" for _ in row)
        if update is None:
            conflict = "" if table == "promotions" else "ON CONFLICT DO NOTHING"
        else:
            key = next(iter(row))
            conflict = f"ON CONFLICT({key}) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in update)
        self._all(f"INSERT INTO {table} ({columns}) VALUES ({marks}) {conflict}", *row.values())

    def _all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise RegistryError(f"{self.path}: {error}") from error

    def _rows(self, sql: str, *values: Any) -> list[Row]:
        return [dict(row) for row in self._all(sql, *values)]

    def _first(self, sql: str, *values: Any) -> Row | None:
        rows = self._rows(sql, *values)
        return rows[0] if rows else None
