"""Judges of one answer: criteria met or not, a rating on a scale, or a template of your own."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec

from posttrain.core import ConfigError, Grade, GradeCase, Task, Trajectory
from posttrain.grade.answer import answer_text, right, wrong
from posttrain.grade.judge_model import Answer, JudgeFailed, JudgeModel
from posttrain.grade.judge_prompt import (
    Shot,
    fenced,
    judge_messages,
    key_cases,
    question_parts,
    says_nothing,
)
from posttrain.grade.judge_reply import ReplyUnreadable, read_pattern

CORRECT = "The answer to the question is correct: it says the same as the reference."
GOOD = "How helpful, correct and complete is the answer to the question?"
_CAPITAL = Task(id="capital", prompt="What is the capital of France?", answer="Paris")

V = TypeVar("V")
Reference = Literal["none", "task"]


class Met(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the criteria are met."""

    rationale: str
    meets: bool


class BinaryJudge:
    """1 where an answer meets the criteria, else 0.

    Args:
        judge: who judges.
        criteria: what a good answer is, in plain words; all of it must be met.
        reference: "task" shows the judge the task's accepted answers (reference-guided), "none" does not.
        shots: worked examples; `verdict` is True or False.
        cases: gold answers and near misses for these criteria; the built-in criteria bring their own. Answers that
            say nothing and answers that speak to the judge are added to the near misses.
        guard: score answers that say nothing (`:`, "Let's solve this step by step", arXiv 2507.08794) 0 without asking.
        name: the grader's name.
    """

    waits = True

    def __init__(
        self,
        judge: JudgeModel,
        criteria: str = CORRECT,
        *,
        reference: Reference | None = None,
        shots: Sequence[Shot] = (),
        cases: Sequence[GradeCase] = (),
        guard: bool = True,
        name: str = "judge",
    ) -> None:
        self.name, self.judge = name, judge
        self._criteria, self._shots, self._guard = criteria, tuple(shots), guard
        self._reference = criteria == CORRECT if reference is None else reference == "task"
        self._cases = tuple(cases)
        check_criteria(name, criteria)

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take."""
        return self.judge.deadline_s + 1.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Ask the judge."""
        text = answer_text(trajectory)
        if self._guard and says_nothing(text):
            return nothing_said(self.name)
        messages = judge_messages(
            f"The criteria, all of which must be met:\n{self._criteria}",
            question_parts(trajectory.task, reference=self._reference) | {"answer": text},
            'Does the answer meet the criteria? Reply with JSON: {"rationale": "…", "meets": true or false}',
            [({"question": s.prompt, "answer": s.answer}, _shot_reply(s, meets=bool(s.verdict))) for s in self._shots],
        )
        return await judged(self.name, self.judge.ask(messages, Met), lambda v: (float(v.meets), {}, v.rationale))

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given, or those of the built-in criteria, and answers without content."""
        own = self._cases
        if not own and self._criteria == CORRECT:
            own = (
                right(_CAPITAL, "Paris"),
                right(_CAPITAL, "The capital is Paris.", "in a sentence"),
                wrong(_CAPITAL, "Lyon"),
                wrong(_CAPITAL, "The capital of France is a large city on a river.", "true, but no answer"),
            )
        return (*own, *key_cases(own[0].task)) if own else ()


class ScaleJudge:
    """A rating from `low` to `high`, as a score from 0 to 1; the part `rating` is the rating itself.

    Args:
        judge: who judges.
        criteria: what is rated.
        low: the worst rating.
        high: the best rating; 5 and 10 are usual.
        anchors: what ratings mean, by rating; judges agree better with people where they are given.
        reference: "task" shows the judge the task's accepted answers.
        shots: worked examples; `verdict` is the rating.
        cases: gold answers and near misses; scores are from 0 to 1.
        guard: give answers that say nothing the lowest rating without asking.
        name: the grader's name.
    """

    waits = True

    def __init__(
        self,
        judge: JudgeModel,
        criteria: str = GOOD,
        *,
        low: int = 1,
        high: int = 5,
        anchors: Mapping[int, str] | None = None,
        reference: Reference = "none",
        shots: Sequence[Shot] = (),
        cases: Sequence[GradeCase] = (),
        guard: bool = True,
        name: str = "judge",
    ) -> None:
        self.name, self.judge = name, judge
        self._criteria, self._shots, self._guard = criteria, tuple(shots), guard
        self._low, self._high, self._anchors = low, high, dict(anchors or {})
        self._reference = reference == "task"
        self._cases = tuple(cases)
        check_criteria(name, criteria)
        outside = [value for value in self._anchors if not low <= value <= high]
        outside += [shot.verdict for shot in self._shots if not low <= shot.verdict <= high]  # type: ignore[misc]
        if low >= high or outside:
            raise ConfigError(f"grader {name!r}: ratings go from {low} to {high}, which {outside or 'is no scale'}")
        self._kind = rating_struct(low, high)

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take."""
        return self.judge.deadline_s + 1.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Ask the judge."""
        text = answer_text(trajectory)
        if self._guard and says_nothing(text):
            return nothing_said(self.name, rating=float(self._low))
        scale = f"Rate from {self._low} (worst) to {self._high} (best), whole numbers."
        anchors = "".join(f"\n{rating}: {meaning}" for rating, meaning in sorted(self._anchors.items()))
        messages = judge_messages(
            f"What is rated:\n{self._criteria}\n{scale}{anchors}",
            question_parts(trajectory.task, reference=self._reference) | {"answer": text},
            f'Rate the answer. Reply with JSON: {{"rationale": "…", "rating": {self._low} … {self._high}}}',
            [({"question": s.prompt, "answer": s.answer}, _shot_reply(s, rating=int(s.verdict))) for s in self._shots],
        )

        def score(verdict: msgspec.Struct) -> tuple[float, dict[str, float], str]:
            rating: int = verdict.rating  # type: ignore[attr-defined]
            rationale: str = verdict.rationale  # type: ignore[attr-defined]
            return (rating - self._low) / (self._high - self._low), {"rating": float(rating)}, rationale

        return await judged(self.name, self.judge.ask(messages, self._kind), score)

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given, or those of the built-in criteria, and answers without content."""
        own = self._cases
        if not own and self._criteria == GOOD:
            own = (
                right(_CAPITAL, "The capital of France is Paris."),
                GradeCase(task=_CAPITAL, text="The capital of France is Lyon.", low=0.0, high=0.5, why="wrong"),
            )
        return (*own, *key_cases(own[0].task, high=0.25)) if own else ()


class TemplateJudge:
    """A judge with a prompt of your own.

    Args:
        judge: who judges.
        template: with the fields {question}, {answer} and, where wanted, {reference}; each is put in behind fences.
            Other braces are doubled.
        pattern: a regular expression whose first group is the score in the reply, such as `\\[\\[(\\d+)\\]\\]`.
        low: the least score that the judge may give.
        high: the highest; the grade's score is (given − low) / (high − low).
        words: scores by word, where the pattern catches words: {"yes": 1, "no": 0}.
        cases: gold answers and near misses.
        guard: give answers that say nothing the lowest score without asking.
        name: the grader's name.

    Raises:
        ConfigError: the template has no {answer} or an unknown field, or the pattern no group.
    """

    waits = True

    def __init__(
        self,
        judge: JudgeModel,
        template: str,
        *,
        pattern: str,
        low: float = 0.0,
        high: float = 1.0,
        words: Mapping[str, float] | None = None,
        cases: Sequence[GradeCase] = (),
        guard: bool = True,
        name: str = "judge",
    ) -> None:
        self.name, self.judge = name, judge
        self._template, self._low, self._high = template, low, high
        self._words = {word.casefold(): value for word, value in (words or {}).items()}
        self._cases, self._guard = tuple(cases), guard
        try:
            self._pattern = re.compile(pattern)
            template.format(question="", answer="", reference="")
        except (re.error, KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"grader {name!r}: template or pattern: {type(error).__name__}: {error}") from error
        if "{answer}" not in template or self._pattern.groups < 1 or low >= high:
            raise ConfigError(f"grader {name!r}: needs {{answer}} in the template, a group in the pattern, low < high")

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take."""
        return self.judge.deadline_s + 1.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Ask the judge."""
        text = answer_text(trajectory)
        if self._guard and says_nothing(text):
            return nothing_said(self.name)
        parts = question_parts(trajectory.task, reference="{reference}" in self._template) | {"answer": text}
        shown = {"reference": "", **{name: fenced(name, part) for name, part in parts.items()}}
        messages = judge_messages("", {}, self._template.format(**shown))
        return await judged(self.name, self.judge.ask_text(messages, self._read), lambda v: (v[0], {}, v[1]))

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given, and answers without content."""
        return (*self._cases, *key_cases(self._cases[0].task)) if self._cases else ()

    def _read(self, reply: str) -> tuple[float, str]:
        caught = read_pattern(reply, self._pattern)
        try:
            given = self._words[caught.casefold()] if self._words else float(caught)
        except (KeyError, ValueError):
            raise ReplyUnreadable(f"{caught!r} is no score; expected {sorted(self._words) or 'a number'}") from None
        if not self._low <= given <= self._high:
            raise ReplyUnreadable(f"{given:g} is not between {self._low:g} and {self._high:g}")
        return (given - self._low) / (self._high - self._low), reply.strip()


async def judged(
    name: str, asking: Awaitable[Answer[V]], score: Callable[[V], tuple[float, dict[str, float], str]]
) -> Grade:
    """The grade of one verdict; a judge that gave none is a grade with an error, and with what it cost.

    Args:
        name: the grader's name.
        asking: the question, under way.
        score: from the verdict to score, parts and rationale.
    """
    started_s = time.perf_counter()
    try:
        answer = await asking
    except JudgeFailed as failure:
        seconds = time.perf_counter() - started_s
        return Grade(score=None, grader=name, error=str(failure), cost=failure.cost, seconds=seconds)
    value, parts, rationale = score(answer.verdict)
    seconds = time.perf_counter() - started_s
    return Grade(score=value, grader=name, parts=parts, rationale=rationale, seconds=seconds, cost=answer.cost)


def nothing_said(name: str, **parts: float) -> Grade:
    """The lowest grade, for an answer without content; the judge was not asked."""
    rationale = "the answer says nothing; the judge was not asked"
    return Grade(score=0.0, grader=name, parts={**parts, "says_nothing": 1.0}, rationale=rationale)


def rating_struct(low: int, high: int) -> type[msgspec.Struct]:
    """The verdict of a scale: `rationale`, and `rating` from `low` to `high`."""
    rating = Annotated[int, msgspec.Meta(ge=low, le=high)]
    return msgspec.defstruct("Rating", [("rationale", str), ("rating", rating)], frozen=True, kw_only=True)


def check_criteria(name: str, criteria: str) -> None:
    """Raise ConfigError for empty criteria."""
    if not criteria.strip():
        raise ConfigError(f"grader {name!r}: criteria are empty; say in plain words what a good answer is")


def _shot_reply(shot: Shot, **verdict: bool | int) -> str:
    return json.dumps({"rationale": shot.rationale, **verdict}, ensure_ascii=False)
