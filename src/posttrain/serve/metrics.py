"""Counters, gauges and histograms in Prometheus' text format. Names carry vLLM's suffixes, so that dashboards fit."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class ServeMetrics:
    """What a server counts. Safe to share between threads.

    Args:
        prefix: put before every name, with a colon.
    """

    _HELP = {
        "request_success_total": ("counter", "Choices that ended, by reason."),
        "http_responses_total": ("counter", "Answers, by path and status."),
        "prompt_tokens_total": ("counter", "Prompt tokens processed."),
        "generation_tokens_total": ("counter", "Tokens sampled."),
        "requests_rejected_total": ("counter", "Generation requests refused, by reason."),
        "requests_cancelled_total": ("counter", "Requests withdrawn by the client."),
        "interactions_logged_total": ("counter", "Interactions written to the store."),
        "interactions_lost_total": ("counter", "Interactions that could not be written."),
        "feedback_total": ("counter", "Signals stored, by kind."),
        "time_to_first_token_seconds": ("histogram", "From request to first token."),
        "inter_token_latency_seconds": ("histogram", "Between tokens of one choice."),
        "e2e_request_latency_seconds": ("histogram", "From request to the choice's end."),
    }

    def __init__(self, prefix: str = "posttrain") -> None:
        self.prefix = prefix
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, list[float]]] = {}  # counts per bucket, then the sum

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            series = self._counters.setdefault(name, {})
            series[key] = series.get(key, 0.0) + value

    def observe(self, name: str, seconds: float, times: int = 1, **labels: str) -> None:
        """Add to a histogram, `times` equal observations."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            buckets = self._histograms.setdefault(name, {}).setdefault(key, [0.0] * (len(SECONDS) + 2))
            buckets[bisect_left(SECONDS, seconds)] += times
            buckets[-1] += seconds * times

    def value(self, name: str, **labels: str) -> float:
        """A counter's value, 0 if it never counted."""
        with self._lock:
            return self._counters.get(name, {}).get(tuple(sorted(labels.items())), 0.0)

    def text(self, gauges: Mapping[str, Mapping[Labels, float]]) -> str:
        """The page. `gauges` are read by the caller when the page is asked for."""
        lines: list[str] = []
        with self._lock:
            for name, counters in sorted(self._counters.items()):
                self._head(lines, name)
                lines += [self._line(name, key, value) for key, value in sorted(counters.items())]
            for name, histogram in sorted(self._histograms.items()):
                self._head(lines, name)
                for key, buckets in sorted(histogram.items()):
                    lines += self._buckets(name, key, buckets)
        for name, series in sorted(gauges.items()):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# TYPE {self.prefix}:{name} {kind}")
            lines += [self._line(name, key, value) for key, value in sorted(series.items())]
        return "\n".join(lines) + "\n"

    def _head(self, lines: list[str], name: str) -> None:
        kind, text = self._HELP[name]
        lines += [f"# HELP {self.prefix}:{name} {text}", f"# TYPE {self.prefix}:{name} {kind}"]

    def _buckets(self, name: str, key: Labels, buckets: Sequence[float]) -> list[str]:
        total, lines = 0.0, []
        for bound, number in zip([*map(str, SECONDS), "+Inf"], buckets, strict=False):
            total += number
            lines.append(self._line(f"{name}_bucket", (*key, ("le", bound)), total))
        return [
            *lines,
            self._line(f"{name}_sum", key, buckets[-1]),
            self._line(f"{name}_count", key, total),
        ]

    def _line(self, name: str, labels: Labels, value: float) -> str:
        inner = ",".join(f'{label}="{_escape(text)}"' for label, text in labels)
        shown = str(int(value)) if value == int(value) else repr(value)
        return f"{self.prefix}:{name}{{{inner}}} {shown}" if inner else f"{self.prefix}:{name} {shown}"


# Engine figures that have a name in vLLM's metrics.
ENGINE_GAUGES = {
    "num_running": "num_requests_running",
    "num_waiting": "num_requests_waiting",
    "kv_usage": "kv_cache_usage_perc",
    "prefix_hits": "prefix_cache_hits_total",
    "weight_version": "weight_version",
}


def engine_gauges(stats: Mapping[str, Any]) -> dict[str, float]:
    """The engine's figures under vLLM's names; figures without such a name are left out."""
    return {
        ENGINE_GAUGES[name]: float(value)
        for name, value in stats.items()
        if name in ENGINE_GAUGES and isinstance(value, int | float)
    }


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
