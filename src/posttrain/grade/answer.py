"""What a grader reads: the answer in a trajectory, the accepted answers in a task, and cases made from plain text."""

from __future__ import annotations

import time
import unicodedata
from typing import Any

from posttrain.core import Grade, GradeCase, GradeError, StopReason, Task, Trajectory

_SURROUNDINGS = " \t\n\r.,;:!?\"'`*“”‘’"
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


def answer_text(trajectory: Trajectory) -> str:
    """What the policy answered: its text after the last `</think>`.

    A text that opens `<think>` and never closes it was cut short while reasoning and holds no answer: "".
    """
    text = trajectory.text
    head, closed, tail = text.rpartition(_THINK_CLOSE)
    if closed:
        return tail
    return text.partition(_THINK_OPEN)[0] if _THINK_OPEN in head + tail else text


def accepted_answers(task: Task) -> tuple[str, ...]:
    """Every answer that counts as right: `task.answer` first, then those in `task.facts["answers"]`.

    Raises:
        GradeError: the task has neither, or `facts["answers"]` is not a list of texts.
    """
    more: Any = task.facts.get("answers", ())
    if isinstance(more, str) or not all(isinstance(answer, str) for answer in more):
        raise GradeError(f"task {task.id!r}: facts['answers'] must be a list of texts, not {more!r}")
    answers = tuple(dict.fromkeys([*([] if task.answer is None else [task.answer]), *more]))
    if not answers:
        raise GradeError(f"task {task.id!r} has no answer to grade against: set Task.answer or facts['answers']")
    return answers


def normalised(text: str) -> str:
    """Unicode NFKC, lower case, white space as single blanks, no quotes or punctuation around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_SURROUNDINGS)


def trajectory_from_text(task: Task, text: str, *, id: str = "", group: str = "") -> Trajectory:
    """A trajectory whose answer is `text`, for proofs, tests and grading of answers that were not sampled here.

    Its tokens stand for white-space separated words, one each, with logprob 0: there was no tokenizer.
    """
    num_words = len(text.split())
    return Trajectory(
        id=id or task.id,
        task=task,
        tokens=tuple(range(num_words + 1)),
        mask=(False,) + (True,) * num_words,
        logprobs=(0.0,) * (num_words + 1),
        policy_logprobs=(0.0,) * (num_words + 1),
        text=text,
        stop_reason=StopReason.EOS,
        group=group or task.id,
    )


def right(task: Task, text: str, why: str = "") -> GradeCase:
    """A case that must score 1."""
    return GradeCase(task=task, text=text, low=1.0, high=1.0, why=why)


def wrong(task: Task, text: str, why: str = "") -> GradeCase:
    """A case that must score 0: a near miss."""
    return GradeCase(task=task, text=text, low=0.0, high=0.0, why=why)


def binary(grader: str, correct: bool, started_s: float, rationale: str = "", **parts: float) -> Grade:
    """A grade of 1 or 0; `started_s` is the `time.perf_counter()` at which grading began."""
    seconds = time.perf_counter() - started_s
    return Grade(score=float(correct), grader=grader, parts=parts, rationale=rationale, seconds=seconds)
