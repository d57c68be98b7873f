"""Graders of plain text: equal to an accepted answer, matching a pattern, of the right length."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import accepted_answers, answer_text, binary, normalised, right, wrong
from posttrain.grade.combine import in_daemon_thread
from posttrain.grade.regex_worker import exponent, last_match
from posttrain.grade.worker_pool import WorkerFailure, WorkerPool

_QUICK = 2e7  # steps of a search that take a fraction of a second
_START_S = 60.0  # for the process of a search to be there


class Exact:
    """1 where the answer equals an accepted answer (`task.answer`, `task.facts["answers"]`), else 0.

    Args:
        normalise: True compares without case, white space, quotes and punctuation around the text; False compares
            the texts as they stand; a function is applied to both sides.
        name: the grader's name.
    """

    def __init__(self, normalise: bool | Callable[[str], str] = True, name: str = "exact") -> None:
        self.name = name
        if callable(normalise):
            self._normalise = normalise
        else:
            self._normalise = normalised if normalise else str

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Compare; raises GradeError where the task has no answer."""
        started_s = time.perf_counter()
        given = self._normalise(answer_text(trajectory))
        correct = any(given == self._normalise(answer) for answer in accepted_answers(trajectory.task))
        return binary(self.name, correct, started_s, "" if correct else f"answered {given[:200]!r}")

    def cases(self) -> Sequence[GradeCase]:
        """Gold answers and near misses."""
        task = Task(id="capital", prompt="The capital of France?", answer="Paris", facts={"answers": ["Paname"]})
        return (
            right(task, "Paris"),
            right(task, "Paname", "an accepted alias"),
            wrong(task, "Lyon"),
            wrong(task, "Paris, Texas", "more than the answer"),
            wrong(task, "", "nothing"),
        )


class Regex:
    """1 where a pattern is found in the answer; with `group`, where what the group caught is an accepted answer.

    Python's `re` cannot be interrupted, and a pattern with nested repetition can hang on a hostile text. So whatever is
    not sure to be quick on the answer at hand is matched in a process of its own, which is killed when its time is up;
    that grade is an error, never 0. Keep patterns linear.

    Args:
        pattern: a regular expression, searched for anywhere in the answer.
        group: number or name of the group whose text, in the last match, is compared with the accepted answers as
            `Exact` does.
        name: the grader's name.
        flags: flags of `re.compile`.
        cases: gold answers and near misses by which this instance proves itself.
        timeout_s: seconds for one answer.

    Raises:
        ConfigError: the pattern is not a regular expression or has no such group.
    """

    def __init__(
        self,
        pattern: str,
        group: int | str | None = None,
        name: str = "regex",
        *,
        flags: int = 0,
        cases: Sequence[GradeCase] = (),
        timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.deadline_s = timeout_s + _START_S
        self._group = group
        self._timeout_s = timeout_s
        self._pool: WorkerPool | None = None
        self._cases = tuple(cases)
        try:
            self._pattern = re.compile(pattern, flags)
        except re.error as error:
            raise ConfigError(f"grader {name!r}: {pattern!r} is not a regular expression: {error}") from error
        groups = {*range(self._pattern.groups + 1), *self._pattern.groupindex}
        if group is not None and group not in groups:
            raise ConfigError(f"grader {name!r}: {pattern!r} has no group {group!r}; it has {sorted(groups, key=str)}")
        self._exponent = exponent(pattern, flags)

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Search; raises GradeError where there is no answer to compare with, or the search does not end in time."""
        started_s = time.perf_counter()
        text = answer_text(trajectory)
        if self._exponent is not None and len(text) ** self._exponent <= _QUICK:
            match = last_match(self._pattern, self._group, text)
        else:
            match = await in_daemon_thread(self._elsewhere, text)
        if not match["found"]:
            return binary(self.name, False, started_s, "the pattern is not found")
        if self._group is None:
            return binary(self.name, True, started_s)
        caught = normalised(match["caught"])
        correct = any(caught == normalised(answer) for answer in accepted_answers(trajectory.task))
        return binary(self.name, correct, started_s, "" if correct else f"caught {caught[:200]!r}")

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given: a pattern cannot invent its own."""
        return self._cases

    def _elsewhere(self, text: str) -> dict[str, Any]:
        if self._pool is None:
            self._pool = WorkerPool("posttrain.grade.regex_worker")
        job = {"pattern": self._pattern.pattern, "flags": self._pattern.flags, "group": self._group, "text": text}
        try:
            return self._pool.call(job, self._timeout_s)
        except WorkerFailure as failure:
            raise GradeError(f"the pattern {self._pattern.pattern!r} on {len(text)} characters: {failure}") from failure


LengthUnit = Literal["tokens", "characters", "words"]


class Length:
    """1 where the answer's length lies within bounds; outside it falls by `slope` per unit, down to 0.

    Args:
        target: the only length that scores 1; instead of `min` and `max`.
        min: shortest length that scores 1.
        max: longest length that scores 1.
        unit: tokens that the policy wrote (reasoning and end of sequence too), or characters or words of the answer.
        slope: score lost per unit outside the bounds; None scores 0 there.
        name: the grader's name.

    Raises:
        ConfigError: no bounds, contradictory bounds, or a slope that is not above 0.
    """

    def __init__(
        self,
        target: int | None = None,
        *,
        min: int | None = None,
        max: int | None = None,
        unit: LengthUnit = "tokens",
        slope: float | None = None,
        name: str = "length",
    ) -> None:
        if (target is None) == (min is None and max is None):
            raise ConfigError(f"grader {name!r}: give either a target length, or a min, a max or both")
        self.name = name
        self._low = target if target is not None else (min or 0)
        self._high = target if target is not None else max
        self._unit = unit
        self._slope = slope
        if unit not in ("tokens", "characters", "words"):
            raise ConfigError(f"grader {name!r}: unit must be tokens, characters or words, not {unit!r}")
        if self._low < 0 or (self._high is not None and self._high < self._low):
            raise ConfigError(f"grader {name!r}: no length lies between {self._low} and {self._high}")
        if slope is not None and slope <= 0:
            raise ConfigError(f"grader {name!r}: slope must be above 0, not {slope}")

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Measure."""
        started_s = time.perf_counter()
        length = self._measure(trajectory)
        outside = max(self._low - length, 0 if self._high is None else length - self._high, 0)
        if outside == 0:
            score = 1.0
        else:
            score = 0.0 if self._slope is None else max(0.0, 1.0 - self._slope * outside)
        seconds = time.perf_counter() - started_s
        return Grade(score=score, grader=self.name, rationale=f"{length} {self._unit}", seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """Texts at the bounds, and far outside them."""
        task = Task(id="length", prompt="Write.")
        far = 1 if self._slope is None else int(1 / self._slope) + 1
        found = [right(task, self._text(self._low), "the shortest")]
        if self._high is not None:
            found.append(right(task, self._text(self._high), "the longest"))
            found.append(wrong(task, self._text(self._high + far), "too long"))
        if self._low - far >= 0:
            found.append(wrong(task, self._text(self._low - far), "too short"))
        return tuple(found)

    def _measure(self, trajectory: Trajectory) -> int:
        if self._unit == "tokens":
            return trajectory.num_completion_tokens()
        text = answer_text(trajectory)
        return len(text) if self._unit == "characters" else len(text.split())

    def _text(self, length: int) -> str:
        return "x" * length if self._unit == "characters" else " ".join(["x"] * length)
