"""The search for a side's best setting: each is tried once warm, the quickest stays. Standard library alone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Setting = dict[str, Any]


class Best:
    """The quickest of the settings that work. A `Runner`."""

    def __init__(self, setting: Setting, work: Callable[[], Mapping[str, float]], tried: list[Setting]) -> None:
        self.setting = setting
        self.tried = tried
        self._work = work

    def run(self) -> dict[str, float]:
        """Do the work once."""
        return dict(self._work())


def timed(work: Callable[[], float]) -> Callable[[], dict[str, float]]:
    """Seconds and amount of a piece of work that says how much it was."""

    def run() -> dict[str, float]:
        started_s = time.perf_counter()
        amount = work()
        return {"seconds": time.perf_counter() - started_s, "work": amount}

    return run


def find_best(
    settings: Iterable[Setting],
    make: Callable[[Setting], Callable[[], Mapping[str, float]]],
    *,
    known: list[Setting] | None = None,
) -> Best:
    """Make each setting's work, do it twice, and keep the quickest.

    The second time counts, on the wall clock or, with VERSUS_CLOCK=cpu, by processor time. Work that took more than
    1.5 times the best at first is not done again. Without a search (VERSUS_SEARCH=0) the first setting that works is
    taken.

    Raises:
        RuntimeError: no setting works; says why.
    """
    tried: list[Setting] = list(known or [])
    best: tuple[float, Setting] | None = None
    best_work: Callable[[], Mapping[str, float]] | None = None
    search = os.environ.get("VERSUS_SEARCH", "1") == "1"
    for setting in settings:
        try:
            work = make(setting)
            seconds = _seconds(work)
            if search and (best is None or seconds < 1.5 * best[0]):
                seconds = _seconds(work)
        except Exception as error:  # noqa: BLE001  a setting that a peer does not support is a result
            tried.append({**setting, "error": f"{type(error).__name__}: {error}"[:300]})
            continue
        tried.append({**setting, "seconds": round(seconds, 4)})
        loser: object = work
        if best is None or seconds < best[0]:
            loser, best, best_work = best_work, (seconds, setting), work
        if hasattr(loser, "close"):
            loser.close()
        del work, loser
        gc.collect()
        if not search:
            break
    if best is None or best_work is None:
        raise RuntimeError(f"no setting works: {tried}")
    return Best(best[1], best_work, tried)


def _seconds(work: Callable[[], Mapping[str, float]]) -> float:
    cpu_s = time.process_time()
    measured = work()
    return time.process_time() - cpu_s if os.environ.get("VERSUS_CLOCK") == "cpu" else measured["seconds"]
