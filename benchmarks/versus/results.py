"""From repetitions to a table: medians of paired ratios with their range, shares of peak, and whether the bars hold."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from versus.catalogue import Workload


@dataclass(frozen=True, kw_only=True)
class Result:
    """One workload's measurements."""

    workload: Workload
    ours: list[dict[str, float]]  # one per repetition: seconds, cpu_s, work, peak_rss
    theirs: list[dict[str, float]]
    peak: dict[str, float]  # operations per second of the best product, by dtype
    flops: float | None  # useful operations of one run, where they are counted
    settings: dict[str, dict[str, Any]]  # by side
    tried: list[dict[str, Any]] = field(default_factory=list)  # by the peers' side
    load: float = 0.0  # other processes' share of the processors while measuring, 0 … 1

    @property
    def ratios(self) -> list[float]:
        """Of each pair: how many times ours is better; of memory, ours over theirs."""
        if self.workload.measure == "memory":
            return [ours["peak_rss"] / theirs["peak_rss"] for ours, theirs in self._pairs]
        return [theirs["seconds"] / ours["seconds"] for ours, theirs in self._pairs]

    @property
    def cpu_ratios(self) -> list[float]:
        """The same of processor time, on which other processes weigh less."""
        return [theirs["cpu_s"] / ours["cpu_s"] for ours, theirs in self._pairs if ours["cpu_s"] > 0]

    @property
    def _pairs(self) -> list[tuple[dict[str, float], dict[str, float]]]:
        return list(zip(self.ours, self.theirs, strict=True))

    def share(self, side: Sequence[Mapping[str, float]], dtype: str = "bf16") -> float | None:
        """Useful operations per second over the machine's peak."""
        if self.flops is None or not side:
            return None
        return self.flops / statistics.median(one["seconds"] for one in side) / self.peak[dtype]

    @property
    def value(self) -> float | None:
        """What the bar speaks of."""
        if self.workload.measure == "share":
            return self.share(self.ours)
        return statistics.median(self.ratios) if self.ratios else None

    def rate(self, side: Sequence[Mapping[str, float]]) -> float | None:
        """Units per second, the median."""
        return statistics.median(one["work"] / one["seconds"] for one in side) if side else None

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            **asdict(self),
            "ratios": self.ratios,
            "cpu_ratios": self.cpu_ratios,
            "value": self.value,
            "holds": None if self.value is None else self.workload.holds(self.value),
            "share_ours": self.share(self.ours),
            "share_theirs": self.share(self.theirs),
        }


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Seconds that a command takes, with the most it may."""

    name: str
    seconds: list[float]
    bar: float
    aim: float

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**asdict(self), "value": self.value, "holds": self.value <= self.bar}


HEADER = (
    "| workload | ours | theirs | ratio (range) | on CPU time | ours of bf16 peak | theirs | bar | aim | holds |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
)


def markdown(
    results: Sequence[Result], start_ups: Sequence[StartUp], failures: Mapping[str, str], facts: Mapping[str, Any]
) -> str:
    """The table with a line for each workload, the settings that the peers were best with, and what failed."""
    lines = [f"# Ours against the peers, {facts['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "date"]
    lines += ["", *HEADER, *map(_line, results), *map(_start_up_line, start_ups), ""]
    lines += ["Peers' best settings:", ""]
    lines += [f"- {result.workload.name}: {_setting(result.settings['theirs'])}" for result in results]
    if failures:
        lines += ["", "Not measured:", ""] + [f"- {name}: {why}" for name, why in failures.items()]
    return "\n".join(lines) + "\n"


def _line(result: Result) -> str:
    workload = result.workload
    if workload.measure == "memory":
        both = [
            f"{statistics.median(one['peak_rss'] for one in side) / 1e9:.2f} GB"
            for side in (result.ours, result.theirs)
        ]
    else:
        both = [_rate(result.rate(side), workload.unit) for side in (result.ours, result.theirs)]
    ratios, cpu = result.ratios, result.cpu_ratios
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"
    on_cpu = f"{statistics.median(cpu):.2f}" if cpu else "–"
    shares = [_percent(result.share(side)) for side in (result.ours, result.theirs)]
    how = "{:.0%}" if workload.measure == "share" else "{:g}"
    sign = "≤ " if workload.lower_is_better else "≥ "
    bounds = ["–" if bound is None else sign + how.format(bound) for bound in (workload.bar, workload.aim)]
    value = result.value
    cells = [
        workload.name,
        *both,
        spread,
        on_cpu,
        *shares,
        *bounds,
        _holds(None if value is None else workload.holds(value)),
    ]
    return "| " + " | ".join(cells) + " |"


def _start_up_line(start: StartUp) -> str:
    spread = f"{start.value:.2f} s ({min(start.seconds):.2f}–{max(start.seconds):.2f})"
    cells = [f"`{start.name}`", spread, *["–"] * 5, f"≤ {start.bar:g} s", f"≤ {start.aim:g} s"]
    return "| " + " | ".join([*cells, _holds(start.value <= start.bar)]) + " |"


def _rate(rate: float | None, unit: str) -> str:
    if rate is None:
        return "–"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _holds(holds: bool | None) -> str:
    return {None: "–", True: "yes", False: "**no**"}[holds]


def _setting(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())
