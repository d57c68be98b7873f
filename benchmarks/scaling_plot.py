"""A line chart as an SVG file of its own, drawn from the charts of the project's reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from posttrain.evaluate.line_chart import Curve, LineChart, draw_curve

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#475569")
LEGEND = 18.0  # height of the line of names under the axis

Point = tuple[float, float]


def write_chart(path: Path, title: str, series: Mapping[str, Sequence[Point]], *, x: str, y: str) -> Path:
    """Draw series of (x, y) into a file.

    Raises:
        ValueError: there is no finite value.
    """
    curve = Curve(title=title, series={name: tuple(sorted(points)) for name, points in series.items()})
    chart = draw_curve(curve)
    if chart is None:
        raise ValueError(f"{title}: nothing to draw")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_svg(chart, series, x, y), encoding="utf-8")
    return path


def _svg(chart: LineChart, series: Mapping[str, Sequence[Point]], x: str, y: str) -> str:
    height = chart.height + 2 * LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {height}" '
        f'width="{1.5 * chart.width}" font-family="system-ui, sans-serif" font-size="10" fill="#334155">',
        f'<rect width="{chart.width}" height="{height}" fill="white"/>',
        f'<text x="{chart.left}" y="14" font-size="12" font-weight="600">{escape(chart.title)}</text>',
    ]
    for tick in chart.y_ticks:
        line = f'x1="{chart.left}" x2="{chart.right}" y1="{tick.at:.1f}" y2="{tick.at:.1f}"'
        parts.append(f'<line {line} stroke="#e2e8f0"/>')
        parts.append(f'<text x="{chart.left - 4}" y="{tick.at + 3:.1f}" text-anchor="end">{escape(tick.label)}</text>')
    for tick in chart.x_ticks:
        parts.append(
            f'<text x="{tick.at:.1f}" y="{chart.bottom + 13}" text-anchor="middle">{escape(tick.label)}</text>'
        )
    for line in chart.lines:
        color = COLORS[line.color % len(COLORS)]
        parts.append(f'<path d="{line.raw}" fill="none" stroke="{color}" stroke-width="2"/>')
    for hover in chart.hovers:
        for dot in hover.dots:
            color = COLORS[dot.color % len(COLORS)]
            label = f"<title>{escape(hover.text)}</title>"
            parts.append(f'<circle cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="3" fill="{color}">{label}</circle>')
    parts.append(f'<text x="{chart.right}" y="{chart.bottom + 26}" text-anchor="end">{escape(x)}</text>')
    parts.append(f'<text x="{chart.right}" y="14" text-anchor="end">{escape(y)}</text>')
    at = chart.left
    for line in chart.lines if len(series) > 1 else ():
        color, name = COLORS[line.color % len(COLORS)], escape(line.name)
        parts.append(f'<rect x="{at}" y="{height - 14}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{at + 14}" y="{height - 5}">{name}</text>')
        at += 26 + 6 * len(line.name)
    return "\n".join([*parts, "</svg>"]) + "\n"
