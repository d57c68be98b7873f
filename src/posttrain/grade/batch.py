"""Grading many trajectories: a deadline on each, failures as data, and a stop when too many fail."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Sequence

from posttrain.core import ConfigError, Grade, GradeError, Grader, Trajectory
from posttrain.grade.combine import TIMED_OUT, UNDER_WAY, checked

ROLLOUT_FAILED = "rollout failed: "
UNGRADED = "ungraded: "  # nobody has graded it yet: no failure of the grader
DEADLINE_S = 10.0
_MAX_ERROR = 500  # characters of an error that are kept


async def grade_all(
    grader: Grader, trajectories: Sequence[Trajectory], *, deadline_s: float | None = None, concurrency: int = 32
) -> list[Grade]:
    """Grade every trajectory; never raises for what a grader does.

    A grader that raises, passes its deadline, or returns something else than a Grade with a finite score gives a grade
    with an error. A trajectory that failed is not graded: its grade says `rollout failed: …`. A grader may limit how
    many grades are under way (`max_concurrency`) and may warm up before the clock starts (`async prepare()`).

    Args:
        grader: the grader. It must not block the event loop: plain functions belong into `Function`.
        trajectories: what to grade.
        deadline_s: seconds that each grade may take, once it has begun; None: the grader's own `deadline_s`, or 10.
        concurrency: grades under way at the same time, at most.

    Returns:
        One grade for each trajectory, in order.
    """
    limits = GradingLimits(grader, deadline_s=deadline_s, concurrency=concurrency)
    return await limits.grade(trajectories)


class GradingLimits:
    """A grader with its deadline and its places, which several batches under way at the same time share.

    Args: as for `grade_all`.
    """

    def __init__(self, grader: Grader, *, deadline_s: float | None = None, concurrency: int = 32) -> None:
        self.grader = grader
        self.deadline_s = float(getattr(grader, "deadline_s", DEADLINE_S)) if deadline_s is None else deadline_s
        if concurrency < 1 or self.deadline_s <= 0:
            raise ConfigError(
                f"grading: concurrency and deadline_s must be above 0, not {concurrency} and {self.deadline_s}"
            )
        limit = getattr(grader, "max_concurrency", None)
        self._places = asyncio.Semaphore(concurrency if limit is None else min(concurrency, limit))

    async def grade(self, trajectories: Sequence[Trajectory]) -> list[Grade]:
        """One grade for each trajectory, in order; see `grade_all`."""
        grader = self.grader
        if hasattr(grader, "prepare") and any(not trajectory.failed() for trajectory in trajectories):
            try:
                await grader.prepare()
            except Exception as error:  # noqa: BLE001  a grader that cannot start fails every grade, as data
                reason = f"could not be prepared: {type(error).__name__}: {error}"
                return self._told(
                    trajectories, [_rollout_failure(grader, t) or _failure(grader, reason) for t in trajectories]
                )
        return self._told(trajectories, await asyncio.gather(*(self._one(trajectory) for trajectory in trajectories)))

    def _told(self, trajectories: Sequence[Trajectory], grades: Sequence[Grade]) -> list[Grade]:
        """Show them to a grader that watches what it gives (`WatchedGrader`)."""
        if hasattr(self.grader, "gave"):
            self.grader.gave(trajectories, grades)
        return list(grades)

    async def _one(self, trajectory: Trajectory) -> Grade:
        failure = _rollout_failure(self.grader, trajectory)
        if failure is not None:
            return failure
        async with self._places:
            return await _grade_one(self.grader, trajectory, self.deadline_s)


def check_failures(grades: Sequence[Grade], max_failed: float = 0.05, *, min_failed: int = 2) -> None:
    """Stop when too many grades failed.

    Grades of trajectories that failed themselves are left out: those are the rollout's failures, counted there. So are
    those that wait for a person (`ungraded: …`).

    Args:
        grades: a step's grades.
        max_failed: largest share that may fail.
        min_failed: fewer failures than this are let pass, whatever their share, unless every grade failed.

    Raises:
        GradeError: too many failed; names the most frequent causes.
    """
    graded = [grade for grade in grades if not (grade.error or "").startswith((ROLLOUT_FAILED, UNGRADED))]
    causes = Counter((grade.grader, (grade.error or "")[:200]) for grade in graded if grade.score is None)
    failed = causes.total()
    if failed == 0 or failed <= max_failed * len(graded) or (failed < min_failed and failed < len(graded)):
        return
    listed = "".join(f"\n  {count} × {grader}: {error}" for (grader, error), count in causes.most_common(5))
    raise GradeError(
        f"{failed} of {len(graded)} grades failed ({failed / len(graded):.0%}, at most {max_failed:.0%} may). "
        f"Mend the grader or its tasks, or raise the limit. Most frequent causes:{listed}"
    )


async def _grade_one(grader: Grader, trajectory: Trajectory, deadline_s: float) -> Grade:
    started_s = time.perf_counter()
    under_way: list[str] = []
    token = UNDER_WAY.set(under_way)
    work = asyncio.ensure_future(_call(grader, trajectory))  # which takes a copy of the context
    UNDER_WAY.reset(token)
    # asyncio.wait, not wait_for: a grader that ignores its cancellation must not hold up the others.
    try:
        await asyncio.wait({work}, timeout=deadline_s)
    finally:
        if not work.done():
            work.cancel()
    seconds = time.perf_counter() - started_s
    if not work.done():
        late = sorted(set(under_way))
        error = f"{TIMED_OUT}{deadline_s:g} s" + (f" (waited for {', '.join(late)})" if late else "")
        parts = {f"{name}/{what}": 1.0 for name in late for what in ("failed", "timed_out")}
        return _failure(grader, error, seconds).replace(parts=parts)
    if work.cancelled():
        return _failure(grader, "the grader cancelled itself", seconds)
    raised = work.exception()
    if raised is not None:
        return _failure(grader, f"{type(raised).__name__}: {raised}", seconds)
    grade = checked(grader, work.result())
    return grade.replace(seconds=grade.seconds or seconds)


async def _call(grader: Grader, trajectory: Trajectory) -> object:
    grade = grader.grade(trajectory)
    return await grade if inspect.isawaitable(grade) else grade


def _rollout_failure(grader: Grader, trajectory: Trajectory) -> Grade | None:
    if not trajectory.failed():
        return None
    return _failure(grader, f"{ROLLOUT_FAILED}{trajectory.error or trajectory.stop_reason.value}")


def _failure(grader: Grader, error: str, seconds: float = 0.0) -> Grade:
    return Grade(score=None, grader=grader.name, error=error[:_MAX_ERROR], seconds=seconds)
