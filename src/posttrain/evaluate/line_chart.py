"""Line charts as geometry: everything is computed here, the page only draws it.

Lengths are in the SVG's own units; the page scales them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from posttrain.core import Record

WIDTH, HEIGHT = 480.0, 232.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 26.0, 30.0
MAX_POINTS = 240  # more are averaged in buckets: a screen shows no more
MAX_HOVERS = 80  # places of a chart that say their value when pointed at

Point = tuple[float, float]


class Curve(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One chart: a few series over the same steps."""

    title: str
    series: dict[str, tuple[Point, ...]]  # name → (step, value), by rising step
    note: str = ""


class Tick(Record, frozen=True, kw_only=True):
    """A place on an axis."""

    at: float
    label: str


class Dot(Record, frozen=True, kw_only=True):
    """A value of one series, for hovering."""

    x: float
    y: float
    color: int


class Hover(Record, frozen=True, kw_only=True):
    """A vertical band of the chart and what it says when pointed at."""

    left: float
    width: float
    x: float
    dots: tuple[Dot, ...]
    text: str


class Line(Record, frozen=True, kw_only=True):
    """A series as drawn: the values as they are, and smoothed."""

    name: str
    color: int  # which of the page's series colours
    raw: str  # SVG path
    smooth: str
    last: str  # newest value (smoothed), as text


class LineChart(Record, frozen=True, kw_only=True):
    """A chart ready to draw."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    hovers: tuple[Hover, ...]
    smoothed: bool
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def draw_curve(curve: Curve) -> LineChart | None:
    """Lay a curve out; None where it has no finite value."""
    series = {name: _bucketed(_finite(points)) for name, points in curve.series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    y_marks, y_step = nice_ticks(*_padded(min(ys), max(ys)))
    x_marks, x_step = nice_ticks(x_low, x_high, 6)

    def place(x: float, y: float) -> Point:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_marks[0]) / (y_marks[-1] - y_marks[0]) * (HEIGHT - TOP - BOTTOM),
        )

    placed = {name: [place(*point) for point in points] for name, points in series.items()}
    lines, smoothed = [], False
    for color, (name, points) in enumerate(series.items()):
        smooth = smooth_values([y for _, y in points])
        smoothed = smoothed or smooth != [y for _, y in points]
        lines.append(
            Line(
                name=name,
                color=color,
                raw=_path(placed[name]),
                smooth=_path([place(x, y) for (x, _), y in zip(points, smooth, strict=True)]),
                last=format_number(smooth[-1]),
            )
        )
    return LineChart(
        title=curve.title,
        note=curve.note,
        lines=tuple(lines),
        x_ticks=tuple(
            Tick(at=place(x, y_marks[0])[0], label=format_tick(x, x_step)) for x in x_marks if x_low <= x <= x_high
        ),
        y_ticks=tuple(Tick(at=place(x_low, y)[1], label=format_tick(y, y_step)) for y in y_marks),
        hovers=_hovers(series, placed),
        smoothed=smoothed,
    )


def curves_from_metrics(rows: Sequence[Mapping[str, float]], charts: Mapping[str, Sequence[str]]) -> tuple[Curve, ...]:
    """Curves from the rows of a `metrics.jsonl`.

    Args:
        rows: each with a "step".
        charts: title → names of the metrics that share the chart; names that never occur are left out.
    """
    curves = []
    for title, names in charts.items():
        series = {name: points for name in names if (points := _points(rows, name))}
        if series:
            curves.append(Curve(title=title, series=series))
    return tuple(curves)


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[list[float], float]:
    """Round marks that cover [low, high], about `count` of them, and the step between them."""
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)], step


def smooth_values(values: Sequence[float]) -> list[float]:
    """A centred moving average over about a fifteenth of the values; short series stay as they are."""
    half = len(values) // 30
    if half == 0:
        return list(values)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smooth = []
    for index in range(len(values)):
        first, last = max(0, index - half), min(len(values), index + half + 1)
        smooth.append((sums[last] - sums[first]) / (last - first))
    return smooth


def format_number(value: float) -> str:
    """A number for people: three or four digits that matter."""
    size = abs(value)
    if not math.isfinite(value):
        return "–"
    if size >= 1e6:
        text = f"{value / 1e6:.3g} M"
    elif size >= 1e4:
        text = f"{value / 1e3:.3g} k"
    elif value == round(value):
        text = f"{value:.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    elif size >= 1e-3:
        text = f"{value:.3g}"
    else:
        digits, _, power = f"{value:.2g}".partition("e")
        text = f"{digits}e{int(power)}" if power else digits
    return text.replace("-", "−")


def format_tick(value: float, step: float) -> str:
    """A mark of an axis: as many decimals as the step has."""
    if value == 0:
        return "0"
    if max(abs(value), step) >= 1e4 or step < 1e-4:
        return format_number(value)
    shown = f"{step:.10f}".rstrip("0")
    return f"{value:.{len(shown.partition('.')[2])}f}".replace("-", "−")


def _points(rows: Sequence[Mapping[str, float]], name: str) -> tuple[Point, ...]:
    by_step = {row["step"]: row[name] for row in rows if name in row and "step" in row}
    return _finite(tuple(sorted(by_step.items())))


def _finite(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))


def _bucketed(points: tuple[Point, ...]) -> tuple[Point, ...]:
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple((bucket[-1][0], sum(y for _, y in bucket) / len(bucket)) for bucket in buckets)


def _padded(low: float, high: float) -> tuple[float, float]:
    if low == high:
        reach = abs(low) * 0.5 or 0.5
        return low - (0 if 0 <= low <= reach else reach), high + reach
    if 0 < low < 0.4 * high:
        return 0.0, high  # a chart of a positive quantity that falls or grows a lot starts at nought
    return low, high


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _hovers(series: Mapping[str, Sequence[Point]], placed: Mapping[str, Sequence[Point]]) -> tuple[Hover, ...]:
    at_step: dict[float, list[tuple[Dot, str]]] = {}
    for color, (name, points) in enumerate(series.items()):
        for (step, value), (x, y) in zip(points, placed[name], strict=True):
            label = format_number(value) if len(series) == 1 else f"{name} {format_number(value)}"
            at_step.setdefault(step, []).append((Dot(x=x, y=y, color=color), label))
    steps = sorted(at_step)
    stride = math.ceil(len(steps) / MAX_HOVERS)
    steps = steps[(len(steps) - 1) % stride :: stride]  # the last step is always among them
    xs = [at_step[step][0][0].x for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(xs)), WIDTH - RIGHT]
    return tuple(
        Hover(
            left=edges[index],
            width=edges[index + 1] - edges[index],
            x=xs[index],
            dots=tuple(dot for dot, _ in at_step[step]),
            text=f"step {format_number(step)}: " + ", ".join(label for _, label in at_step[step]),
        )
        for index, step in enumerate(steps)
    )
