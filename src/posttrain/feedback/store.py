"""Interactions and the signals about them, in one SQLite file."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from posttrain.core import DataError, Feedback, Interaction, Record, ServeError

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE interactions (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    choice INTEGER NOT NULL,
    model TEXT NOT NULL,
    model_name TEXT NOT NULL,
    created_s REAL NOT NULL,
    body BLOB NOT NULL,
    prompt_tokens BLOB NOT NULL,
    tokens BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    UNIQUE (id, choice)
);
CREATE INDEX interactions_by_model ON interactions (model);
CREATE INDEX interactions_by_model_name ON interactions (model_name);
CREATE INDEX interactions_by_time ON interactions (created_s);
CREATE TABLE feedback (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    completion_id TEXT NOT NULL,
    choice INTEGER NOT NULL,
    rejected_id TEXT,
    kind TEXT NOT NULL,
    created_s REAL NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX feedback_by_completion ON feedback (completion_id);
CREATE INDEX feedback_by_rejected ON feedback (rejected_id) WHERE rejected_id IS NOT NULL;
CREATE INDEX feedback_by_kind ON feedback (kind);
"""
TIES = ("tie_good", "tie_bad")
# Left alone, SQLite would walk the rows in order until it meets the first that is young enough.
FIRST_SINCE = "SELECT min(seq) FROM interactions INDEXED BY interactions_by_time WHERE created_s >= ?"
_INTERACTION = "body, prompt_tokens, tokens, logprobs"
_BUSY_S = 30.0


class InteractionPage(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A page of interactions, oldest logged first."""

    items: tuple[Interaction, ...]
    next_cursor: int | None  # give it back as `cursor`; None: nothing more for now


class StoreCounts(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a store holds."""

    interactions: int
    feedback: int
    kinds: dict[str, int]  # feedback by kind


class FeedbackStore:
    """What was served and what people said about it.

    One SQLite file in write-ahead mode, so that a server writes while an export reads, in this process or another. Safe
    to share between threads. A row is on disk when the call that wrote it returns.

    Token ids and logprobs are kept as packed arrays (int32, float64), exact to the bit, beside the rest of the record
    as JSON.

    Args:
        path: the file; made, with its folder, if absent.

    Raises:
        DataError: the file is no such store, or was written by another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._connection = _connect(self.path)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        connection = self._connection
        try:
            if self._version() is None:
                connection.execute("PRAGMA journal_mode = WAL")
                with _transaction(connection):
                    if self._version() is None:  # nobody else was quicker
                        for statement in SCHEMA.split(";"):
                            connection.execute(statement)
                        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("PRAGMA synchronous = FULL")  # what was acknowledged survives a power cut
            version = self._version()
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: not a feedback store: {error}. Give the path of a new file") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{self.path}: a feedback store of version {version}; this release reads version {SCHEMA_VERSION}"
            )

    def _version(self) -> int | None:
        """The schema's version; None of an empty file."""
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return version if version or tables else None

    def log(self, interaction: Interaction) -> None:
        """Store one served answer; see `log_many`."""
        self.log_many([interaction])

    def log_many(self, interactions: Iterable[Interaction]) -> int:
        """Store served answers in one transaction: all or none.

        An answer that is already stored, unchanged, is left alone, so a batch may be sent again after a failure.

        Returns:
            How many were new.

        Raises:
            DataError: another answer is stored under the same id and choice, or the file cannot be written.
        """
        rows = [_interaction_row(interaction) for interaction in interactions]
        sql = (
            "INSERT INTO interactions (id, choice, model, model_name, created_s, body, prompt_tokens, tokens, logprobs)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id, choice) DO NOTHING"
        )
        try:
            with self._lock, _transaction(self._connection) as connection:
                added = 0
                for row in rows:
                    inserted = connection.execute(sql, row).rowcount
                    added += inserted
                    if not inserted:
                        self._refuse_change(row)
                return added
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: interactions could not be stored: {error}") from error

    def _refuse_change(self, row: tuple[Any, ...]) -> None:
        stored = self._connection.execute(
            f"SELECT {_INTERACTION} FROM interactions WHERE id = ? AND choice = ?", row[:2]
        ).fetchone()
        if stored != row[5:]:
            raise DataError(f"{self.path}: another answer is already stored as {row[0]!r}, choice {row[1]}")

    def interaction(self, completion_id: str, choice: int = 0) -> Interaction | None:
        """One served answer, or None if there is no such one."""
        rows = self._rows(
            f"SELECT {_INTERACTION} FROM interactions WHERE id = ? AND choice = ?", (completion_id, choice)
        )
        return _read_interaction(rows[0]) if rows else None

    def choices(self, completion_id: str) -> list[Interaction]:
        """All choices of one completion, by index; empty if there is no such completion."""
        sql = f"SELECT {_INTERACTION} FROM interactions WHERE id = ? ORDER BY choice"
        return [_read_interaction(row) for row in self._rows(sql, (completion_id,))]

    def interactions(
        self, model: str | None = None, since_s: float | None = None, *, limit: int = 1000, cursor: int | None = None
    ) -> InteractionPage:
        """Served answers in the order in which they were logged.

        Args:
            model: only of this model, by card id or by name.
            since_s: only those created at or after this Unix time.
            limit: how many at most.
            cursor: `next_cursor` of the page before; pages never repeat nor skip an answer.
        """
        if limit < 1:
            raise ServeError(f"interactions: limit must be at least 1, not {limit}")
        start, where = (cursor or 0) + 1, ["seq >= ?"]
        values: list[Any] = []
        if model is not None:
            known_id = self._rows("SELECT 1 FROM interactions WHERE model = ? LIMIT 1", (model,))
            where.append("model = ?" if known_id else "model_name = ?")
            values.append(model)
        if since_s is not None:
            if cursor is None:  # the first row of that time, found in the index, spares a walk over all earlier rows
                first = self._rows(FIRST_SINCE, (since_s,))[0][0]
                if first is None:
                    return InteractionPage(items=(), next_cursor=None)
                start = first
            where.append("created_s >= ?")
            values.append(since_s)
        sql = f"SELECT seq, {_INTERACTION} FROM interactions WHERE {' AND '.join(where)} ORDER BY seq LIMIT ?"
        rows = self._rows(sql, (start, *values, limit))
        items = tuple(_read_interaction(row[1:]) for row in rows)
        return InteractionPage(items=items, next_cursor=rows[-1][0] if len(rows) == limit else None)

    def add(self, feedback: Feedback) -> None:
        """Store one signal.

        Raises:
            ServeError: the completion (or the rejected one) is unknown, the value does not fit the kind, or the id is
                taken.
        """
        check_feedback(feedback)
        row = (
            feedback.id,
            feedback.completion_id,
            feedback.choice,
            feedback.rejected_id,
            feedback.kind,
            feedback.created_s,
            feedback.to_json(),
        )
        try:
            with self._lock, _transaction(self._connection) as connection:
                self._require(feedback.completion_id, feedback.choice)
                if feedback.rejected_id is not None:
                    self._require(feedback.rejected_id, feedback.rejected_choice)
                connection.execute(
                    "INSERT INTO feedback (id, completion_id, choice, rejected_id, kind, created_s, body)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
        except sqlite3.IntegrityError:
            raise ServeError(f"feedback {feedback.id!r} is already stored; give each signal its own id") from None
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: feedback could not be stored: {error}") from error

    def _require(self, completion_id: str, choice: int) -> None:
        sql = "SELECT 1 FROM interactions WHERE id = ? AND choice = ?"
        if not self._connection.execute(sql, (completion_id, choice)).fetchone():
            raise ServeError(f"feedback: there is no completion {completion_id!r} with choice {choice}")

    def feedback_for(self, completion_id: str) -> list[Feedback]:
        """All signals that name a completion, as the one spoken of or as the rejected one, oldest first."""
        sql = "SELECT body FROM feedback WHERE completion_id = ?1 OR rejected_id = ?1 ORDER BY seq"
        return [Feedback.from_json(row[0], str(self.path)) for row in self._rows(sql, (completion_id,))]

    def all_feedback(self, kind: str | None = None) -> Iterator[Feedback]:
        """Every signal, in the order of arrival; read in pages, so that writers are not held up."""
        last = 0
        where = "seq > ?1 AND kind = ?2" if kind else "seq > ?1 AND ?2 IS NULL"
        while rows := self._rows(f"SELECT seq, body FROM feedback WHERE {where} ORDER BY seq LIMIT 1000", (last, kind)):
            yield from (Feedback.from_json(body, str(self.path)) for _, body in rows)
            last = rows[-1][0]

    def judged(self, model: str | None = None, since_s: float | None = None) -> list[str]:
        """Ids of the completions that some signal names, by time of creation, then id.

        Args:
            model: only of this model, by card id or by name.
            since_s: only those created at or after this Unix time.
        """
        sql = """
            SELECT named.id FROM (
                SELECT completion_id AS id FROM feedback
                UNION SELECT rejected_id FROM feedback WHERE rejected_id IS NOT NULL
            ) AS named JOIN interactions ON interactions.id = named.id
            WHERE (?1 IS NULL OR interactions.model = ?1 OR interactions.model_name = ?1)
              AND (?2 IS NULL OR interactions.created_s >= ?2)
            GROUP BY named.id ORDER BY min(interactions.created_s), named.id
        """
        return [row[0] for row in self._rows(sql, (model, since_s))]

    def counts(self) -> StoreCounts:
        """How many answers and signals there are."""
        interactions = self._rows("SELECT count(*) FROM interactions", ())[0][0]
        kinds = dict(self._rows("SELECT kind, count(*) FROM feedback GROUP BY kind ORDER BY kind", ()))
        return StoreCounts(interactions=interactions, feedback=sum(kinds.values()), kinds=kinds)

    def _rows(self, sql: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: the feedback store cannot be read: {error}") from error

    def close(self) -> None:
        """Close the file. Further calls raise DataError."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_feedback(feedback: Feedback) -> None:
    """Raise ServeError if a signal's value does not fit its kind; says which field and what it must be."""
    value, kind = feedback.value, feedback.kind
    number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = number and math.isfinite(value)  # type: ignore[arg-type]
    rules: dict[str, tuple[bool, str]] = {
        "thumb": (isinstance(value, bool), "true (up) or false (down)"),
        "rating": (finite, "a finite number"),
        "correction": (isinstance(value, str) and bool(value), "the corrected text, not empty"),
        "label": (isinstance(value, bool | str) or finite, "a boolean, a finite number or a text"),
        "preferred": (value is None or value in TIES, f"absent, or one of {', '.join(TIES)}"),
    }
    fits, rule = rules[kind]
    if not fits:
        raise ServeError(f"feedback: the value of a {kind} must be {rule}, not {value!r}")
    if kind == "label" and not feedback.name:
        raise ServeError("feedback: a label needs a name")
    if feedback.choice < 0 or feedback.rejected_choice < 0:
        raise ServeError("feedback: choice and rejected_choice must be 0 or more")
    if (kind == "preferred") != (feedback.rejected_id is not None):
        raise ServeError("feedback: `preferred` needs rejected_id (the completion that lost), other kinds take none")
    if kind == "preferred" and (feedback.completion_id, feedback.choice) == (
        feedback.rejected_id,
        feedback.rejected_choice,
    ):
        raise ServeError("feedback: an answer cannot be preferred to itself; set rejected_id or rejected_choice")


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
    except sqlite3.Error as error:
        raise DataError(f"{path}: cannot be opened: {error}") from error


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _interaction_row(interaction: Interaction) -> tuple[Any, ...]:
    try:
        return (
            interaction.id,
            interaction.choice,
            interaction.model,
            interaction.model_name,
            interaction.created_s,
            interaction.replace(prompt_tokens=(), tokens=(), logprobs=()).to_json(),
            np.asarray(interaction.prompt_tokens, "<i4").tobytes(),
            np.asarray(interaction.tokens, "<i4").tobytes(),
            np.asarray(interaction.logprobs, "<f8").tobytes(),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"interaction {interaction.id!r}, choice {interaction.choice}: {error}") from error


def _read_interaction(row: Sequence[bytes]) -> Interaction:
    body, prompt_tokens, tokens, logprobs = row
    return Interaction.from_json(body, "feedback store").replace(
        prompt_tokens=tuple(np.frombuffer(prompt_tokens, "<i4").tolist()),
        tokens=tuple(np.frombuffer(tokens, "<i4").tolist()),
        logprobs=tuple(np.frombuffer(logprobs, "<f8").tolist()),
    )
