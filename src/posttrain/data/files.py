"""Which files a path means, and how to open them."""

from __future__ import annotations

import glob
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from posttrain.core import DataError, UsageError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
NOT_ROWS = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json"}
SPLIT_WORDS = ("train", "test", "validation", "valid", "dev", "eval")


class DataFile(msgspec.Struct, frozen=True):
    """One file of rows: where it is, what it is called in messages and ids, and how it is written."""

    path: Path
    name: str  # relative to the folder that was asked for
    suffix: str  # one of SUFFIXES, without .gz
    packed: bool  # gzip


def find_files(path: str | Path, *, split: str | None = None) -> list[DataFile]:
    """The data files that a path stands for, in a fixed order.

    Args:
        path: a file; a folder, searched at all depths; a `datasets.save_to_disk` folder; or a glob pattern.
        split: which split, where the folder has several ("train", "test" …).

    Raises:
        DataError: nothing there, no file of a known type, or several splits and none chosen.
    """
    target = Path(path)
    if target.is_file():
        if split is not None and _split_of(target.name) not in (split, None):
            raise DataError(f"{path}: the file's name says {_split_of(target.name)!r}, not split {split!r}")
        return [_data_file(target, target.name)]
    if target.is_dir():
        saved = _saved_dataset(target, split)
        return saved if saved is not None else _folder(target, split)
    if any(sign in str(path) for sign in "*?["):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns
        files = [_data_file(match, match.name) for match in found if match.is_file() and _suffix(match)]
        if not files:
            raise DataError(f"{path}: no data file matches this pattern (types: {', '.join(SUFFIXES)})")
        return _with_distinct_names(files)
    raise DataError(f"{path}: no such file or folder")


def _suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _data_file(path: Path, name: str) -> DataFile:
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(
            f"{path}: not a known type of data file; known are {', '.join(SUFFIXES)}, the texts also as .gz"
        )
    return DataFile(path=path, name=name, suffix=suffix, packed=path.name.lower().endswith(".gz"))


def _with_distinct_names(files: list[DataFile]) -> list[DataFile]:
    """Names that tell the files apart: where two share one, all take their path as it was found."""
    if len({file.name for file in files}) == len(files):
        return files
    return [msgspec.structs.replace(file, name=file.path.as_posix()) for file in files]


def _saved_dataset(folder: Path, split: str | None) -> list[DataFile] | None:
    """The arrow files of a folder that `datasets.save_to_disk` wrote; None where it is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        chosen = _choose_split(folder, [str(name) for name in splits], split)
        files = _saved_dataset(folder / chosen, None)
        if files is None:
            raise DataError(f"{folder / chosen}: state.json is missing: the saved dataset is not whole")
        return [msgspec.structs.replace(file, name=f"{chosen}/{file.name}") for file in files]
    if not (folder / "state.json").is_file():
        return None
    if split is not None and _json(folder / "state.json").get("_split") not in (split, None):
        raise DataError(f"{folder}: holds split {_json(folder / 'state.json').get('_split')!r}, not {split!r}")
    names = [str(entry["filename"]) for entry in _json(folder / "state.json").get("_data_files", [])]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: state.json names {missing[0]}, which is not there: the saved dataset is not whole")
    return [_data_file(folder / name, name) for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict)
        return values
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error


def _choose_split(folder: Path, splits: list[str], split: str | None) -> str:
    if split is not None:
        if split not in splits:
            raise DataError(f"{folder}: no split {split!r}; there are {', '.join(splits) or 'none'}")
        return split
    if len(splits) != 1:
        raise DataError(f"{folder}: has splits {', '.join(splits) or 'none'}: choose one with split=")
    return splits[0]


def _folder(folder: Path, split: str | None) -> list[DataFile]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _suffix(path)
        and path.name not in NOT_ROWS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"{folder}: no data file in this folder (types: {', '.join(SUFFIXES)})")
    by_split: dict[str | None, list[DataFile]] = {}
    for path in found:
        name = path.relative_to(folder).as_posix()
        by_split.setdefault(_split_of(name), []).append(_data_file(path, name))
    named = [name for name in by_split if name is not None]
    if split is not None or len(named) > 1:
        return by_split[_choose_split(folder, named, split)]
    return [file for files in by_split.values() for file in files]


def _split_of(name: str) -> str | None:
    """The split that a file's relative name speaks of: train-00000-of-00002.parquet, test/part.jsonl …"""
    words = re.split(r"[/_.\-]+", name.lower())
    return next((word for word in words if word in SPLIT_WORDS), None)


@contextmanager
def open_bytes(file: DataFile) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked.

    Raises:
        DataError: the file is empty, unreadable, or its compression is damaged or ends early.
    """
    try:
        if file.path.stat().st_size == 0:
            raise DataError(f"{file.path}: the file is empty (0 bytes)")
        with file.path.open("rb") as raw:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if file.packed else raw
    except EOFError as error:
        raise DataError(
            f"{file.path}: the gzip file ends too early: it was cut off; fetch or write it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.path}: not a sound gzip file: {error}; fetch or write it again") from error
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def check_limit(limit: int | None) -> None:
    """Refuse a limit that is not a count.

    Raises:
        UsageError: the limit is not at least 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, not {limit}")
