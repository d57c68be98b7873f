"""Graders made of graders by rules other than a sum: gates, vetoes, products, thresholds; and scores made comparable.

grade.Gate(grade.Regex(r"<answer>"), then=grade.Maths())            # format before content
grade.Veto(grade.Weighted({…}), {grade.Repetition(): 0.5})          # nothing for an answer that goes in circles
grade.Product([grade.UnitTests(), grade.Length(max=400, slope=0.01)])
grade.Threshold(grade.WordF1(), at=0.6)
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from posttrain.core import ConfigError, Grade, GradeCase, Grader, Trajectory
from posttrain.grade.combine import failure_parts, grade_or_error


class _Composed:
    """What combinations share: their graders' preparation, width and parts."""

    def __init__(self, graders: Sequence[Grader], name: str, cases: Sequence[GradeCase]) -> None:
        self.name = name
        self.graders = tuple(graders)
        self._cases = tuple(cases)
        names = [grader.name for grader in self.graders]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"grader {name!r}: needs graders of different names, not {names}")

    @property
    def max_concurrency(self) -> int | None:
        """How many grades can be under way at once: as many as its narrowest grader allows."""
        limits = [getattr(grader, "max_concurrency", None) for grader in self.graders]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take: as long as its graders one after the other, where one waits for another."""
        return sum(float(getattr(grader, "deadline_s", 10.0)) for grader in self.graders)

    async def prepare(self) -> None:
        """Prepare the graders that want to be."""
        await asyncio.gather(*(grader.prepare() for grader in self.graders if hasattr(grader, "prepare")))

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given for the whole; its graders prove themselves besides."""
        return self._cases

    def _made(self, score: float, grades: Sequence[Grade], started_s: float, **parts: float) -> Grade:
        """A grade of this score with the parts, reasons and costs of others; an error where one of them is."""
        errors = [f"{grade.grader}: {grade.error}" for grade in grades if grade.score is None]
        kept: dict[str, float] = {}
        for grade in grades:
            kept.update({f"{grade.grader}/{part}": value for part, value in grade.parts.items()})
            if grade.score is not None:
                kept[grade.grader] = grade.score
            kept |= failure_parts(grade)
        return Grade(
            score=None if errors else score,
            grader=self.name,
            parts={**kept, **parts},
            rationale="; ".join(f"{grade.grader}: {grade.rationale}" for grade in grades if grade.rationale),
            error="; ".join(errors) if errors else None,
            seconds=time.perf_counter() - started_s,
            cost=sum(grade.cost for grade in grades),
        )


class Gate(_Composed):
    """The score of one grader where another lets the answer through, and a fixed score where it does not.

    What is behind a closed gate is not graded, so an expensive judge is not asked about an answer without form.

    Parts: those of both graders, and `open`.

    Args:
        gate: the grader that decides.
        then: the grader behind it.
        at: score of `gate` from which it is open.
        closed: score of an answer that it stops.
        passed: added where it is open, so that getting through is worth something by itself.
        name: the grader's name.
        cases: cases for the whole.
    """

    def __init__(
        self,
        gate: Grader,
        then: Grader,
        *,
        at: float = 1.0,
        closed: float = 0.0,
        passed: float = 0.0,
        name: str = "gate",
        cases: Sequence[GradeCase] = (),
    ) -> None:
        super().__init__([gate, then], name, cases)
        self._at, self._closed, self._passed = at, closed, passed

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Grade by the gate, and by what is behind it where it is open."""
        started_s = time.perf_counter()
        gate, then = self.graders
        first = await grade_or_error(gate, trajectory)
        if first.score is None or first.score < self._at:
            return self._made(self._closed, [first], started_s, open=0.0)
        second = await grade_or_error(then, trajectory)
        return self._made(self._passed + (second.score or 0.0), [first, second], started_s, open=1.0)


class Veto(_Composed):
    """The score of one grader, unless another falls below its bound: then a fixed score.

    Parts: those of all graders, and `vetoed`.

    Args:
        grader: whose score counts.
        vetoes: for each grader that may object, the score below which it does.
        score: what an answer gets that is objected to.
        name: the grader's name.
        cases: cases for the whole.
    """

    def __init__(
        self,
        grader: Grader,
        vetoes: Mapping[Grader, float] | Sequence[tuple[Grader, float]],
        *,
        score: float = 0.0,
        name: str = "veto",
        cases: Sequence[GradeCase] = (),
    ) -> None:
        self._bounds = tuple(vetoes.items() if isinstance(vetoes, Mapping) else vetoes)
        if not self._bounds:
            raise ConfigError(f"grader {name!r}: needs a grader that may veto")
        super().__init__([grader, *(veto for veto, _ in self._bounds)], name, cases)
        self._score = score

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Grade by all at once."""
        started_s = time.perf_counter()
        first, *others = await asyncio.gather(*(grade_or_error(grader, trajectory) for grader in self.graders))
        vetoed = any(
            grade.score is not None and grade.score < bound
            for grade, (_, bound) in zip(others, self._bounds, strict=True)
        )
        score = self._score if vetoed else first.score or 0.0
        return self._made(score, [first, *others], started_s, vetoed=float(vetoed))


class Product(_Composed):
    """The product of several graders' scores: all must be good, and a zero anywhere is a zero.

    Args:
        graders: whose scores are multiplied; none may be negative, as two would make a positive one.
        geometric: whether to take the n-th root, which keeps the scale of one score.
        name: the grader's name.
        cases: cases for the whole.
    """

    def __init__(
        self,
        graders: Sequence[Grader],
        *,
        geometric: bool = False,
        name: str = "product",
        cases: Sequence[GradeCase] = (),
    ) -> None:
        super().__init__(graders, name, cases)
        self._geometric = geometric

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Grade by all at once and multiply."""
        started_s = time.perf_counter()
        grades = list(await asyncio.gather(*(grade_or_error(grader, trajectory) for grader in self.graders)))
        for place, grade in enumerate(grades):
            if grade.score is not None and grade.score < 0:
                error = f"its score {grade.score:g} is below 0, which has no place in a product"
                grades[place] = grade.replace(score=None, error=error)
        product = math.prod(grade.score or 0.0 for grade in grades)
        return self._made(product ** (1 / len(grades)) if self._geometric else product, grades, started_s)


class Threshold(_Composed):
    """1 where another grader's score reaches a bound, else 0.

    Args:
        grader: whose score is cut.
        at: the bound.
        name: the grader's name.
        cases: cases for the whole.
    """

    def __init__(self, grader: Grader, at: float, *, name: str = "threshold", cases: Sequence[GradeCase] = ()) -> None:
        super().__init__([grader], name, cases)
        self._at = at

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Grade and cut."""
        started_s = time.perf_counter()
        grade = await grade_or_error(self.graders[0], trajectory)
        return self._made(float((grade.score or 0.0) >= self._at), [grade], started_s)


def normalise_by_group(
    grades: Sequence[Grade],
    groups: Sequence[str],
    weights: Mapping[str, float] | None = None,
    *,
    epsilon: float = 1e-4,
) -> list[Grade]:
    """Scores that say how good an answer is among its siblings; each part weighs the same whatever its scale.

    With weights, each named part is normalised within the group and the weighted sum of what comes is the score: a part
    of large spread then no longer drowns one of small spread, nor do different sums fall together (GDPO, Liu et al.,
    2026, arXiv 2601.05242, section 3). Without, the score itself is normalised.

    z = (x − mean) / (std + epsilon), the standard deviation over the group as it is (n, not n − 1). Of a part that a
    grade lacks, and in a group of one, z is 0.

    Args:
        grades: one for each trajectory; those with an error come back as they are and count nowhere.
        groups: of each trajectory, the group it was sampled in.
        weights: weight by part; None normalises the score.
        epsilon: added to the standard deviation.

    Returns:
        The grades with new scores. `parts` keeps the old ones, and `raw/score` the old score.

    Raises:
        ConfigError: no grade has a part of that name.
    """
    graded = [grade for grade in grades if grade.score is not None]
    missing = [part for part in weights or {} if graded and not any(part in grade.parts for grade in graded)]
    if missing:
        raise ConfigError(f"normalise_by_group: no grade has a part {', '.join(map(repr, missing))}")
    members: dict[str, list[int]] = defaultdict(list)
    for place, (grade, group) in enumerate(zip(grades, groups, strict=True)):
        if grade.score is not None:
            members[group].append(place)
    scores = dict.fromkeys(range(len(grades)), 0.0)
    for places in members.values():
        for part, weight in ({"": 1.0} if weights is None else weights).items():
            values = {
                place: grades[place].score if weights is None else grades[place].parts.get(part) for place in places
            }
            known = {place: value for place, value in values.items() if value is not None}
            if len(known) > 1:
                mean, std = fmean(known.values()), pstdev(known.values())
                for place, value in known.items():
                    scores[place] += weight * (value - mean) / (std + epsilon)
    return [
        grade
        if grade.score is None
        else grade.replace(score=scores[place], parts={**grade.parts, "raw/score": grade.score})
        for place, grade in enumerate(grades)
    ]
