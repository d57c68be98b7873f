"""What `posttrain runs` says of each run, read from its folder; a damaged file costs its own column, nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from posttrain.core import PosttrainError, Record

if TYPE_CHECKING:
    from posttrain.registry import RunFolder

TAIL_BYTES = 256 * 1024  # of metrics.jsonl: enough for hundreds of steps
LOSSES = ("loss", "eval/nll", "nll")


class RunSummary(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the list."""

    id: str
    recipe: str = "?"
    status: str = "damaged"
    started: float | None = None  # Unix time
    seconds: float | None = None
    step: int | None = None
    reward: float | None = None  # the last that was logged
    loss: float | None = None
    accuracy: float | None = None  # on held-out tasks, or of the evaluation's report
    damage: str = ""


def summaries(root: Path) -> list[RunSummary]:
    """All runs under a folder, newest last."""
    from posttrain.registry import list_runs

    found = [summary_of(run) for run in list_runs(root)]
    return sorted(found, key=lambda run: (run.started is not None, run.started or 0.0, run.id))


def summary_of(run: RunFolder) -> RunSummary:
    """One run."""
    metrics = last_metrics(run.path / "metrics.jsonl")
    accuracy = metrics.get("eval/accuracy")
    numbers: dict[str, Any] = {
        "step": int(metrics["step"]) if "step" in metrics else None,
        "reward": metrics.get("reward"),
        "loss": next((metrics[name] for name in LOSSES if name in metrics), None),
        "accuracy": _reported_accuracy(run.path / "report.json") if accuracy is None else accuracy,
    }
    try:
        state = run.state
    except (PosttrainError, OSError) as error:
        return RunSummary(id=run.id, damage=str(error), **numbers)
    return RunSummary(
        id=run.id,
        recipe=state.recipe,
        status=state.status,
        started=state.started,
        # Of an interrupted run nobody wrote the end: its last sign of life is the newest file.
        seconds=state.seconds() if state.ended or state.status == "running" else _last_sign(run) - state.started,
        **numbers,
    )


def _last_sign(run: RunFolder) -> float:
    return max(path.stat().st_mtime for path in run.path.iterdir())


def last_metrics(path: Path) -> dict[str, float]:
    """The newest finite value of each metric near the end of a metrics.jsonl; damaged lines are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        found |= {name: value for name, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
    return found


def _reported_accuracy(path: Path) -> float | None:
    try:
        value = msgspec.json.decode(path.read_bytes())["metrics"]["accuracy"]["value"]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None
