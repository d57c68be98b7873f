"""Content-addressed storage: the id of an artifact is the SHA-256 of what is in it, and nothing else.

A file's content is hashed; a folder's digest is over its sorted list of (relative path, SHA-256 of the file). A single
file counts as a folder with one nameless entry, so the same bytes are the same artifact whatever the file is called.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from posttrain.core import RegistryError, content_hash
from posttrain.registry.durable import sync_folder

Storage = Literal["copy", "link", "reference"]

Files = dict[str, str]  # relative path ("" for a single file) → SHA-256 (hex)


def hash_files(path: Path) -> Files:
    """SHA-256 of each file under a folder, or of one file. Links to files are followed.

    Raises:
        RegistryError: nothing is there, there are no files, or something is neither a file nor a folder.
    """
    if path.is_file():
        return {"": _hash_file(path)}
    if not path.is_dir():
        raise RegistryError(f"{path}: no such file or folder, so there is nothing to register")
    files = {}
    for found in sorted(path.rglob("*")):
        if found.is_file():
            files[found.relative_to(path).as_posix()] = _hash_file(found)
        elif not found.is_dir() or found.is_symlink():
            raise RegistryError(
                f"{found}: an artifact holds files and folders only (a linked folder must be copied in)"
            )
    if not files:
        raise RegistryError(f"{path}: an empty folder, so there is nothing to register")
    return files


def digest_of(files: Files) -> str:
    """The artifact's id: SHA-256 (hex) over the sorted (relative path, file hash)."""
    return content_hash(sorted(files.items()))


def folder_digest(path: Path) -> str:
    """The id that a file or folder has in every registry."""
    return digest_of(hash_files(path))


def num_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())


def changed_files(known: Files, path: Path) -> list[str]:
    """How a place differs from what was registered: one line per file that is gone, changed or new."""
    if not path.exists():
        return [f"{path} is gone"]
    found = hash_files(path)
    return [
        *(f"{name or path.name} is gone" for name in sorted(known.keys() - found.keys())),
        *(f"{name or path.name} has changed" for name in sorted(known) if found.get(name, known[name]) != known[name]),
        *(f"{name or path.name} is new" for name in sorted(found.keys() - known.keys())),
    ]


class ContentStore:
    """A folder of artifacts: `<root>/<first two digits>/<id>/…`. Whole or absent, never half."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, source: Path, artifact_id: str, storage: Storage) -> Path:
        """Bring a file or folder in by copy or hard link, and give its place.

        Raises:
            RegistryError: the source changed while it was copied, or cannot be linked from another file system.
        """
        return self._place(artifact_id, lambda aside: _bring(source, aside, link=storage == "link"), _name_of(source))

    def put_bytes(self, content: bytes, artifact_id: str, name: str) -> Path:
        """Bring bytes in as one file of this name, and give its place."""

        def write(aside: Path) -> None:
            (aside / name).write_bytes(content)
            _flush(aside / name)

        return self._place(artifact_id, write, name)

    def _place(self, artifact_id: str, fill: Callable[[Path], None], inner: str | None) -> Path:
        home = self.root / artifact_id[:2] / artifact_id
        if not home.exists():
            aside = self.root / ".incoming" / f"{artifact_id[:12]}-{secrets.token_hex(4)}"
            aside.mkdir(parents=True)
            try:
                fill(aside)
                self._check(aside, artifact_id, inner)
                sync_folder(aside)
                home.parent.mkdir(parents=True, exist_ok=True)
                _rename(aside, home)
                sync_folder(home.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        if inner is None:
            return home
        return next(iter(sorted(home.iterdir())))  # the same bytes may have come under another name before

    def _check(self, aside: Path, artifact_id: str, inner: str | None) -> None:
        if folder_digest(aside if inner is None else aside / inner) != artifact_id:
            raise RegistryError("the files changed while they were being copied; nothing was registered. Try again")


def _name_of(source: Path) -> str | None:
    return source.name if source.is_file() else None


def _bring(source: Path, aside: Path, *, link: bool) -> None:
    pairs = [(source, aside / source.name)]
    if source.is_dir():
        pairs = [(found, aside / found.relative_to(source)) for found in sorted(source.rglob("*")) if found.is_file()]
    for old, new in pairs:
        new.parent.mkdir(parents=True, exist_ok=True)
        if not link:
            shutil.copyfile(old, new)
            new.chmod(0o444)
            _flush(new)
            continue
        try:
            os.link(old.resolve(), new)
        except OSError as error:
            raise RegistryError(f"{old}: cannot be hard-linked into the store ({error}); use storage='copy'") from error


def _rename(aside: Path, home: Path) -> None:
    try:
        aside.rename(home)
    except OSError:
        if not home.exists():  # else another process brought the same content first
            raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
