"""`posttrain data`: look at a file of rows, and whether training data holds evaluation data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from posttrain.cli.printing import print_json, print_table, shortened
from posttrain.core import UsageError

KINDS = ("text", "prompt", "completion", "preference", "unpaired", "steps")
NUM_EXAMPLES = 2
MAX_BAD_SHOWN = 10
MAX_MATCHES_SHOWN = 5


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    group = commands.add_parser("data", help="look at data: formats, bad rows, contamination")
    group.set_defaults(parser=group)
    parts = group.add_subparsers(metavar="COMMAND", title="commands")
    inspect_parser = parts.add_parser("inspect", help="the format found, counts, bad rows with their cause, examples")
    inspect_parser.add_argument("file", type=Path, help="file, folder, or saved data set")
    inspect_parser.add_argument("--columns", help="which columns to read, as prompt=question,completion=answer")
    inspect_parser.add_argument("--kind", choices=KINDS, help="what to make of the rows (default: what they look like)")
    inspect_parser.add_argument("--split", help="which split, where there are several")
    inspect_parser.add_argument("--limit", type=int, help="read so many rows at most")
    inspect_parser.add_argument("--json", action="store_true", help="print JSON")
    inspect_parser.set_defaults(action=inspect_rows)
    check = parts.add_parser("contamination", help="whether training data holds evaluation data")
    check.add_argument("train", type=Path, help="training data")
    check.add_argument("evaluation", type=Path, nargs="+", help="evaluation data: one or more files")
    check.add_argument("--columns", help="of the training data: which columns to read")
    check.add_argument("--evaluation-columns", help="of the evaluation data")
    check.add_argument("--ngram", type=int, default=8, help="words of an n-gram (default: 8)")
    check.add_argument("--threshold", type=float, default=0.5, help="share of a question's words (default: 0.5)")
    check.add_argument("--out", type=Path, help="write the training rows without a match, as they are (JSONL)")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(action=contamination)


def inspect_rows(chosen: argparse.Namespace) -> int:
    """`posttrain data inspect`: every row is read, none is kept."""
    from posttrain import data

    rows = data.stream(
        chosen.file, kind=chosen.kind, columns=chosen.columns, split=chosen.split, limit=chosen.limit, max_bad=1.0
    )
    examples: list[data.TypedRow] = []
    for row in rows:
        if len(examples) < NUM_EXAMPLES:
            examples.append(row)
    report = rows.report
    if chosen.json:
        print_json({"report": report, "examples": examples})
        return 0
    print(f"files: {', '.join(report.files)}")
    print(f"format: {', '.join(report.formats) or 'none found'}; read as: {report.kind or '?'}")
    print(report.summary())
    if report.bad:
        shown = report.bad[:MAX_BAD_SHOWN]
        print_table(
            ("file", "line", "field", "reason", "row"),
            [(bad.file, bad.line, bad.field, bad.reason, shortened(bad.raw, 50)) for bad in shown],
        )
        if report.num_bad > len(shown):
            print(f"… and {report.num_bad - len(shown)} more bad rows")
    for number, example in enumerate(examples, 1):
        print(f"\nexample {number}: {example.id}")
        print(_pretty(example))
    return 0


def _pretty(row: Any) -> str:
    """A row as indented JSON with long texts cut."""

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            return value if len(value) <= 400 else value[:400] + f"… ({len(value)} characters)"
        if isinstance(value, list | tuple):
            return [cut(item) for item in value]
        return {key: cut(item) for key, item in value.items()} if isinstance(value, dict) else value

    plain = {key: value for key, value in msgspec.to_builtins(row).items() if key not in ("record", "id")}
    return json.dumps(cut(plain), ensure_ascii=False, indent=2)


def contamination(chosen: argparse.Namespace) -> int:
    """`posttrain data contamination`."""
    from posttrain import data

    columns = data.ColumnMap.parse(chosen.columns)
    if chosen.out is not None and "id" in columns.columns:
        raise UsageError("--out finds rows by their lines: leave `id` out of --columns")
    if len({path.name for path in chosen.evaluation}) < len(chosen.evaluation):
        raise UsageError("two evaluation files have the same name; they are told apart by it")
    training = data.load(chosen.train, columns=chosen.columns)
    sets = {
        path.name: data.load(path, kind="prompt", columns=chosen.evaluation_columns).rows for path in chosen.evaluation
    }
    report = data.check_contamination(training.rows, sets, ngram=chosen.ngram, threshold=chosen.threshold)
    kept = None if chosen.out is None else _write_clean(chosen.train, chosen.out, report.dropped)
    if chosen.json:
        print_json(report)
        return 0
    print(report.summary())
    print_table(
        ("training row", "evaluation row", "how", "coverage"),
        [
            (match.train_id, f"{match.evaluation_set}: {match.evaluation_id}", match.kind, f"{match.coverage:.0%}")
            for match in report.matches[:MAX_MATCHES_SHOWN]
        ],
    )
    if len(report.matches) > MAX_MATCHES_SHOWN:
        print(f"… and {len(report.matches) - MAX_MATCHES_SHOWN} more matches (--json lists all)")
    if kept is not None:
        print(f"{kept} rows without a match in {chosen.out}")
    return 0


def _write_clean(source: Path, out: Path, dropped: Sequence[str]) -> int:
    """Copy the rows that did not match and could be parsed, as they stand in their file; returns how many."""
    from posttrain import data

    if out.resolve() == source.resolve():
        raise UsageError(f"--out {out} is the training data itself; write to another file")
    left_out = set(dropped)  # ids are `<file>:<line>`
    out.parent.mkdir(parents=True, exist_ok=True)
    num_kept = 0
    partial = out.with_name(f".{out.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in data.read_rows(source, on_bad=lambda bad: None):
            if f"{row.file}:{row.line}" not in left_out:
                file.write(row.raw() + "\n")
                num_kept += 1
    partial.replace(out)
    return num_kept
