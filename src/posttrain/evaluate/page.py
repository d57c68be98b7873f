"""The page of a run: one HTML file that needs nothing else, not even a network.

Everything that comes from outside (model output above all) is escaped by the template, control characters are made
visible, and a content security policy lets the browser run only the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from posttrain.core import EvalReport, Interval
from posttrain.evaluate.line_chart import draw_curve, format_number
from posttrain.evaluate.lineage_drawing import draw_lineage
from posttrain.evaluate.run_report import MAX_TEXT, RunReport, Stage
from posttrain.registry import code_version

# C0 and C1 controls but tab and line feed, and the characters that reorder or hide text.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def report_html(report: RunReport, path: Path | None = None) -> str:
    """Draw a run's page.

    Args:
        path: where to write it too.

    Returns:
        A whole HTML document.
    """
    text: str = _template().render(
        report=report,
        stages=_stage_rows(report.stages),
        tags=_tag_rows(report.stages),
        charts=[chart for chart in map(draw_curve, report.curves) if chart is not None],
        other_charts=[chart for chart in map(draw_curve, report.other_curves) if chart is not None],
        drawing=None if report.lineage is None else draw_lineage(report.lineage),
        verdicts=_verdict_counts(report),
        version=code_version(),
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        script_hash=base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode(),
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return text


def report_json(report: EvalReport | RunReport, path: Path) -> None:
    """Write a report as JSON; `EvalReport.from_json` (or `RunReport.from_json`) reads it back.

    A number that is NaN or infinite becomes null, which JSON has and the reader refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(report.to_json() + b"\n")


@cache
def _template() -> Any:
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        clean=visible, pct=_percent, points=_points, when=_when, number=format_number, p=_p_value, span=_seconds
    )
    return environment.get_template("page.html")


@cache
def _asset(name: str) -> str:
    return resources.files("posttrain.evaluate").joinpath(name).read_text(encoding="utf-8")


def visible(text: str, limit: int = MAX_TEXT) -> str:
    """Text as it can be shown: unseen characters as ⟨code⟩, and cut where it is too long."""
    shown = _UNSEEN.sub(lambda match: f"⟨{ord(match.group()):04x}⟩", text[:limit])
    return shown if len(text) <= limit else f"{shown}\n… {len(text) - limit} more characters"


def _stage_rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    scores = [stage.report.metrics["accuracy"] for stage in stages]
    low, high = _plot_range(scores)
    return [
        {
            "name": stage.name,
            "note": stage.note,
            "accuracy": score,
            "plot": _plot(score, low, high),
            "tokens": stage.tokens,
            "seconds": stage.seconds,
            "length": stage.report.metrics.get("completions/mean_length"),
            "tasks": len({sample.task.id for sample in stage.report.samples}),
            "suite": stage.report.suite,
            "more": {
                name: interval
                for name, interval in stage.report.metrics.items()
                if name.startswith(("pass@", "mean@", "score"))
            },
            "failed": stage.report.num_failed,
        }
        for stage, score in zip(stages, scores, strict=True)
    ]


def _tag_rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    tags = sorted({name for stage in stages for name in stage.report.metrics if name.startswith("accuracy/")})
    return [
        {"tag": tag.removeprefix("accuracy/"), "scores": [stage.report.metrics.get(tag) for stage in stages]}
        for tag in tags
    ]


def _plot_range(scores: Sequence[Interval]) -> tuple[float, float]:
    """The whole range from 0 to 1, or what the intervals need where scores lie outside it."""
    return min([0.0, *(score.low for score in scores)]), max([1.0, *(score.high for score in scores)])


def _plot(score: Interval, low: float, high: float) -> dict[str, float]:
    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    return {
        "left": place(score.low),
        "width": max(0.5, place(score.high) - place(score.low)),
        "dot": place(score.value),
    }


def _verdict_counts(report: RunReport) -> list[tuple[str, str, int]]:
    labels = {
        "right": "Right",
        "wrong": "Wrong",
        "gained": "Newly right",
        "lost": "Newly wrong",
        "failed": "Not graded",
    }
    found = [verdict for task in report.tasks for verdict in task.verdicts()]
    return [(verdict, label, found.count(verdict)) for verdict, label in labels.items() if verdict in found]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _p_value(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.4f}" if value < 0.01 else f"p = {value:.2f}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds else ""


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"
