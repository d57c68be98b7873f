"""Metrics on their way to disk: running means, and trackers that write JSON lines or nothing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from posttrain.core.errors import DataError


class Mean:
    """Weighted running means by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    def add(self, metrics: Mapping[str, float], weight: float = 1.0) -> None:
        """Add one observation of each metric."""
        for name, value in metrics.items():
            self._sums[name] += value * weight
            self._weights[name] += weight

    def result(self) -> dict[str, float]:
        """The mean of each metric; metrics whose weight is 0 are left out."""
        return {name: self._sums[name] / weight for name, weight in self._weights.items() if weight}


class JsonlTracker:
    """Appends `{"step": …, metric: value}` lines to a file. NaN and infinities are written as null, which JSON has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line and flush it."""
        row: dict[str, Any] = {"step": step}
        row.update({name: value if math.isfinite(value) else None for name, value in metrics.items()})
        self._file.write(msgspec.json.encode(row) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MemoryTracker:
    """Keeps rows in a list: for tests and notebooks."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep one row."""
        self.rows.append({"step": float(step), **metrics})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`; a last line cut short by a crash is left out, any other damage is an error."""
    rows: list[dict[str, float]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: not a line of metrics: {error}") from error
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows
