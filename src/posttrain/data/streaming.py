"""Files to typed rows as a stream: format found, columns renamed, bad rows set aside and counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from posttrain.core import DataError, UsageError
from posttrain.data.convert import convert
from posttrain.data.files import check_limit, find_files
from posttrain.data.formats import ColumnMap, Columns, Format, check_kind, detect, explain_unknown, kinds_of, signature
from posttrain.data.quarantine import Quarantine, Tally
from posttrain.data.read import Row, Scanned, scan
from posttrain.data.rows import BadRow, Kind, LoadReport, RowFault, TypedRow

T_co = TypeVar("T_co", bound=TypedRow, covariant=True)

LOOK_AHEAD = 32  # rows of a file that vote on its format, so that one odd first row does not decide
EARLY_CHECK = 1000  # rows after which a stream stops if too many were bad so far


class Stream(Generic[T_co]):
    """Typed rows read anew at each iteration, in constant memory. `report` speaks of the latest iteration so far."""

    def __init__(
        self,
        path: str | Path,
        *,
        kind: Kind | None = None,
        columns: Columns | None = None,
        limit: int | None = None,
        split: str | None = None,
        name: str | None = None,
        quarantine: str | Path | None = None,
        max_bad: float = 0.05,
        early_check: int | None = EARLY_CHECK,
    ) -> None:
        check_kind(kind)
        check_limit(limit)
        if not 0 <= max_bad <= 1:
            raise UsageError(f"max_bad is a share between 0 and 1, not {max_bad}")
        self.path = path
        self.kind = kind
        self.columns = ColumnMap.parse(columns)
        self.limit = limit
        self.split = split
        self.name = name
        self.quarantine = Path(quarantine) if quarantine is not None else None
        self.max_bad = max_bad
        self.early_check = early_check
        self._tally = Tally(path)
        find_files(path, split=split)  # a wrong path is refused here, not at the first row
        if self.quarantine is not None and Path(path).is_dir() and self._holds(self.quarantine):
            raise UsageError(f"quarantine file {self.quarantine} lies in {path}, where it would be read as data")

    def _holds(self, file: Path) -> bool:
        return Path(self.path).resolve() in file.resolve().parents

    def __iter__(self) -> Iterator[T_co]:
        tally = self._tally = Tally(self.path)
        with Quarantine(self.quarantine) as quarantine:
            for rows in self._converted(tally, quarantine):
                tally.rows += len(rows)
                yield from cast(tuple[T_co, ...], rows)
        self._check(tally, final=True)

    @property
    def report(self) -> LoadReport:
        """Counts and causes of the latest iteration, up to where it is."""
        return self._tally.report(self.kind or self._tally.kind or "")

    def _converted(self, tally: Tally, quarantine: Quarantine) -> Iterator[tuple[TypedRow, ...]]:
        scanned = scan(self.path, limit=self.limit, split=self.split)
        for file, rows in itertools.groupby(scanned, key=lambda row: row.file):
            tally.files.append(file)
            for row, plan in self._planned(file, rows, tally):
                tally.read += 1
                result = self._one(row, plan)
                if isinstance(result, BadRow):
                    tally.add_bad(result)
                    quarantine.write(result)
                    self._check(tally, final=False)
                else:
                    tally.clean += 1
                    yield result

    def _planned(self, file: str, rows: Iterator[Scanned], tally: Tally) -> Iterator[tuple[Scanned, _Plan | None]]:
        """The rows of one file with the plan for them, which is made at the first row that could be parsed."""
        for row in rows:
            if isinstance(row, Row):
                ahead = [row, *itertools.islice(rows, LOOK_AHEAD - 1)]
                plan = self._plan(file, ahead, tally)
                yield from ((one, plan) for one in itertools.chain(ahead, rows))
            else:
                yield row, None

    def _plan(self, file: str, ahead: Sequence[Scanned], tally: Tally) -> _Plan:
        """How to convert one file, by the vote of its first rows, the first of which could be parsed."""
        values = [row.values for row in ahead if isinstance(row, Row)]
        union = {name: value for row in reversed(values) for name, value in row.items()}
        self.columns.check(union, file)
        kind = self.kind or tally.kind
        renamed = [self.columns.rename(row) for row in values]
        votes = Counter(found for row in renamed if (found := signature(row, kind)) is not None)
        if not votes:
            raise DataError(f"{file}: {explain_unknown(renamed[0], kind)}")
        dataset_type, columns = max(votes, key=lambda found: votes[found])
        sample = next(row for row in renamed if signature(row, kind) == (dataset_type, columns))
        tally.kind = kind or kinds_of(dataset_type, columns)[0]
        form = detect(sample, kind)
        if form.name not in tally.formats:
            tally.formats.append(form.name)
        return _Plan(form, columns, tally.kind)

    def _one(self, row: Scanned, plan: _Plan | None) -> tuple[TypedRow, ...] | BadRow:
        if isinstance(row, BadRow):
            return row
        assert plan is not None, "the first row that parses makes the plan"
        row_id = f"{self.name or row.file}:{row.line}"
        if self.name is not None and row.file != Path(self.path).name:
            row_id = f"{self.name}/{row.file}:{row.line}"
        values = self.columns.rename(row.values)
        try:
            if "id" in self.columns.columns:
                row_id = _own_id(values)
            return convert(values, plan.format.type, plan.columns, plan.kind, row_id)
        except RowFault as fault:
            field = self.columns.columns.get(fault.field, fault.field)
            return BadRow(
                file=row.file, line=row.line, field=field, cause=fault.cause, detail=fault.detail, raw=row.raw()
            )

    def _check(self, tally: Tally, *, final: bool) -> None:
        due = final or (self.early_check is not None and tally.read >= self.early_check)
        if due and tally.bad > self.max_bad * tally.read:
            report = tally.report(self.kind or tally.kind or "")
            where = f"all of them are in {self.quarantine}" if self.quarantine else "quarantine=FILE collects them"
            raise DataError(
                f"{self.path}: more bad rows than max_bad={self.max_bad:g} allows; {where}\n{report.summary()}"
            )


def _own_id(values: dict[str, Any]) -> str:
    value = values.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RowFault("id", "is not an id", repr(value))
    return str(value)


class _Plan:
    """How one file is converted."""

    def __init__(self, found: Format, columns: tuple[str, ...], kind: Kind) -> None:
        self.format = found
        self.columns = columns
        self.kind = kind
