"""Files to rows of plain values, streaming: memory does not grow with the file (a JSON array excepted)."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import msgspec

from posttrain.core import DataError
from posttrain.data.columnar import arrow_rows, parquet_rows
from posttrain.data.files import DataFile, check_limit, find_files, open_bytes
from posttrain.data.rows import BadRow

FIELD_LIMIT = 2**31 - 1  # bytes of one CSV field; Python's own limit of 128 KiB is less than a long document


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row as it stands in its file."""

    values: dict[str, Any]
    file: str  # name of the file, relative to the folder that was read
    line: int  # 1-based line where the row begins; its number in Parquet, Arrow and JSON arrays
    source: bytes | None = None  # the line itself, in JSON lines

    def raw(self) -> str:
        """The row as text, for the quarantine file."""
        if self.source is not None:
            return self.source.decode("utf-8", "backslashreplace")
        return json.dumps(self.values, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()


Scanned: TypeAlias = Row | BadRow


def read_rows(
    path: str | Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    on_bad: Callable[[BadRow], None] | None = None,
) -> Iterator[Row]:
    """Rows of a file, a folder, a glob pattern or a saved Hugging Face dataset, one at a time.

    Args:
        path: `.jsonl`, `.json` (an array), `.csv`, `.tsv` (each also `.gz`), `.parquet`, `.arrow`; a folder or a glob
            of such files; a `datasets.save_to_disk` folder.
        limit: stop after so many rows, broken ones included.
        split: which split, where the path holds several.
        on_bad: called for each line that cannot be parsed; without it, the first such line raises.

    Raises:
        DataError: nothing to read, a file that is not what its name says, or a broken line and no `on_bad`.
    """
    for scanned in scan(path, limit=limit, split=split):
        if isinstance(scanned, Row):
            yield scanned
        elif on_bad is None:
            raise DataError(f"{scanned.describe()}; `load` with quarantine= sets such rows aside")
        else:
            on_bad(scanned)


def scan(path: str | Path, *, limit: int | None = None, split: str | None = None) -> Iterator[Scanned]:
    """As `read_rows`, with broken lines as `BadRow` in their place."""
    check_limit(limit)
    rows = itertools.chain.from_iterable(scan_file(file) for file in find_files(path, split=split))
    number = 0
    for number, row in enumerate(itertools.islice(rows, limit), 1):  # noqa: B007 - read after the loop
        yield row
    if number == 0:
        raise DataError(f"{path}: no rows: the file holds none")


def scan_file(file: DataFile) -> Iterator[Scanned]:
    """Rows of one file."""
    readers: dict[str, Callable[[DataFile], Iterator[Scanned]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_array,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _columnar(parquet_rows),
        ".arrow": _columnar(arrow_rows),
    }
    return readers[file.suffix](file)


def _columnar(reader: Callable[[Path], Iterator[dict[str, Any]]]) -> Callable[[DataFile], Iterator[Scanned]]:
    def rows(file: DataFile) -> Iterator[Scanned]:
        for number, values in enumerate(reader(file.path), 1):
            yield Row(values=values, file=file.name, line=number)

    return rows


def _json_lines(file: DataFile) -> Iterator[Scanned]:
    with open_bytes(file) as lines:
        yield from _rows_of_lines(file, lines)


def _rows_of_lines(file: DataFile, lines: BinaryIO) -> Iterator[Scanned]:
    for number, line in enumerate(lines, 1):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{file.path}: is UTF-16, and JSON lines are UTF-8: convert the file")
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield _parse_line(line, file.name, number)


def _parse_line(line: bytes, name: str, number: int) -> Scanned:
    try:
        values = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _broken_line(line, name, number, error)
    return _row(values, name, number, line)


def _broken_line(line: bytes, name: str, number: int, error: Exception) -> Scanned:
    """What is wrong with a line; NaN and Infinity, which Python writes although JSON has none, are let through."""
    raw = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    if isinstance(error, UnicodeDecodeError):
        return BadRow(file=name, line=number, field="", cause="not UTF-8", detail=str(error), raw=raw)
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow(file=name, line=number, field="", cause="broken JSON", detail=str(error), raw=raw)
    if has_surrogate(values):
        return BadRow(file=name, line=number, field="", cause="lone surrogate", detail=str(error), raw=raw)
    return _row(values, name, number, line)


def _row(values: object, name: str, number: int, source: bytes | None) -> Scanned:
    if isinstance(values, dict):
        return Row(values=values, file=name, line=number, source=source.rstrip(b"\r\n") if source else None)
    raw = source.decode("utf-8", "backslashreplace").rstrip("\r\n") if source else json.dumps(values)
    what = f"it is {type(values).__name__}"
    return BadRow(file=name, line=number, field="", cause="not a JSON object", detail=what, raw=raw)


def has_surrogate(value: object) -> bool:
    """Whether a text anywhere in a value holds half of a UTF-16 pair, which no UTF-8 file can hold."""
    if isinstance(value, str):
        return re.search("[\ud800-\udfff]", value) is not None
    if isinstance(value, dict):
        return any(has_surrogate(key) or has_surrogate(item) for key, item in value.items())
    if isinstance(value, list):
        return any(has_surrogate(item) for item in value)
    return False


def _json_array(file: DataFile) -> Iterator[Scanned]:
    """A JSON array, an object that holds exactly one array of rows, or JSON lines under the wrong name."""
    with open_bytes(file) as source:
        text = source.read().removeprefix(codecs.BOM_UTF8)
    try:
        values = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if _looks_like_lines(text):
            yield from _rows_of_lines(file, io.BytesIO(text))
            return
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{file.path}: not valid JSON: {error}") from error
    for number, item in enumerate(_array_in(values, file), 1):
        if has_surrogate(item):
            raw = json.dumps(item)
            yield BadRow(file=file.name, line=number, field="", cause="lone surrogate", raw=raw)
        else:
            yield _row(item, file.name, number, None)


def _looks_like_lines(text: bytes) -> bool:
    lines = text.lstrip().split(b"\n", 1)
    if len(lines) < 2 or not lines[0].startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except ValueError:
        return False


def _array_in(values: object, file: DataFile) -> list[Any]:
    if isinstance(values, list):
        return values
    if isinstance(values, dict):
        arrays = [item for item in values.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(arrays) == 1 and not any(key in values for key in ("messages", "conversations", "prompt")):
            return arrays[0]
        return [values]
    raise DataError(f"{file.path}: a JSON array of objects is needed, not {type(values).__name__}")


def _csv(file: DataFile) -> Iterator[Scanned]:
    csv.field_size_limit(FIELD_LIMIT)
    with open_bytes(file) as source:
        buffered = io.BufferedReader(source)  # type: ignore[type-var]  # BinaryIO is read like a raw stream
        utf16 = buffered.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = io.TextIOWrapper(buffered, encoding="utf-16" if utf16 else "utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            yield from _csv_rows(file, reader)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path}: not UTF-8 near line {reader.line_num + 1}: {error}; convert the file"
            ) from error
        except csv.Error as error:
            raise DataError(f"{file.path}:{reader.line_num}: not valid CSV: {error}") from error


def _csv_rows(file: DataFile, reader: Any) -> Iterator[Scanned]:
    header = next(reader, None)
    if header is None or not any(name.strip() for name in header):
        raise DataError(f"{file.path}: no header line with the names of the columns")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"{file.path}: two columns are called {doubled[0]!r}")
    line = reader.line_num + 1
    for cells in reader:
        if len(cells) == len(header):
            yield Row(values=dict(zip(header, cells, strict=True)), file=file.name, line=line)
        elif cells:
            detail = f"{len(cells)} where the header has {len(header)}"
            raw = json.dumps(cells, ensure_ascii=False)
            yield BadRow(file=file.name, line=line, field="", cause="wrong number of CSV cells", detail=detail, raw=raw)
        line = reader.line_num + 1
