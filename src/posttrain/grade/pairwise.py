"""A judge of two answers to one prompt, asked in both orders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Record, Task, Trajectory, generator
from posttrain.grade.answer import answer_text
from posttrain.grade.judge import check_criteria
from posttrain.grade.judge_model import JudgeFailed, JudgeModel
from posttrain.grade.judge_prompt import judge_messages, key_cases, question_parts, says_nothing

BETTER = (
    "Which answer serves the person who asked better? Following the instruction and being correct come first, then "
    "completeness and clarity. The order in which the answers are shown means nothing."
)
Winner = Literal["a", "b", "tie"]
_CAPITAL = Task(
    id="capital-pair", prompt="What is the capital of France?", facts={"opponent": "The capital of France is Lyon."}
)
_MIRRORED: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}


class Preferred(msgspec.Struct, frozen=True, kw_only=True):
    """Which of two answers, as they are shown, is better."""

    rationale: str
    better: Literal["A", "B", "tie"]


class PairVerdict(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a judge says of answers a and b. `winner` is None if and only if `error` says why."""

    winner: Winner | None
    in_order: Winner | None = None  # asked with a shown first
    swapped: Winner | None = None  # asked with b shown first, named back to a and b
    rationale: str = ""
    error: str | None = None
    cost: float = 0.0  # US dollars

    @property
    def flipped(self) -> bool:
        """True where the judge preferred whichever answer was shown first, or second: position decided."""
        return {self.in_order, self.swapped} == {"a", "b"}


class PairwiseJudge:
    """1 where an answer beats its opponent, 0 where it loses, ½ for a tie.

    The judge is asked twice, with the answers swapped; an answer wins only where it is preferred both times, anything
    else is a tie (MT-Bench's conservative rule, arXiv 2306.05685, section 3.4). The part `flipped` is 1 where the two
    orders contradict each other.

    Args:
        judge: who judges.
        criteria: what makes an answer better.
        swap: True asks in both orders; False in one, drawn from the trajectory's id, at half the price.
        ties: whether the judge may say that neither is better.
        opponent: the key of `task.facts` with the answer to beat; where it is absent, `task.answer` is.
        reference: show the judge the task's accepted answers.
        cases: gold answers and near misses.
        guard: an answer that says nothing loses to one that says something, without asking.
        name: the grader's name.
    """

    waits = True

    def __init__(
        self,
        judge: JudgeModel,
        criteria: str = BETTER,
        *,
        swap: bool = True,
        ties: bool = True,
        opponent: str = "opponent",
        reference: bool = False,
        cases: Sequence[GradeCase] = (),
        guard: bool = True,
        name: str = "judge",
    ) -> None:
        self.name, self.judge = name, judge
        self._criteria, self._swap, self._ties, self._guard = criteria, swap, ties, guard
        self._opponent, self._reference = opponent, reference
        self._cases = tuple(cases)
        check_criteria(name, criteria)
        if not opponent:
            raise ConfigError(f"grader {name!r}: opponent must name a key of task.facts")

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take; both orders are asked at once."""
        return self.judge.deadline_s + 1.0

    async def compare(self, task: Task, a: str, b: str, *, id: str = "") -> PairVerdict:
        """Which of two answers is better; a judge that fails is a verdict with an error.

        Args:
            task: the prompt.
            a: one answer.
            b: the other one.
            id: names the pair where only one order is asked; the judge does not see it.
        """
        empty = {"a": says_nothing(a), "b": says_nothing(b)}
        if self._guard and any(empty.values()):
            winner: Winner = "tie" if all(empty.values()) else ("b" if empty["a"] else "a")
            return PairVerdict(winner=winner, in_order=winner, swapped=winner, rationale="an answer says nothing")
        first = generator(0, "order", id or task.id, a, b).random() < 0.5
        orders = (False, True) if self._swap else ((False,) if first else (True,))
        asked = await asyncio.gather(*(self._ask(task, a, b, swapped) for swapped in orders))
        cost = sum(found[2] for found in asked)
        errors = [found[3] for found in asked if found[3] is not None]
        if errors:
            return PairVerdict(winner=None, error=errors[0], cost=cost)
        said = {swapped: found[0] for swapped, found in zip(orders, asked, strict=True)}
        votes = set(said.values())
        winner = next(iter(votes)) if len(votes) == 1 else "tie"
        return PairVerdict(
            winner=winner,
            in_order=said.get(False),
            swapped=said.get(True),
            rationale="\n".join(found[1] for found in asked if found[1]),
            cost=cost,
        )

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Compare with the task's opponent; raises GradeError where there is none."""
        started_s = time.perf_counter()
        task = trajectory.task
        opponent = task.facts.get(self._opponent, task.answer)
        if not isinstance(opponent, str):
            raise GradeError(f"task {task.id!r}: no answer to compare with: set facts[{self._opponent!r}] or answer")
        verdict = await self.compare(task, answer_text(trajectory), opponent, id=trajectory.id)
        seconds = time.perf_counter() - started_s
        if verdict.winner is None:
            return Grade(score=None, grader=self.name, error=verdict.error, cost=verdict.cost, seconds=seconds)
        return Grade(
            score={"a": 1.0, "tie": 0.5, "b": 0.0}[verdict.winner],
            grader=self.name,
            parts={"flipped": float(verdict.flipped)} if self._swap else {},
            rationale=verdict.rationale,
            seconds=seconds,
            cost=verdict.cost,
        )

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given, or those of the built-in criteria, and answers without content."""
        own = self._cases
        if not own and self._criteria == BETTER:
            same = "The capital of France is Lyon."
            own = (
                GradeCase(task=_CAPITAL, text="The capital of France is Paris.", low=1.0, high=1.0),
                GradeCase(task=_CAPITAL, text=same, low=0.0, high=0.5, why="no better than its opponent"),
            )
        return (*own, *key_cases(own[0].task, high=0.5)) if own else ()

    async def _ask(self, task: Task, a: str, b: str, swapped: bool) -> tuple[Winner, str, float, str | None]:
        """One order: winner, rationale, cost, error."""
        shown = {"answer A": b, "answer B": a} if swapped else {"answer A": a, "answer B": b}
        choices = "A, B or tie" if self._ties else "A or B"
        messages = judge_messages(
            self._criteria,
            question_parts(task, reference=self._reference) | shown,
            f'Which answer is better? Reply with JSON: {{"rationale": "…", "better": {choices}}}',
        )
        try:
            answer = await self.judge.ask(messages, Preferred)
        except JudgeFailed as failure:
            return "tie", "", failure.cost, str(failure)
        if answer.verdict.better == "tie" and not self._ties:
            return "tie", "", answer.cost, f"judge {self.judge.model!r}: said tie where none is allowed"
        winner: Winner = "a" if answer.verdict.better == "A" else "b" if answer.verdict.better == "B" else "tie"
        return _MIRRORED[winner] if swapped else winner, answer.verdict.rationale, answer.cost, None
