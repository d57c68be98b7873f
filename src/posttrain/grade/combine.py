"""Graders made of other graders or of a plain function."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Grader, Trajectory

Verdict = float | Grade
TIMED_OUT = "no grade within "  # how the error of a grade begins that did not come in time
INVALID = ("its score is ", "its part ", "returned ")  # and of one that is no grade
UNDER_WAY: ContextVar[list[str] | None] = ContextVar("under_way", default=None)  # names of the parts of a grade
_SLACK = 1e-6  # of a score's range, for what is rounded


class Function:
    """A grader that calls a function, plain or `async`, from trajectory to number or Grade.

    A plain function runs in a daemon thread of its own, so that one which never returns costs a thread and an error,
    not the run. Work that may hang for ever belongs into a process that can be killed.

    Args:
        fn: `(trajectory) -> float | bool | Grade`.
        name: the grader's name; the function's name if not given.
        cases: gold answers and near misses by which this instance proves itself.
        score_range: lowest and highest score; one outside of them is an error.
    """

    def __init__(
        self,
        fn: Callable[[Trajectory], Verdict | Awaitable[Verdict]],
        name: str | None = None,
        *,
        cases: Sequence[GradeCase] = (),
        score_range: tuple[float, float] | None = None,
    ) -> None:
        self.name = name or getattr(fn, "__name__", "function").strip("<>")
        self.score_range = score_range
        self._fn = fn
        self._cases = tuple(cases)
        self._asynchronous = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)
        self.waits = self._asynchronous

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Call the function; what it raises is raised here."""
        started_s = time.perf_counter()
        verdict = self._fn(trajectory) if self._asynchronous else await in_daemon_thread(self._fn, trajectory)
        if inspect.isawaitable(verdict):
            verdict = await verdict
        seconds = time.perf_counter() - started_s
        if isinstance(verdict, Grade):
            return verdict.replace(grader=self.name, seconds=verdict.seconds or seconds)
        if not isinstance(verdict, bool | int | float) and not hasattr(verdict, "__float__"):
            raise GradeError(f"grader {self.name!r} returned {type(verdict).__name__}, not a number or a Grade")
        return Grade(score=float(verdict), grader=self.name, seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given."""
        return self._cases


class Weighted:
    """The weighted sum of several graders' scores. Weights are used as they are, not normalised.

    `parts` keeps each grader's own score under its name, and its parts under `<grader>/<part>`.

    Args:
        graders: weight by grader, or pairs of both. Names must differ.
        name: the grader's name.
        on_error: what to do where a grader fails: "error" makes the whole grade an error; "skip" leaves that grader out
            of the sum and sets the part `<grader>/failed` to 1 (the grade is an error only where every grader fails).
        cases: cases for the sum; the graders prove themselves besides.

    Raises:
        ConfigError: no graders, or two of one name.
    """

    def __init__(
        self,
        graders: Mapping[Grader, float] | Sequence[tuple[Grader, float]],
        name: str = "weighted",
        *,
        on_error: Literal["error", "skip"] = "error",
        cases: Sequence[GradeCase] = (),
    ) -> None:
        self.weights = tuple(graders.items() if isinstance(graders, Mapping) else graders)
        self.name = name
        self._on_error = on_error
        self._cases = tuple(cases)
        names = [grader.name for grader in self.graders]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"grader {name!r}: needs graders of different names, not {names}")
        if on_error not in ("error", "skip"):
            raise ConfigError(f"grader {name!r}: on_error must be 'error' or 'skip', not {on_error!r}")

    @property
    def graders(self) -> tuple[Grader, ...]:
        """The graders it is made of."""
        return tuple(grader for grader, _ in self.weights)

    @property
    def max_concurrency(self) -> int | None:
        """How many grades can be under way at once: as many as its narrowest grader allows."""
        limits = [getattr(grader, "max_concurrency", None) for grader in self.graders]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take: as long as the most patient of its graders asks for, or 10."""
        return max(float(getattr(grader, "deadline_s", 10.0)) for grader in self.graders)

    async def prepare(self) -> None:
        """Prepare the graders that want to be."""
        await asyncio.gather(*(grader.prepare() for grader in self.graders if hasattr(grader, "prepare")))

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Grade by all graders at once and add up."""
        started_s = time.perf_counter()
        grades = await asyncio.gather(*(grade_or_error(grader, trajectory) for grader in self.graders))
        parts: dict[str, float] = {}
        errors: list[str] = []
        total = 0.0
        for (grader, weight), grade in zip(self.weights, grades, strict=True):
            parts.update({f"{grader.name}/{part}": value for part, value in grade.parts.items()})
            if grade.score is None:
                errors.append(f"{grader.name}: {grade.error}")
                parts |= failure_parts(grade)
            else:
                parts[grader.name] = grade.score
                total += weight * grade.score
        failed = bool(errors) and (self._on_error == "error" or len(errors) == len(grades))
        return Grade(
            score=None if failed else total,
            grader=self.name,
            parts=parts,
            rationale="; ".join(f"{grade.grader}: {grade.rationale}" for grade in grades if grade.rationale),
            error="; ".join(errors) if failed else None,
            seconds=time.perf_counter() - started_s,
            cost=sum(grade.cost for grade in grades),
        )

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given for the sum."""
        return self._cases


def failure_parts(grade: Grade) -> dict[str, float]:
    """Of a part's grade that failed: `<grader>/failed`, and `/timed_out` or `/invalid` where it was that."""
    error = grade.error or ""
    kinds = {"failed": True, "timed_out": error.startswith(TIMED_OUT), "invalid": error.startswith(INVALID)}
    return {f"{grade.grader}/{kind}": 1.0 for kind, is_it in kinds.items() if is_it and grade.score is None}


async def grade_or_error(grader: Grader, trajectory: Trajectory) -> Grade:
    """One grader's grade; what it raises, or a score that is none, is a grade with an error."""
    under_way = UNDER_WAY.get()
    if under_way is not None:
        under_way.append(grader.name)
    try:
        grade = checked(grader, await grader.grade(trajectory))
    except Exception as error:  # noqa: BLE001  a failing part is data: it becomes the grade's error
        grade = Grade(score=None, grader=grader.name, error=f"{type(error).__name__}: {error}")
    if under_way is not None:  # not where it was cancelled: then it is what was waited for
        under_way.remove(grader.name)
    return grade


def checked(grader: Grader, grade: object) -> Grade:
    """What a grader returned, if it is a Grade whose numbers can be right; else a grade with an error.

    A grader that says in what range its scores lie (`score_range`) is held to it.
    """
    if not isinstance(grade, Grade):
        return Grade(score=None, grader=grader.name, error=f"returned {type(grade).__name__}, not a Grade")
    if grade.score is None:
        return grade
    wrong = None
    if not math.isfinite(grade.score):
        wrong = f"its score is {grade.score}"
    for part, value in grade.parts.items():
        if not math.isfinite(value):
            wrong = f"its part {part!r} is {value}"
    bounds = getattr(grader, "score_range", None)
    if wrong is None and bounds is not None and not bounds[0] - _SLACK <= grade.score <= bounds[1] + _SLACK:
        wrong = f"its score is {grade.score:g}, outside its range from {bounds[0]:g} to {bounds[1]:g}"
    if wrong is None:
        return grade
    return Grade(score=None, grader=grader.name, error=wrong, seconds=grade.seconds, cost=grade.cost)


async def in_daemon_thread(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a daemon thread of its own and wait for it.

    Unlike `asyncio.to_thread`, a function that never returns holds up neither the executor, nor the event loop's end,
    nor the interpreter's.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = fn(*arguments)
        except StopIteration as error:  # a Future refuses this one
            failure = GradeError(f"StopIteration: {error}")
        except BaseException as error:  # noqa: BLE001  it is raised again where the function is awaited
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name="grader", daemon=True).start()
    return await done
