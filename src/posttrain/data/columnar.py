"""Parquet and Arrow files to rows, a small batch at a time. Needs pyarrow (extra `data`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core import DataError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow

BATCH = 128  # rows turned into Python objects at once


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file."""
    pa = _pyarrow("reading Parquet")
    import pyarrow.parquet as parquet

    _refuse_empty(path)
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                yield from _rows(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound Parquet file: {error}") from error


def arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow file, in the streaming format (what `datasets` writes) or the file format."""
    pa = _pyarrow("reading Arrow files")
    import pyarrow.ipc as ipc

    _refuse_empty(path)
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                source.seek(0)
                reader = ipc.open_file(source)
                for index in range(reader.num_record_batches):
                    yield from _rows(reader.get_batch(index))
            else:
                source.seek(0)
                for batch in ipc.open_stream(source):
                    yield from _rows(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound Arrow file: {error}") from error


def _pyarrow(what_for: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("pyarrow", "data", what_for) from None
    return pyarrow


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")


def _rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any]]:
    for start in range(0, batch.num_rows, BATCH):
        for values in batch.slice(start, BATCH).to_pylist():
            yield {name: _without_null_fields(value) for name, value in values.items()}


def _without_null_fields(value: Any) -> Any:
    """A nested value without the struct fields that are null.

    All structs of an Arrow column have the same fields, so a field that only other rows have reads as null here.
    """
    if isinstance(value, dict):
        return {name: _without_null_fields(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null_fields(item) for item in value]
    return value
