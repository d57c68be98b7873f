"""Where bad rows go, and the counts of one pass over the data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from posttrain.data.rows import BadRow, Kind, LoadReport, cause_key

KEPT_BAD = 100  # bad rows that the report itself holds; the quarantine file holds all


class Tally:
    """Counts of one pass."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.files: list[str] = []
        self.formats: list[str] = []
        self.kind: Kind | None = None
        self.read = self.clean = self.bad = self.rows = 0
        self.causes: Counter[str] = Counter()
        self.kept: list[BadRow] = []

    def add_bad(self, row: BadRow) -> None:
        self.bad += 1
        self.causes[cause_key(row)] += 1
        if len(self.kept) < KEPT_BAD:
            self.kept.append(row)

    def report(self, kind: str) -> LoadReport:
        return LoadReport(
            files=tuple(self.files),
            formats=tuple(self.formats),
            kind=kind,
            num_read=self.read,
            num_clean=self.clean,
            num_bad=self.bad,
            num_rows=self.rows,
            causes=dict(self.causes),
            bad=tuple(self.kept),
        )


class Quarantine:
    """Writes bad rows as JSON lines; the file is made anew at each pass, and is empty where no row is bad."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.file: BinaryIO | None = None

    def __enter__(self) -> Quarantine:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, row: BadRow) -> None:
        if self.file is not None:
            self.file.write(row.to_json() + b"\n")
            self.file.flush()
