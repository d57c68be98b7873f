"""Rubrics written by a model: once and frozen, or revised as the answers get better."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from posttrain.core import DataError, Task, read_jsonl
from posttrain.grade.judge_model import JudgeModel
from posttrain.grade.judge_prompt import judge_messages, question_parts
from posttrain.grade.rubric import MAX_ITEMS, Rubric, RubricItem, check_items

_FORM = 'Reply with JSON: {"rationale": "…", "items": [{"criterion": "…", "weight": 5}, …]}'


class WrittenItem(msgspec.Struct, frozen=True, kw_only=True):
    """A criterion that a model proposes."""

    criterion: Annotated[str, msgspec.Meta(min_length=4)]
    weight: Annotated[float, msgspec.Meta(ge=-10, le=10)]


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A model's checklist."""

    rationale: str
    items: list[WrittenItem]


class RubricBook(Mapping[str, Rubric]):
    """The newest rubric of each task, in a JSONL file that only grows; every version stays readable.

    Give it to `RubricJudge(judge, book)`. What is read back is checked: each line against its digest, each version
    against its parent's.

    Args:
        path: the file; made, with its folder, if absent.

    Raises:
        DataError: a line is no rubric, was changed after it was frozen, or does not follow the version before.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._newest: dict[str, Rubric] = {}
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for number, rubric in enumerate(read_jsonl(self.path, Rubric) if self.path.exists() else [], 1):
            self._follow(rubric, f"{self.path}:{number}")

    def __getitem__(self, task_id: str) -> Rubric:
        return self._newest[task_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._newest)

    def __len__(self) -> int:
        return len(self._newest)

    def freeze(self, task: Task, items: Sequence[RubricItem], *, author: str = "person") -> Rubric:
        """Make items the task's rubric from now on, as its next version; equal items change nothing.

        Raises:
            ConfigError: they are no checklist.
        """
        check_items(items, f"rubric of task {task.id!r}")
        with self._lock:
            before = self._newest.get(task.id)
            if before is not None and before.items == tuple(items):
                return before
            rubric = Rubric(
                task_id=task.id,
                items=tuple(items),
                author=author,
                version=1 if before is None else before.version + 1,
                parent="" if before is None else before.digest,
            ).sealed()
            with self.path.open("ab") as lines:
                lines.write(rubric.to_json() + b"\n")
            self._newest[task.id] = rubric
            return rubric

    def _follow(self, rubric: Rubric, where: str) -> None:
        rubric.check(where)
        before = self._newest.get(rubric.task_id)
        if rubric.parent != ("" if before is None else before.digest):
            raise DataError(f"{where}: version {rubric.version} does not follow the one before; a line is missing")
        self._newest[rubric.task_id] = rubric


async def write_rubric(judge: JudgeModel, task: Task, book: RubricBook, *, num_items: int = 7) -> Rubric:
    """Have a model write a task's checklist, once: where the book has one already, that one is given back.

    Args:
        judge: the model that writes.
        task: the prompt; its accepted answers are shown where it has any, so that criteria are specific.
        book: where the rubric is frozen.
        num_items: how many criteria, at most.

    Raises:
        JudgeFailed: the model wrote none.
        ConfigError: what it wrote is no checklist.
    """
    if task.id in book:
        return book[task.id]
    known = task.answer is not None or bool(task.facts.get("answers"))
    messages = judge_messages(
        "Write a checklist by which somebody who does not know the subject can judge any answer to the question. Each "
        "criterion is one short statement about the answer that is plainly true or false of it, specific to this "
        "question, and independent of the others. Weights are 1 to 10 by importance; a typical fault gets a weight "
        "below 0. Nothing about style, length or tone unless the question asks for it.",
        question_parts(task, reference=known),
        f"At most {num_items} criteria. {_FORM}",
    )
    answer = await judge.ask(messages, Written)
    return book.freeze(task, _items(answer.verdict.items[:num_items]), author=judge.model or "model")


async def evolve_rubric(
    judge: JudgeModel,
    task: Task,
    answers: Sequence[str],
    book: RubricBook,
    *,
    met: Mapping[str, Sequence[bool]] | None = None,
    num_new: int = 2,
    max_items: int = 12,
) -> Rubric:
    """Revise a checklist by what the policy writes now, so that it tells good answers from poor ones again.

    A model sees some answers and adds criteria that separate them (evolving rubrics, arXiv 2511.19399). A
    criterion that all answers meet, or none, teaches nothing any more: such go first where the list gets longer than
    `max_items`.

    Args:
        judge: the model that writes.
        task: the prompt, with a rubric in the book.
        answers: two or more answers of the policy.
        book: where the next version is frozen.
        met: by criterion, whether each answer met it, from the parts of their grades.
        num_new: criteria added, at most.
        max_items: criteria kept, at most.

    Raises:
        DataError: the book has no rubric of the task.
        JudgeFailed: the model wrote nothing.
    """
    if task.id not in book:
        raise DataError(f"{book.path}: no rubric of task {task.id!r} to revise; write one first")
    before = book[task.id]
    shown = {f"answer {number}": text for number, text in enumerate(answers, 1)}
    listed = "\n".join(f"- {item.criterion} ({item.weight:g})" for item in before.items)
    messages = judge_messages(
        "A checklist for a question no longer tells its answers apart well enough. Add criteria that some of the "
        "answers shown meet and others do not, and that make an answer truly better or worse. Reward nothing that "
        "only looks good (praise of itself, padding, an appeal to the judge); name it as a fault instead.",
        question_parts(task, reference=False) | {"checklist": listed} | shown,
        f"At most {num_new} new criteria, none that is on the list. {_FORM}",
    )
    answer = await judge.ask(messages, Written)
    old = {item.criterion.strip().casefold() for item in before.items}
    new = [item for item in _items(answer.verdict.items[:num_new]) if item.criterion.strip().casefold() not in old]
    verdicts = met or {}
    spent = [item for item in before.items if len(set(verdicts.get(item.criterion, (True, False)))) == 1]
    items = [*before.items, *new]
    for item in spent:
        if len(items) > min(max_items, MAX_ITEMS) and sum(other.weight > 0 for other in items if other != item):
            items.remove(item)
    return book.freeze(task, items[: min(max_items, MAX_ITEMS)], author=judge.model or "model")


def _items(written: Sequence[WrittenItem]) -> list[RubricItem]:
    kept = {
        item.criterion.strip(): RubricItem(criterion=item.criterion.strip(), weight=item.weight) for item in written
    }
    return [item for item in kept.values() if item.weight]
