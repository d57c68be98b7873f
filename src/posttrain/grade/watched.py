"""A grader under watch: what fails, hangs or lies in a step is in that step's metrics and among the run's events.

watched = WatchedGrader(grader, bench.run, step=learner.step)
await watched.prove()                          # a grader that fails its own cases does not begin
grades = await grade_all(watched, trajectories)
watched.check(grades)                          # stops where too many failed, after saying so
metrics |= await watched.step(done, held_out=accuracy)
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Grader, ProvesItself, Tracker, Trajectory
from posttrain.grade.answer import trajectory_from_text
from posttrain.grade.batch import ROLLOUT_FAILED, UNGRADED, check_failures, grade_all
from posttrain.grade.hacking_watch import Alarm, HackingWatch, WatchBounds, step_signs
from posttrain.grade.proof import ProofReport, ProvenCase, prove_all
from posttrain.grade.reward_metrics import failure_metrics, reward_metrics

QUICK_S = 1.0  # cases that took no longer in the proof are asked again in every step


class TellsRun(Protocol):
    """Where a run's events and metrics go: a `registry.RunFolder`, or a list in a test."""

    @property
    def tracker(self) -> Tracker:
        """Takes metrics."""
        ...

    def event(self, kind: str, **fields: Any) -> None:
        """Take one event."""
        ...


class WatchedGrader:
    """A grader that answers for itself. It grades as the grader within does, under the same name.

    Every step's metrics have `grader/<name>/failed`, `/timed_out`, `/invalid` for the grader and its parts, the signs
    of `HackingWatch` under `watch/…`, and `alarms`, how many there are. Each alarm is an event of the run too, with
    its `sign`: `grader_failed`, `proof` (a case that held at the start does not hold now), or one of `HackingWatch`'s.

    Args:
        grader: the grader within.
        run: where events go, and the metrics of a step that is broken off.
        step: steps done so far.
        max_failed: share of failed grades at which the recipe stops (`check_failures`).
        bounds: of the alarms.
        past: the run's metrics so far, so that a resumed run remembers how it began.
        cases_per_step: of the grader's own cases, how many are asked again in every step; 0: none.
    """

    def __init__(
        self,
        grader: Grader,
        run: TellsRun,
        *,
        step: int = 0,
        max_failed: float = 0.05,
        bounds: WatchBounds | None = None,
        past: Sequence[Mapping[str, float]] = (),
        cases_per_step: int = 2,
    ) -> None:
        if isinstance(grader, WatchedGrader):
            raise ConfigError(f"grader {grader.name!r}: is watched already")
        self.grader = grader
        self.watch = HackingWatch(bounds=bounds or WatchBounds()).recalled(past)
        self._run = run
        self._step = step
        self._max_failed = max_failed
        self._cases_per_step = cases_per_step
        self._paused = False
        self._seen: list[tuple[Trajectory, Grade]] = []
        self._proven: Iterator[tuple[Grader, GradeCase]] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "grader":
            raise AttributeError(name)
        return getattr(self.grader, name)

    @property
    def name(self) -> str:
        """The grader's name."""
        return self.grader.name

    async def grade(self, trajectory: Trajectory) -> Grade:
        """The grade of the grader within."""
        return await self.grader.grade(trajectory)

    def gave(self, trajectories: Sequence[Trajectory], grades: Sequence[Grade]) -> None:
        """What `grade_all` and `grade_while` show of every batch: it belongs to the step that comes next."""
        if not self._paused:
            self._seen += zip(trajectories, grades, strict=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Grades that are not of a training step, such as an evaluation's, within a `with`."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def check(self, grades: Sequence[Grade]) -> None:
        """Stop the run when too many grades failed, as `check_failures` does, the step's metrics and alarm written.

        Raises:
            GradeError: too many failed.
        """
        try:
            check_failures(grades, self._max_failed)
        except GradeError:
            counted = [grade for grade in grades if not _waits(grade)]
            self._tell([self._failure_alarm(self._step + 1, counted)])
            owners = [trajectory.group for trajectory, _ in self._seen]
            metrics = reward_metrics([grade for _, grade in self._seen], owners)
            self._run.tracker.log({**metrics, "alarms": 1.0}, step=self._step + 1)
            raise

    async def prove(self, mode: Literal["refuse", "tell", "off"] = "refuse") -> None:
        """Have the grader, and those it is made of, prove themselves before the run begins.

        A grader without cases begins with a warning among the events: nobody knows whether it tells good from bad.

        Raises:
            GradeError: a case does not hold and `mode` is "refuse".
        """
        if mode == "off":
            return
        report = await prove_all(self.grader)
        cases = list(_cases(report, self.grader))
        broken = [problem for problem in report.problems if "has no cases" not in problem]
        without = [problem for problem in report.problems if "has no cases" in problem]
        if without:
            self._run.event("warning", text="; ".join(without))
        if broken and mode == "refuse":
            self._run.event("alarm", sign="proof", step=self._step, detail="; ".join(broken)[:1000])
            raise GradeError(
                f"the grader {self.name!r} fails its own proof, so the run does not begin:\n  " + "\n  ".join(broken)
            )
        for problem in broken:
            self._run.event("alarm", sign="proof", step=self._step, detail=problem)
        quick = [(grader, proven.case) for grader, proven in cases if proven.holds and proven.grade.seconds <= QUICK_S]
        self._proven = itertools.cycle(quick) if quick else None

    async def step(self, step: int, *, held_out: float | None = None) -> dict[str, float]:
        """Close a step: its metrics, after its alarms have become events.

        Args:
            step: the step's number, as its metrics are logged.
            held_out: accuracy on held-out tasks, where it was measured at this step.
        """
        seen, self._seen, self._step = self._seen, [], step
        grades = [grade for _, grade in seen]
        counted = [grade for grade in grades if not _waits(grade)]
        metrics = failure_metrics(counted)
        alarms: list[Alarm] = []
        if any(grade.score is None for grade in counted):
            alarms.append(self._failure_alarm(step, counted))
        if any(grade.score is not None for grade in grades):
            signs = step_signs(step, [trajectory for trajectory, _ in seen], grades, held_out=held_out)
            self.watch = self.watch.seen(signs)
            metrics |= self.watch.metrics()
            alarms += self.watch.alarms()
        checked, broken = await self._ask_again(step)
        if checked:
            metrics["grader/cases_held"] = (checked - len(broken)) / checked
        alarms += broken
        self._tell(alarms)
        return {**metrics, "alarms": float(len(alarms))}

    async def _ask_again(self, step: int) -> tuple[int, list[Alarm]]:
        """Some of the cases that held at the start, once more: how many, and an alarm for each that does not hold."""
        chosen = list(itertools.islice(self._proven or (), self._cases_per_step))
        alarms = []
        for grader, case in chosen:
            (grade,) = await grade_all(grader, [trajectory_from_text(case.task, case.text)])
            proven = ProvenCase(case=case, grade=grade)
            if not proven.holds:
                detail = ProofReport(grader=grader.name, cases=(proven,)).problems[0]
                value = float("nan") if grade.score is None else grade.score
                bound = case.high if grade.score is not None and grade.score > case.high else case.low
                alarms.append(Alarm(step=step, kind="proof", detail=detail, value=_number(value), bound=bound))
        return len(chosen), alarms

    def _tell(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            fields = {name: value for name, value in alarm.to_dict().items() if name != "kind"}
            self._run.event("alarm", sign=alarm.kind, **fields)

    def _failure_alarm(self, step: int, counted: Sequence[Grade]) -> Alarm:
        failed = [grade for grade in counted if grade.score is None]
        causes = Counter((grade.error or "")[:120] for grade in failed).most_common(3)
        listed = "; ".join(f"{count} × {cause}" for cause, count in causes)
        return Alarm(
            step=step,
            kind="grader_failed",
            detail=f"{self.name}: {len(failed)} of {len(counted)} grades failed: {listed}",
            value=len(failed) / len(counted),
            bound=0.0,
        )


def _waits(grade: Grade) -> bool:
    """Whether there was nothing to grade, or nobody yet to grade it: no failure of the grader."""
    return (grade.error or "").startswith((ROLLOUT_FAILED, UNGRADED))


def _number(value: float) -> float:
    return value if value == value else -1.0  # an alarm is JSON, which knows no NaN


def _cases(report: ProofReport, grader: Grader) -> Iterator[tuple[Grader, ProvenCase]]:
    """Every proven case with the grader it is of."""
    if isinstance(grader, ProvesItself):
        yield from ((grader, proven) for proven in report.cases)
    for part, inner in zip(report.parts, getattr(grader, "graders", ()), strict=False):
        yield from _cases(part, inner)
