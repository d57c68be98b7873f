"""A panel: several judges of one answer, asked at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

from posttrain.core import ConfigError, Grade, GradeCase, Grader, Trajectory
from posttrain.grade.combine import TIMED_OUT, failure_parts, grade_or_error

Combine = Literal["vote", "mean", "weakest"]
MAX_JUDGES = 15


class Panel:
    """1 to 15 graders as one: a majority vote, the mean, or the weakest link. All are asked at the same time.

    Parts: each judge's score under its name, `spread` (highest less lowest score), and `judges_failed` where any did.
    A smaller panel of different models is a better judge than one large model, and cheaper (arXiv 2404.18796).

    Args:
        graders: the judges, of different names; any graders will do.
        combine: "vote": 1 where more judges give `threshold` or more than less, 0 where fewer do, ½ where they are
            even; "mean": the mean score; "weakest": the lowest score.
        threshold: from which score a judge votes for the answer.
        quorum: how many judges must give a score. None: more than half; all of them for "weakest", where one that is
            missing might have been the lowest.
        deadline_s: seconds for one judge; None: what each asks for, or 10.
        cases: gold answers and near misses of the panel as a whole; its judges prove themselves besides.
        name: the grader's name.

    Raises:
        ConfigError: too few or too many judges, two of one name, or a quorum that cannot be.
    """

    def __init__(
        self,
        graders: Sequence[Grader],
        combine: Combine = "vote",
        *,
        threshold: float = 0.5,
        quorum: int | None = None,
        deadline_s: float | None = None,
        cases: Sequence[GradeCase] = (),
        name: str = "panel",
    ) -> None:
        self.graders, self.name = tuple(graders), name
        self._combine, self._threshold = combine, threshold
        self._cases = tuple(cases)
        names = [grader.name for grader in self.graders]
        if not 1 <= len(names) <= MAX_JUDGES or len(set(names)) < len(names):
            raise ConfigError(f"grader {name!r}: needs 1 to {MAX_JUDGES} judges of different names, not {names}")
        if combine not in ("vote", "mean", "weakest"):
            raise ConfigError(f"grader {name!r}: combine must be vote, mean or weakest, not {combine!r}")
        most = len(names)
        self._quorum = (most if combine == "weakest" else most // 2 + 1) if quorum is None else quorum
        if not 1 <= self._quorum <= most or (deadline_s is not None and deadline_s <= 0):
            raise ConfigError(f"grader {name!r}: quorum must be 1 to {most}, not {quorum}, and deadline_s above 0")
        self._deadlines_s = [deadline_s or getattr(grader, "deadline_s", 10.0) for grader in self.graders]

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take: as long as the most patient judge's."""
        return max(self._deadlines_s) + 1.0

    @property
    def max_concurrency(self) -> int | None:
        """How many grades can be under way at once: as many as its narrowest judge allows."""
        limits = [getattr(grader, "max_concurrency", None) for grader in self.graders]
        return min((limit for limit in limits if limit is not None), default=None)

    async def prepare(self) -> None:
        """Prepare the judges that want to be."""
        await asyncio.gather(*(grader.prepare() for grader in self.graders if hasattr(grader, "prepare")))

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Ask all judges at once."""
        started_s = time.perf_counter()
        pairs = zip(self.graders, self._deadlines_s, strict=True)
        grades = await asyncio.gather(*(_within(grader, trajectory, limit_s) for grader, limit_s in pairs))
        scores = {grade.grader: grade.score for grade in grades if grade.score is not None}
        failures = [f"{grade.grader}: {grade.error}" for grade in grades if grade.score is None]
        parts = dict(scores)
        if scores:
            parts["spread"] = max(scores.values()) - min(scores.values())
        if failures:
            parts["judges_failed"] = float(len(failures))
            for grade in grades:
                parts |= failure_parts(grade)
        enough = len(scores) >= self._quorum
        told = f"{len(scores)} of {len(grades)} judges gave a score, {self._quorum} must; "
        return Grade(
            score=self._combined(list(scores.values())) if enough else None,
            grader=self.name,
            parts=parts,
            rationale="\n".join(f"{grade.grader}: {grade.rationale}" for grade in grades if grade.rationale),
            error=None if enough else told + "; ".join(failures),
            seconds=time.perf_counter() - started_s,
            cost=sum(grade.cost for grade in grades),
        )

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given for the panel."""
        return self._cases

    def _combined(self, scores: Sequence[float]) -> float:
        if self._combine == "mean":
            return sum(scores) / len(scores)
        if self._combine == "weakest":
            return min(scores)
        lead = sum(1 if score >= self._threshold else -1 for score in scores)
        return 0.5 if lead == 0 else float(lead > 0)


async def _within(grader: Grader, trajectory: Trajectory, limit_s: float) -> Grade:
    """One judge's grade under the judge's own name, or the error of one that failed or was late."""
    try:
        async with asyncio.timeout(limit_s):
            grade = await grade_or_error(grader, trajectory)
    except TimeoutError:
        return Grade(score=None, grader=grader.name, error=f"{TIMED_OUT}{limit_s:g} s")
    return grade.replace(grader=grader.name)
