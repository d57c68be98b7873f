"""Tables and JSON on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from posttrain.core import Interval


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table on standard output: drawn on a terminal, tab-separated in a pipe."""
    if not sys.stdout.isatty():
        if title:
            print(title)
        for row in (columns, *rows):
            print("\t".join(" ".join(str(cell).split()) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: model output may look like markup
    Console().print(table)


def print_json(value: Any) -> None:
    """Records, paths and plain values as indented JSON on standard output."""
    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2)
    print(text.decode())


def show_interval(interval: Interval, percent: bool = True) -> str:
    """`61.2 % [57.3, 65.0]`."""
    scale, unit = (100.0, " %") if percent else (1.0, "")
    return f"{interval.value * scale:.1f}{unit} [{interval.low * scale:.1f}, {interval.high * scale:.1f}]"


def shortened(text: str, limit: int = 60) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def show_duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_time(seconds: float) -> str:
    """Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""
