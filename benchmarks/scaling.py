"""How the parts scale: rates against batch, length, siblings, vocabulary and parameters; the scheduler with its queue;
registry and interaction log with their rows; a data mixture's memory with its file.

    python benchmarks/scaling.py                                  # all, about half an hour on two quiet cores
    python benchmarks/scaling.py --only batch queue               # some
    python benchmarks/scaling.py --rows 10000 --gigabytes 0.1     # smaller stores and file

Each writes a chart into benchmarks/results/scaling and its numbers into scaling.json there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import scaling_compute as compute
import scaling_storage as storage
from scaling_plot import Point, write_chart

from posttrain.models import num_parameters

Series = dict[str, list[Point]]
Chart = tuple[str, Series, str, str]  # title, series, names of the axes
WIDTHS = ((128, 2), (256, 4), (384, 8), (512, 12))  # width and layers of the models of rising size


def main() -> None:
    """Parse, measure, write."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scaling.json"
    numbers = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in args.only or BENCHMARKS:
        started_s = time.perf_counter()
        for chart, (title, series, x, y) in BENCHMARKS[name](args).items():
            write_chart(args.out / f"{chart}.svg", title, series, x=x, y=y)
            numbers[chart] = {"title": title, "x": x, "y": y, "series": series, "load": os.getloadavg()[0]}
            for label, points in series.items():
                shown = ", ".join(f"{at:g}: {value:,.4g}" for at, value in points)
                print(f"{title} [{label}; {x} → {y}]: {shown}", flush=True)
        file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)


def batch(args: argparse.Namespace) -> dict[str, Chart]:
    """Tokens per second against rows."""
    model = compute.make_model()
    points = [(rows, compute.sampling_rate(model, prompts=rows, reps=args.reps)) for rows in _upto(args, 1, 8, 64, 256)]
    return {"sampling_batch": ("Sampling against rows", {"sampling": points}, "rows", "tokens/s")}


def length(args: argparse.Namespace) -> dict[str, Chart]:
    """Tokens per second against the length of prompts, and of training rows."""
    model = compute.make_model()
    sizes = _upto(args, 64, 256, 1024, 2048)
    sampled = [
        (size, compute.sampling_rate(model, prompts=16, prompt_tokens=size, new_tokens=32, reps=args.reps))
        for size in sizes
    ]
    trained = [
        (size, compute.training_rate(model, rows=max(1, 4096 // size), length=size, reps=args.reps)) for size in sizes
    ]
    return {
        "sampling_length": ("Sampling 16 rows against prompt length", {"sampling": sampled}, "prompt", "tokens/s"),
        "training_length": ("Training on 4,096 tokens against row length", {"training": trained}, "row", "tokens/s"),
    }


def siblings(args: argparse.Namespace) -> dict[str, Chart]:
    """Tokens per second of 64 rows against how many of them share a prompt."""
    model = compute.make_model()
    points = [
        (
            count,
            compute.sampling_rate(
                model, prompts=64 // count, siblings=count, prompt_tokens=256, new_tokens=32, reps=args.reps
            ),
        )
        for count in _upto(args, 1, 4, 16, 64)
    ]
    title = "64 rows, prompts of 256 tokens, against siblings"
    return {"sampling_siblings": (title, {"sampling": points}, "siblings", "tokens/s")}


def vocabulary(args: argparse.Namespace) -> dict[str, Chart]:
    """Tokens per second against the vocabulary."""
    sampled, trained = [], []
    for size in _upto(args, 1024, 8192, 32_768, 151_936):
        model = compute.make_model(vocab_size=size)
        sampled.append((size, compute.sampling_rate(model, prompts=64, new_tokens=16, reps=args.reps)))
        trained.append((size, compute.training_rate(model, rows=8, length=256, reps=args.reps)))
    series = {"sampling, 64 rows": sampled, "training": trained}
    return {"vocabulary": ("Rates against vocabulary", series, "ids", "tokens/s")}


def parameters(args: argparse.Namespace) -> dict[str, Chart]:
    """Tokens per second against parameters."""
    sampled, trained = [], []
    for width, layers in WIDTHS[:2] if args.short else WIDTHS:
        model = compute.make_model(width=width, num_layers=layers, num_heads=width // 32, mlp_width=width * 11 // 4)
        size = num_parameters(model) / 1e6
        sampled.append((size, compute.sampling_rate(model, prompts=64, new_tokens=32, reps=args.reps)))
        trained.append((size, compute.training_rate(model, rows=8, length=256, reps=args.reps)))
    series = {"sampling, 64 rows": sampled, "training": trained}
    return {"parameters": ("Rates against parameters", series, "millions of parameters", "tokens/s")}


def queue(args: argparse.Namespace) -> dict[str, Chart]:
    """The scheduler's work per step against the requests that wait."""
    points = compute.scheduler_overhead([0, 100, 1000], args.reps)
    return {"scheduler": ("A step of 64 rows of no model to speak of", {"step": points}, "waiting", "µs")}


def log(args: argparse.Namespace) -> dict[str, Chart]:
    """The interaction log against its rows."""
    with tempfile.TemporaryDirectory(dir=args.tmp) as name:
        rates, latencies = storage.interaction_log(Path(name), _decades(args.rows))
    return {
        "log_rate": ("Interactions stored", rates, "rows held", "rows/s"),
        "log_latency": ("Questions to the interaction log", latencies, "rows held", "ms"),
    }


def registry(args: argparse.Namespace) -> dict[str, Chart]:
    """The registry against its artifacts."""
    with tempfile.TemporaryDirectory(dir=args.tmp) as name:
        latencies = storage.registry(Path(name), _decades(args.rows))
    return {"registry_latency": ("Questions to the registry", latencies, "artifacts held", "ms")}


def mixture(args: argparse.Namespace) -> dict[str, Chart]:
    """Memory of a mixture over a file against its size."""
    whole = int(args.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=args.tmp) as name:
        points = storage.mixture_memory(Path(name), [whole // 100, whole // 10, whole])
    return {"mixture_memory": ("Memory of a mixture over one file", {"peak": points}, "MB of file", "MB")}


BENCHMARKS: dict[str, Callable[[argparse.Namespace], dict[str, Chart]]] = {
    "batch": batch,
    "length": length,
    "siblings": siblings,
    "vocabulary": vocabulary,
    "parameters": parameters,
    "queue": queue,
    "log": log,
    "registry": registry,
    "mixture": mixture,
}


def _upto(args: argparse.Namespace, *sizes: int) -> Sequence[int]:
    """All sizes, or the first two where only the harness is tried."""
    return sizes[:2] if args.short else sizes


def _decades(rows: int) -> list[int]:
    return [size for size in (1_000, 10_000, 100_000, 1_000_000, 10_000_000) if size < rows] + [rows]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How the parts scale.")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=[])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the registry and the interaction log")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the mixture's file; 10 where there is room")
    parser.add_argument("--short", action="store_true", help="the first two sizes of each")
    parser.add_argument("--tmp", type=Path, help="where stores and file are made")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "scaling")
    return parser.parse_args()


if __name__ == "__main__":
    main()
