"""Rubrics: a checklist for each prompt, with weights, judged item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from posttrain.core import ConfigError, DataError, Grade, GradeCase, GradeError, Record, Task, Trajectory, content_hash
from posttrain.grade.answer import answer_text
from posttrain.grade.judge import judged, nothing_said
from posttrain.grade.judge_model import JudgeModel
from posttrain.grade.judge_prompt import judge_messages, key_cases, question_parts, says_nothing
from posttrain.grade.judge_reply import ReplyUnreadable, read_reply, reply_schema

MAX_ITEMS = 50
_TASK = Task(
    id="tea",
    prompt="How do I make tea?",
    facts={
        "rubric": [
            {"criterion": "says to boil water", "weight": 2},
            {"criterion": "says to take the leaves out"},
            {"criterion": "recommends a brand", "weight": -1},
        ]
    },
)


class RubricItem(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that an answer does or does not do."""

    criterion: str
    weight: float = 1.0  # below 0: doing it is a fault


class Rubric(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="rubric/1"):
    """A checklist, frozen: `digest` is the hash of its items, and of its parent's where it was revised."""

    task_id: str
    items: tuple[RubricItem, ...]
    author: str = "person"  # or the name of the model that wrote it
    version: int = 1
    parent: str = ""  # digest of the version before
    digest: str = ""

    def sealed(self) -> Rubric:
        """The rubric with its digest."""
        return self.replace(digest=self._digest())

    def check(self, where: str = "") -> None:
        """Raise DataError where the items are not those that the digest was made of, or are no checklist."""
        if self.digest != self._digest():
            raise DataError(f"{where or self.task_id}: the rubric was changed after it was frozen (digest differs)")
        check_items(self.items, where or f"rubric of task {self.task_id!r}")

    def _digest(self) -> str:
        return content_hash(self.replace(digest=""))[:32]


class ItemVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One item's number and whether the answer does it."""

    item: int
    met: bool


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict on every item."""

    rationale: str
    items: list[ItemVerdict]


class RubricJudge:
    """The weighted share of a checklist that an answer meets: Σ wᵢ·metᵢ over the sum of positive weights, in [0, 1].

    (HealthBench's rule, arXiv 2505.08775, cut to [0, 1] for each answer.) Parts: `item_<n>` for each item, 1 where it
    is met, and `faults`, how many items of negative weight are.

    Args:
        judge: who judges.
        rubrics: by task id; a task that is not among them brings its own in `task.facts["rubric"]`: a list of texts, of
            {"criterion": …, "weight": …}, or a Rubric as a dict.
        reference: show the judge the task's accepted answers.
        cases: gold answers and near misses.
        guard: an answer that says nothing meets nothing, without asking.
        name: the grader's name.
    """

    waits = True

    def __init__(
        self,
        judge: JudgeModel,
        rubrics: Mapping[str, Rubric] | None = None,
        *,
        reference: bool = False,
        cases: Sequence[GradeCase] = (),
        guard: bool = True,
        name: str = "rubric",
    ) -> None:
        self.name, self.judge = name, judge
        self._rubrics = {} if rubrics is None else rubrics  # kept as it is: an evolving book changes under us
        self._reference, self._guard = reference, guard
        self._cases = tuple(cases)

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take."""
        return self.judge.deadline_s + 1.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Judge every item in one question; raises GradeError where the task has no rubric."""
        task = trajectory.task
        own = self._rubrics.get(task.id)
        items = own.items if own is not None else rubric_of(task).items
        text = answer_text(trajectory)
        if self._guard and says_nothing(text):
            return nothing_said(self.name)
        listed = "\n".join(f"{number}. {item.criterion}" for number, item in enumerate(items, 1))
        messages = judge_messages(
            "A checklist is given. Say for each of its items whether the answer does what the item says, to the letter "
            "and in full; an item may also name a fault. Judge every item by itself.",
            question_parts(task, reference=self._reference) | {"checklist": listed, "answer": text},
            f'Reply with JSON: {{"rationale": "…", "items": [{{"item": 1, "met": true or false}}, …]}} with all '
            f"{len(items)} items.",
        )

        def read(reply: str) -> Checked:
            checked = read_reply(reply, Checked)
            numbers = sorted(verdict.item for verdict in checked.items)
            if numbers != list(range(1, len(items) + 1)):
                raise ReplyUnreadable(f"the reply judges items {numbers}, not each of 1 to {len(items)} once")
            return checked

        asking = self.judge.ask_text(messages, read, schema=reply_schema(Checked))
        return await judged(self.name, asking, lambda checked: _score(items, checked))

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given, or a small checklist's, and answers without content."""
        full = "Boil water, pour it over the leaves, and take the leaves out after three minutes."
        own = self._cases or (
            GradeCase(task=_TASK, text=full, low=1.0, high=1.0),
            GradeCase(
                task=_TASK, text="Boil water and pour it over the leaves.", low=0.66, high=0.67, why="one is missing"
            ),
            GradeCase(task=_TASK, text=f"{full} I recommend a brand: Acme.", low=0.6, high=0.7, why="a fault"),
        )
        return (*own, *key_cases(own[0].task))


def _score(items: Sequence[RubricItem], checked: Checked) -> tuple[float, dict[str, float], str]:
    met = {verdict.item - 1: verdict.met for verdict in checked.items}
    earned = sum(item.weight for place, item in enumerate(items) if met[place])
    best = sum(item.weight for item in items if item.weight > 0)
    parts = {f"item_{place + 1}": float(met[place]) for place in range(len(items))}
    parts["faults"] = float(sum(met[place] for place, item in enumerate(items) if item.weight < 0))
    return min(1.0, max(0.0, earned / best)), parts, checked.rationale


def rubric_of(task: Task) -> Rubric:
    """The rubric in `task.facts["rubric"]`.

    Raises:
        GradeError: there is none, or it is no checklist.
    """
    given: Any = task.facts.get("rubric")
    where = f"task {task.id!r}: facts['rubric']"
    if given is None:
        raise GradeError(f"{where} is not set; give a list of criteria, or write one with write_rubric")
    try:
        if isinstance(given, dict):
            rubric = Rubric.from_dict(given, where)
            rubric.check(where)
            return rubric
        plain = [{"criterion": item} if isinstance(item, str) else item for item in given]
        rubric = Rubric(task_id=task.id, items=tuple(RubricItem.from_dict(item, where) for item in plain))
        check_items(rubric.items, where)
    except (DataError, ConfigError, TypeError) as error:
        raise GradeError(str(error)) from error
    return rubric.sealed()


def check_items(items: Sequence[RubricItem], where: str) -> None:
    """Raise ConfigError where items are no checklist: none, too many, empty, twice, or none of positive weight."""
    texts = [item.criterion.strip() for item in items]
    if not 1 <= len(items) <= MAX_ITEMS or not all(texts):
        raise ConfigError(f"{where}: needs 1 to {MAX_ITEMS} criteria that are not empty, not {len(items)}")
    if len(set(texts)) < len(texts):
        raise ConfigError(f"{where}: a criterion stands there twice")
    if not any(item.weight > 0 for item in items):
        raise ConfigError(f"{where}: at least one weight must be above 0, or no answer could score")
