"""The rule rewards of R1-Zero: is the answer right, and does the text have the form it was asked for.

DeepSeek-R1 (https://arxiv.org/abs/2501.12948), section 2.2.2: reasoning between `<think>` and `</think>`, then the
answer between `<answer>` and `</answer>`; both rewards count the same, and no model judges.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from posttrain.core import Grade, GradeCase, Grader, Task, Trajectory, system, user
from posttrain.grade import Weighted, right, wrong

Asking = Literal["instructed", "chat", "plain"]

INSTRUCTION = (
    "The Assistant solves the User's problem. First it reasons, between <think> and </think>; then it gives the "
    "answer, between <answer> and </answer>: <think> the reasoning </think> <answer> the answer </answer>."
)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_CASE = Task(id="sum", prompt="2 + 2?", answer="4")


def asked(task: Task, how: Asking) -> Task:
    """The task as the policy reads it.

    Args:
        task: whose prompt is the question alone.
        how: instructed (a conversation in plain text, for a base model; our wording of the paper's table 1), chat (the
            instruction as a system turn of the model's template), or plain (as it stands).
    """
    if how == "plain":
        return task
    if how == "chat" or not isinstance(task.prompt, str):
        turns = (user(task.prompt),) if isinstance(task.prompt, str) else task.prompt
        return task.replace(prompt=(system(INSTRUCTION), *turns))
    return task.replace(prompt=f"{INSTRUCTION}\nUser: {task.prompt}\nAssistant:")


class RightForm:
    """1 where the whole text is reasoning between its tags and an answer between its own, each tag once; else 0."""

    name = "format"

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Look at the form alone."""
        text = trajectory.text
        once = all(text.count(tag) == 1 for tag in _TAGS)
        return Grade(score=float(once and _FORM.fullmatch(text) is not None), grader=self.name)

    def cases(self) -> Sequence[GradeCase]:
        """Right forms and near misses."""
        return (
            right(_CASE, "<think>two and two</think> <answer>4</answer>"),
            right(_CASE, "<think></think>\n<answer>5</answer>\n", "form alone"),
            wrong(_CASE, "4", "no tags"),
            wrong(_CASE, "<think>two and two</think> 4", "no answer"),
            wrong(_CASE, "<answer>4</answer><think>two and two</think>", "the wrong way round"),
            wrong(_CASE, "So <think>two</think><answer>4</answer>", "words outside"),
            wrong(_CASE, "<think>a</think><answer>3</answer><answer>4</answer>", "two answers"),
        )


class TaggedAnswer:
    """What another grader says of the text in the last `<answer>…</answer>`.

    Args:
        grader: judges the answer.
        strict: text without tags scores 0, as a reward; else the grader sees it whole, which is fair to models that
            were never taught the form.
    """

    def __init__(self, grader: Grader, *, strict: bool = True) -> None:
        self.grader, self.strict = grader, strict
        self.name = "accuracy" if strict else f"accuracy of {grader.name}"

    @property
    def graders(self) -> tuple[Grader, ...]:
        """The grader that judges the answer."""
        return (self.grader,)

    @property
    def max_concurrency(self) -> int | None:
        """The grader's own limit."""
        limit: int | None = getattr(self.grader, "max_concurrency", None)
        return limit

    @property
    def deadline_s(self) -> float:
        """The grader's own, or 10 seconds."""
        return float(getattr(self.grader, "deadline_s", 10.0))

    async def prepare(self) -> None:
        """Prepare the grader if it wants to be."""
        if hasattr(self.grader, "prepare"):
            await self.grader.prepare()

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Find the answer, and have it judged."""
        found = _ANSWER.findall(trajectory.text)
        if not found and self.strict:
            return Grade(score=0.0, grader=self.name, rationale="no <answer>…</answer>")
        text = found[-1].strip() if found else trajectory.text
        grade = await self.grader.grade(trajectory.replace(text=text))
        return grade.replace(grader=self.name)

    def cases(self) -> Sequence[GradeCase]:
        """None of its own: what is right is the grader's affair, which proves itself."""
        return ()


def rule_rewards(grader: Grader) -> Weighted:
    """Accuracy and form with the same weight: 2 is a right answer in the right form."""
    return Weighted({TaggedAnswer(grader): 1.0, RightForm(): 1.0}, name="rules")
