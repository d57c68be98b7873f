"""Replies of judges on disk, by a hash of all that decides them."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import msgspec

from posttrain.core import DataError

_BUSY_S = 30.0
_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, body BLOB NOT NULL)"


class CachedReply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply that could be read, and what it cost when it was asked for."""

    text: str
    cost: float = 0.0


class JudgeCache:
    """One SQLite file in write-ahead mode, shared by threads and processes.

    A reply lost to a power cut is asked for again, so that a write need not wait for the disk.

    Args:
        path: the file; made, with its folder, if absent.

    Raises:
        DataError: the file is no such cache.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path}: not a cache of judges' replies: {error}. Give the path of a new file"
            ) from error

    def get(self, key: str) -> CachedReply | None:
        """The reply under a key, if there is one."""
        with self._lock:
            row = self._connection.execute("SELECT body FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=CachedReply)

    def put(self, key: str, reply: CachedReply) -> None:
        """Keep a reply. The first one under a key stays, so that all who ask get the same."""
        with self._lock:
            self._connection.execute(
                "INSERT OR IGNORE INTO replies (key, body) VALUES (?, ?)", (key, msgspec.json.encode(reply))
            )

    def __len__(self) -> int:
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM replies").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
