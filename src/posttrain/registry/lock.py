"""A lock on a file that dies with its process: nothing to clean up after `kill -9`."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """An advisory exclusive lock (`flock`), held by one open file of one process.

    A child made by `fork` would share the lock and keep it after its parent's death, so it lets go of its copy at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; False where another holds it."""
        if self._handle is not None:
            return True
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._handle = handle
        _HELD.add(self)
        return True

    def release(self) -> None:
        """Let go. Safe to call twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        _HELD.discard(self)

    def held(self) -> bool:
        """True where this object holds the lock."""
        return self._handle is not None

    @staticmethod
    def taken(path: Path) -> bool:
        """True where anyone holds the lock on this file, without making the file."""
        if not path.exists():
            return False
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False


def _forget_in_child() -> None:
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
