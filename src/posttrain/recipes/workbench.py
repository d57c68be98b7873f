"""Where a recipe works: its run folder, the registry beside it, progress on the terminal, and a clean way to stop."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from posttrain.core import ConfigError, UsageError
from posttrain.registry import Registry, RunFolder

RUNS = Path("runs")


class Workbench:
    """One recipe's run and the registry of its folder of runs.

    `with open_workbench("sft", options, runs=…, resume=…) as bench:` finishes the run as finished, failed or
    interrupted; Ctrl-C and SIGTERM both interrupt, after which the run can be resumed.
    """

    def __init__(self, run: RunFolder, registry: Registry) -> None:
        self.run = run
        self.registry = registry

    def say(self, text: str) -> None:
        """One line for the person at the terminal, and for the run's events."""
        print(text, flush=True)
        self.run.event("note", text=text)

    def progress(self, title: str, total: int, start: int = 0) -> Progress:
        """A progress bar (a line every few seconds where there is no terminal)."""
        return Progress(title, total, start)


@contextmanager
def open_workbench(
    recipe: str, options: Mapping[str, Any], *, runs: Path = RUNS, resume: Path | None = None
) -> Iterator[Workbench]:
    """Create a run, or go on with one.

    Args:
        recipe: its name; a run of another recipe is not resumed.
        options: what is kept as `config.toml`, without `runs` and `resume`.
        runs: folder of runs and of `registry.db`.
        resume: folder of the run to go on with.

    Raises:
        UsageError: the run to resume is of another recipe.
        ConfigError: the options differ from those the run began with.
    """
    kept = {name: value for name, value in options.items() if name not in ("runs", "resume")}
    if resume is None:
        run = RunFolder.create(runs, recipe, kept)
    else:
        run = RunFolder.open(resume)
        try:
            _check_same(run, recipe, kept)
        except UsageError:
            run.finish("interrupted")
            raise
        runs = resume.parent
    _share_heaps()
    with _interrupt_on_sigterm(), Registry(runs / "registry.db") as registry:
        try:
            with run:
                yield Workbench(run, registry)
        except KeyboardInterrupt:
            print(f"\ninterrupted; go on with: posttrain run --resume {run.path}", file=sys.stderr)
            raise


@contextmanager
def open_stage(bench: Workbench, name: str, options: Mapping[str, Any]) -> Iterator[Workbench]:
    """A stage of a longer recipe, as a run of its own beside the recipe's: `<run>-<name>`; gone on with if it exists.

    Raises:
        ConfigError: the stage began with other options.
    """
    path = bench.run.path.with_name(f"{bench.run.id}-{name}")
    if path.exists():
        run = RunFolder.open(path)
        _check_same(run, name, options)
    else:
        run = RunFolder.create(path.parent, name, options, run_id=path.name)
    with run:
        yield Workbench(run, bench.registry)
    bench.registry.add_run(run)


def _check_same(run: RunFolder, recipe: str, options: Mapping[str, Any]) -> None:
    if run.state.recipe != recipe:
        raise UsageError(f"{run.path} is a run of {run.state.recipe!r}, not of {recipe!r}")
    before, now = run.config, {name: _plain(value) for name, value in options.items() if value is not None}
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{run.path} began with {name} = {before.get(name)!r}, now it is {now.get(name)!r}. "
                f"Resume with the same options (`posttrain run --resume {run.path}` takes them from the run)"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _share_heaps() -> None:
    """Let threads share two heaps where the C library is glibc.

    A heap for every thread that samples, grades or trains keeps what it once held: hundreds of megabytes here.
    """
    arena_max = -8  # M_ARENA_MAX of malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(arena_max, 2)


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Progress:
    """A bar with a rate, the time left and the latest metrics."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title, self.total, self.done, self.start = title, total, start, start
        self._begun = self._shown = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=start, metrics="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, metrics: Mapping[str, float], by: int = 1) -> None:
        """One step done; `metrics` are shown beside the bar."""
        self.done += by
        text = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, metrics=text)
            return
        now = time.monotonic()
        if now - self._shown >= 10 or self.done >= self.total:
            rate = (self.done - self.start) / max(now - self._begun, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            print(f"{self.title}: {self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left  {text}", file=sys.stderr)
            self._shown = now
