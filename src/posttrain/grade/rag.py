"""The triple of retrieval-augmented answers: faithful to the context, from relevant context, to the point."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import answer_text, right
from posttrain.grade.judge import judged, nothing_said
from posttrain.grade.judge_model import JudgeModel
from posttrain.grade.judge_prompt import judge_messages, key_cases, question_parts, says_nothing
from posttrain.grade.judge_reply import ReplyUnreadable, read_reply, reply_schema

_TASK = Task(
    id="tower",
    prompt="How tall is the tower, and when was it built?",
    facts={"context": ["The tower is 90 m tall.", "It was built in 1902."]},
)
RagPart = Literal["faithfulness", "context_relevance", "answer_relevance"]
PARTS: tuple[RagPart, ...] = ("faithfulness", "context_relevance", "answer_relevance")


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A statement of the answer and whether the context supports it."""

    claim: str
    supported: bool


class Faithful(msgspec.Struct, frozen=True, kw_only=True):
    """Every claim of an answer."""

    rationale: str
    claims: list[Claim]


class PassageVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One passage's number and whether it helps to answer."""

    passage: int
    relevant: bool


class Relevant(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict on every passage."""

    rationale: str
    passages: list[PassageVerdict]


class Addressed(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the question an answer answers."""

    rationale: str
    rating: Literal[1, 2, 3, 4, 5]


class RagJudge:
    """Judges an answer given with retrieved passages, `task.facts["context"]` (a list of texts).

    Three questions, asked at once, each a part from 0 to 1 (after RAGAS, arXiv 2309.15217, section 3):
    `faithfulness`, the share of the answer's claims that the passages support (an answer that claims nothing has
    nothing supported: 0); `context_relevance`, the share of passages that help to answer; `answer_relevance`, how much
    of the question the answer answers.

    Args:
        judge: who judges.
        parts: which of the three to ask for. Context relevance judges the retriever, not the policy: a reward for the
            policy is better without it.
        combine: "mean" or "weakest".
        cases: gold answers and near misses.
        guard: an answer that says nothing scores 0 without asking.
        name: the grader's name.
    """

    waits = True

    def __init__(
        self,
        judge: JudgeModel,
        *,
        parts: Sequence[RagPart] = PARTS,
        combine: Literal["mean", "weakest"] = "mean",
        cases: Sequence[GradeCase] = (),
        guard: bool = True,
        name: str = "rag",
    ) -> None:
        self.name, self.judge = name, judge
        self._parts, self._combine, self._guard = tuple(dict.fromkeys(parts)), combine, guard
        self._cases = tuple(cases)
        if not self._parts or not set(self._parts) <= set(PARTS):
            raise ConfigError(f"grader {name!r}: parts are some of {', '.join(PARTS)}, not {tuple(parts)}")

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take; the questions are asked at once."""
        return self.judge.deadline_s + 1.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Ask; raises GradeError where the task has no passages."""
        started_s = time.perf_counter()
        task, text = trajectory.task, answer_text(trajectory)
        passages = passages_of(task)
        if self._guard and says_nothing(text):
            return nothing_said(self.name)
        ask = {
            "faithfulness": lambda: self._faithfulness(task, passages, text),
            "context_relevance": lambda: self._context_relevance(task, passages),
            "answer_relevance": lambda: self._answer_relevance(task, text),
        }
        grades = await asyncio.gather(*(ask[part]() for part in self._parts))
        cost, seconds = sum(grade.cost for grade in grades), time.perf_counter() - started_s
        errors = [f"{grade.grader}: {grade.error}" for grade in grades if grade.score is None]
        scores = {grade.grader: grade.score for grade in grades if grade.score is not None}
        if errors:
            error = "; ".join(errors)
            return Grade(score=None, grader=self.name, parts=scores, error=error, cost=cost, seconds=seconds)
        score = min(scores.values()) if self._combine == "weakest" else sum(scores.values()) / len(scores)
        rationale = "\n".join(f"{grade.grader}: {grade.rationale}" for grade in grades if grade.rationale)
        return Grade(score=score, grader=self.name, parts=scores, rationale=rationale, cost=cost, seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given, or those of a small example, and answers without content."""
        own = self._cases or (
            right(_TASK, "It is 90 m tall. It was built in 1902."),
            GradeCase(task=_TASK, text="It is 120 m tall. It was built in 1850.", low=0.0, high=0.7, why="made up"),
        )
        return (*own, *key_cases(own[0].task, high=0.7))

    async def _faithfulness(self, task: Task, passages: Sequence[str], text: str) -> Grade:
        messages = judge_messages(
            "Split the answer into its single factual claims. A claim is supported if the passages alone entail it; "
            "what you know besides does not count.",
            {**question_parts(task, reference=False), **_numbered(passages), "answer": text},
            'List every claim. Reply with JSON: {"rationale": "…", "claims": [{"claim": "…", "supported": true}, …]}',
        )

        def score(found: Faithful) -> tuple[float, dict[str, float], str]:
            supported = sum(claim.supported for claim in found.claims)
            missing = [claim.claim for claim in found.claims if not claim.supported]
            note = f" Not supported: {'; '.join(missing)}" if missing else ""
            return supported / len(found.claims) if found.claims else 0.0, {}, found.rationale + note

        return await judged("faithfulness", self.judge.ask(messages, Faithful), score)

    async def _context_relevance(self, task: Task, passages: Sequence[str]) -> Grade:
        messages = judge_messages(
            "A passage is relevant if it holds something that is needed to answer the question.",
            {**question_parts(task, reference=False), **_numbered(passages)},
            'Reply with JSON: {"rationale": "…", "passages": [{"passage": 1, "relevant": true or false}, …]} with all '
            f"{len(passages)} passages.",
        )

        def read(reply: str) -> Relevant:
            found = read_reply(reply, Relevant)
            numbers = sorted(verdict.passage for verdict in found.passages)
            if numbers != list(range(1, len(passages) + 1)):
                raise ReplyUnreadable(f"the reply judges passages {numbers}, not each of 1 to {len(passages)} once")
            return found

        def score(found: Relevant) -> tuple[float, dict[str, float], str]:
            return sum(verdict.relevant for verdict in found.passages) / len(passages), {}, found.rationale

        asking = self.judge.ask_text(messages, read, schema=reply_schema(Relevant))
        return await judged("context_relevance", asking, score)

    async def _answer_relevance(self, task: Task, text: str) -> Grade:
        messages = judge_messages(
            "Rate how far the answer answers what was asked, whether or not it is true: 1 not at all, 3 in part, 5 in "
            "full and without anything that was not asked for.",
            {**question_parts(task, reference=False), "answer": text},
            'Reply with JSON: {"rationale": "…", "rating": 1 … 5}',
        )
        return await judged(
            "answer_relevance",
            self.judge.ask(messages, Addressed),
            lambda found: ((found.rating - 1) / 4, {}, found.rationale),
        )


def passages_of(task: Task) -> tuple[str, ...]:
    """The passages in `task.facts["context"]`; raises GradeError where there are none."""
    given: Any = task.facts.get("context")
    passages = (given,) if isinstance(given, str) else tuple(given or ())
    if not passages or not all(isinstance(passage, str) and passage.strip() for passage in passages):
        raise GradeError(f"task {task.id!r}: facts['context'] must be a list of passages that are not empty")
    return passages


def _numbered(passages: Sequence[str]) -> dict[str, str]:
    return {f"passage {number}": text for number, text in enumerate(passages, 1)}
