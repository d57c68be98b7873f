"""What the flywheel tells at the end: a table on the terminal and a page to keep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.core import JsonlTracker, read_metrics
from posttrain.evaluate import Stage, build_run_report, compare, report_html
from posttrain.recipes.workbench import Workbench


def print_stages(stages: Sequence[Stage]) -> None:
    """Stage, accuracy with interval, tokens, seconds."""
    table = Table("stage", "accuracy", "95 % interval", "tokens", "seconds", title="held-out execution accuracy")
    for stage in stages:
        score = stage.report.metrics["accuracy"]
        cells = (
            stage.name,
            f"{score.value:.1%}",
            f"[{score.low:.1%}, {score.high:.1%}]",
            f"{stage.tokens or 0:,}",
            f"{stage.seconds or 0:.0f}",
        )
        table.add_row(*map(Text, cells))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100).print(table)


def write_report(bench: Workbench, project: str, stages: Sequence[Stage]) -> Path:
    """The page of the whole turn: every stage's curves, its answers side by side, lineage and promotions."""
    metrics = bench.run.path / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    tracker = JsonlTracker(metrics)
    for stage in stages:
        own = bench.run.path.with_name(f"{bench.run.id}-{stage.name}") / "metrics.jsonl"
        for row in read_metrics(own):
            values = {f"{stage.name}/{name}": value for name, value in row.items() if name != "step"}
            tracker.log(values, step=int(row["step"]))
    tracker.close()
    champion = bench.registry.champion(project)
    report = build_run_report(
        bench.run,
        title="Text-to-SQL from nothing, once round the flywheel",
        subtitle="Base model, SFT on few pairs, GRPO on execution, promotion, serving, and a second turn on feedback.",
        stages=stages,
        comparisons=[compare(later.report, earlier.report) for earlier, later in pairwise(stages)],
        registry=bench.registry,
        model=None if champion is None else champion.id,
        project=project,
    )
    report_html(report, bench.run.report)
    return bench.run.report
