"""The doors for typed rows: `load` for memory, `stream` for files that are larger than it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, overload

from posttrain.core import DataError
from posttrain.data.formats import Columns
from posttrain.data.rows import (
    CompletionRow,
    Kind,
    LabelRow,
    LoadReport,
    PreferenceRow,
    PromptRow,
    StepsRow,
    TextRow,
    TypedRow,
)
from posttrain.data.streaming import Stream

T_co = TypeVar("T_co", bound=TypedRow, covariant=True)


class Dataset(Sequence[T_co], Generic[T_co]):
    """Typed rows in memory, in file order, with the report of their loading."""

    def __init__(self, rows: Sequence[T_co], *, kind: Kind, report: LoadReport) -> None:
        self.rows: tuple[T_co, ...] = tuple(rows)
        self.kind = kind
        self.report = report

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | Sequence[T_co]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Dataset({self.kind}, {len(self)} rows, {self.report.num_bad} bad)"


@overload
def stream(
    path: str | Path,
    *,
    kind: Literal["text"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[TextRow]: ...


@overload
def stream(
    path: str | Path,
    *,
    kind: Literal["prompt"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[PromptRow]: ...


@overload
def stream(
    path: str | Path,
    *,
    kind: Literal["completion"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[CompletionRow]: ...


@overload
def stream(
    path: str | Path,
    *,
    kind: Literal["preference"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[PreferenceRow]: ...


@overload
def stream(
    path: str | Path,
    *,
    kind: Literal["unpaired"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[LabelRow]: ...


@overload
def stream(
    path: str | Path,
    *,
    kind: Literal["steps"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[StepsRow]: ...


@overload
def stream(
    path: str | Path,
    *,
    kind: Kind | None = None,
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Stream[TypedRow]: ...


def stream(
    path: str | Path,
    *,
    kind: Kind | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    split: str | None = None,
    name: str | None = None,
    quarantine: str | Path | None = None,
    max_bad: float = 0.05,
) -> Stream[Any]:
    """As `load`, but the files are read anew at each iteration and nothing is kept; `.report` has the counts.

    The share of bad rows is checked after every bad row from the thousandth row on, and at the end.
    """
    return Stream(
        path, kind=kind, columns=columns, limit=limit, split=split, name=name, quarantine=quarantine, max_bad=max_bad
    )


@overload
def load(
    path: str | Path,
    *,
    kind: Literal["text"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[TextRow]: ...


@overload
def load(
    path: str | Path,
    *,
    kind: Literal["prompt"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[PromptRow]: ...


@overload
def load(
    path: str | Path,
    *,
    kind: Literal["completion"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[CompletionRow]: ...


@overload
def load(
    path: str | Path,
    *,
    kind: Literal["preference"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[PreferenceRow]: ...


@overload
def load(
    path: str | Path,
    *,
    kind: Literal["unpaired"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[LabelRow]: ...


@overload
def load(
    path: str | Path,
    *,
    kind: Literal["steps"],
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[StepsRow]: ...


@overload
def load(
    path: str | Path,
    *,
    kind: Kind | None = None,
    columns: Columns | None = ...,
    limit: int | None = ...,
    split: str | None = ...,
    name: str | None = ...,
    quarantine: str | Path | None = ...,
    max_bad: float = ...,
) -> Dataset[TypedRow]: ...


def load(
    path: str | Path,
    *,
    kind: Kind | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    split: str | None = None,
    name: str | None = None,
    quarantine: str | Path | None = None,
    max_bad: float = 0.05,
) -> Dataset[Any]:
    """Typed rows of a file, folder, glob pattern or saved Hugging Face dataset, in memory.

    Args:
        path: see `read_rows`.
        kind: what rows to make ("completion", "prompt", "preference", "unpaired", "text", "steps"); by default what
            the format found stands for.
        columns: which columns stand for which canonical names: `{"prompt": "question"}` or `"prompt=question"`.
        limit: read so many source rows at most.
        split: which split, where the path has several.
        name: what row ids begin with, instead of the file's name: `<name>:<line>`. Ids come from the column that
            `columns` maps to `id`, if it maps one.
        quarantine: JSON lines file for the rows that cannot be used, with file, line, field, cause and the row itself.
        max_bad: the share of bad rows above which loading stops.

    Returns:
        A sequence of typed rows; `.report` has the counts and the causes of bad rows.

    Raises:
        DataError: nothing to read, an unknown format, an absent column, two rows with one id, or too many bad rows
            (with a summary of causes and lines).
    """
    stream = Stream[TypedRow](
        path,
        kind=kind,
        columns=columns,
        limit=limit,
        split=split,
        name=name,
        quarantine=quarantine,
        max_bad=max_bad,
        early_check=None,
    )
    rows = list(stream)
    repeated = [row_id for row_id, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: {len(repeated)} ids stand in several rows, {repeated[0]!r} for one; map another column to id"
        )
    report = stream.report
    return Dataset(rows, kind=cast(Kind, report.kind), report=report)
