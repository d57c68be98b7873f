"""The grader of instructions that a program can check: IFEval's 25 kinds and IFBench's 58.

Sources: Zhou et al., 2023 (arXiv 2311.07911), which defines strict and loose; Pyatkin et al., 2025 (arXiv 2507.02833).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import Grade, GradeCase, GradeError, Task, Trajectory, UsageError
from posttrain.grade.answer import answer_text
from posttrain.grade.instruction_cases import instruction_cases
from posttrain.grade.instruction_forms import FORMS
from posttrain.grade.instruction_ifbench import COUNTING
from posttrain.grade.instruction_ifeval import IFEVAL
from posttrain.grade.instruction_text import Check, Tools

INSTRUCTION_KINDS: dict[str, tuple[Check, tuple[str, ...]]] = {**IFEVAL, **COUNTING, **FORMS}


class Instructions:
    """1 where the answer follows all of the task's instructions, else 0.

    The task's facts: `instructions`, a list of kinds such as `keywords:existence`, and `options`, a list of as many
    mappings with each kind's arguments, both named as in the data sets; see `instruction_task`. An instruction that
    is not known, lacks an argument or needs a package that is not installed raises: it is never counted as broken.

    Parts: `followed`, the share of instructions that the answer follows, and `<kind>` for each.

    Args:
        loose: also accept the answer without its first line, its last line, both, or without asterisks. An empty
            answer follows nothing.
        partial: whether the score is the share of instructions followed.
        tools: what the checks ask about English and other languages.
        name: the grader's name.
    """

    def __init__(
        self, *, loose: bool = False, partial: bool = False, tools: Tools | None = None, name: str = "instructions"
    ) -> None:
        self.name = name
        self._loose = loose
        self._partial = partial
        self._tools = tools or Tools()

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Check each instruction; raises GradeError or UsageError where one cannot be checked."""
        started_s = time.perf_counter()
        task = trajectory.task
        wanted = _wanted(task)
        texts = loose_forms(answer_text(trajectory)) if self._loose else [answer_text(trajectory)]
        followed: list[bool] = []
        parts: dict[str, float] = {}
        for kind, options in wanted:
            check, _ = INSTRUCTION_KINDS[kind]
            try:
                holds = any(text.strip() and check(text, options, self._tools) for text in texts)
            except UsageError:
                raise
            except (ValueError, TypeError, LookupError, AttributeError, re.error) as error:
                raise GradeError(f"task {task.id!r}: {kind} with {options}: {type(error).__name__}: {error}") from error
            followed.append(holds)
            parts[kind] = min(parts.get(kind, 1.0), float(holds))
        share = sum(followed) / len(followed)
        broken = [kind for (kind, _), holds in zip(wanted, followed, strict=True) if not holds]
        return Grade(
            score=share if self._partial else float(all(followed)),
            grader=self.name,
            parts={"followed": share, **parts},
            rationale=f"not followed: {', '.join(broken)}" if broken else "",
            seconds=time.perf_counter() - started_s,
        )

    def cases(self) -> Sequence[GradeCase]:
        """For each kind an answer that follows it and one that nearly does; those that need no package."""
        found = [
            GradeCase(
                task=Task(id=kind, prompt="?", facts={"instructions": [kind], "options": [options]}),
                text=text,
                low=float(holds),
                high=float(holds),
                why=kind,
            )
            for kind, options, text, holds in instruction_cases(loose=self._loose)
        ]
        two = Task(
            id="two",
            prompt="?",
            facts={"instructions": ["punctuation:no_comma", "startend:quotation"], "options": [{}, {}]},
        )
        half = 0.5 if self._partial else 0.0
        return (
            *found,
            GradeCase(task=two, text="no comma, no", low=0, high=0),
            GradeCase(task=two, text="a", low=half, high=half),
        )


def loose_forms(text: str) -> list[str]:
    """The answer, and it without first line, last line, both; each also without asterisks."""
    lines = text.split("\n")
    forms = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [*forms, *(form.replace("*", "") for form in forms)]


def instruction_task(row: Mapping[str, Any]) -> Task:
    """A task for `Instructions` from a row of IFEval or IFBench (key, prompt, instruction_id_list, kwargs).

    Raises:
        GradeError: an instruction is not known or lacks an argument.
    """
    facts = {
        "instructions": list(row["instruction_id_list"]),
        "options": [{name: value for name, value in given.items() if value is not None} for given in row["kwargs"]],
    }
    task = Task(id=str(row["key"]), prompt=row["prompt"], facts=facts, tags=tuple(facts["instructions"]))
    _wanted(task)
    return task


def _wanted(task: Task) -> list[tuple[str, dict[str, Any]]]:
    kinds = task.facts.get("instructions")
    if not isinstance(kinds, list | tuple) or not kinds:
        raise GradeError(f"task {task.id!r}: facts['instructions'] must be a list of kinds, not {kinds!r}")
    given = task.facts.get("options") or [{}] * len(kinds)
    if len(given) != len(kinds):
        raise GradeError(f"task {task.id!r}: {len(kinds)} instructions and {len(given)} options")
    wanted: list[tuple[str, dict[str, Any]]] = []
    for kind, options in zip(kinds, given, strict=True):
        if kind not in INSTRUCTION_KINDS:
            raise GradeError(f"task {task.id!r}: no instruction {kind!r} is known; see grade.INSTRUCTION_KINDS")
        _, fields = INSTRUCTION_KINDS[kind]
        present = {name: value for name, value in options.items() if value is not None}
        if missing := [field for field in fields if field not in present]:
            raise GradeError(f"task {task.id!r}: {kind} needs {', '.join(missing)}")
        if surplus := sorted(present.keys() - set(fields)):
            raise GradeError(
                f"task {task.id!r}: {kind} takes {', '.join(fields) or 'nothing'}, not {', '.join(surplus)}"
            )
        wanted.append((kind, {name: _whole(value) for name, value in present.items()}))
    return wanted


def _whole(value: Any) -> Any:
    """Data frames turn whole numbers to floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
