"""Typed rows to tasks, and text to conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from posttrain.core import DataError, Message, Task, content_hash, system
from posttrain.data.content import as_completion_messages, as_prompt_messages
from posttrain.data.questions import final_answer
from posttrain.data.rows import CompletionRow, Content, LabelRow, PreferenceRow, PromptRow, StepsRow, TextRow, TypedRow

R = TypeVar("R", PromptRow, CompletionRow, PreferenceRow, LabelRow, StepsRow)


def to_task(row: TypedRow, *, tags: Sequence[str] = (), cluster: str | None = None, chat: bool = False) -> Task:
    """A row as a task for rollouts and evaluation.

    A reference answer with a GSM8K line `#### 42` becomes "42", and the full solution goes to `facts["solution"]`.

    Args:
        row: anything with a prompt. Of a completion row, what follows the prompt is the reference answer.
        tags: names of facts whose values become tags ("subject", "level" → "subject:Algebra", "level:5").
        cluster: name of the fact that tasks of one cluster share; "passage" by default, where the row has one.
        chat: make a text prompt a user's turn.

    Raises:
        DataError: a text row, which has no prompt, or a fact that the row does not have.
    """
    if isinstance(row, TextRow):
        raise DataError(f"{row.id}: plain text has no prompt to make a task of")
    prompt = as_prompt_messages(row.prompt) if chat else row.prompt
    answer, facts = _answer(row)
    missing = [name for name in (*tags, *([cluster] if cluster else [])) if name not in facts]
    if missing:
        raise DataError(f"{row.id}: no fact {missing[0]!r}; there are {', '.join(facts) or 'none'}")
    shared = facts.get(cluster or "passage")
    return Task(
        id=row.id,
        prompt=prompt,
        answer=answer,
        facts=facts,
        tools=() if isinstance(row, StepsRow) else row.tools,
        tags=tuple(f"{name}:{facts[name]}" for name in tags),
        cluster=None if shared in (None, "") else content_hash(shared)[:16],
    )


def _answer(row: PromptRow | CompletionRow | PreferenceRow | LabelRow | StepsRow) -> tuple[str | None, dict[str, Any]]:
    facts: dict[str, Any] = dict(row.facts) if isinstance(row, PromptRow) else {}
    answer = row.answer if isinstance(row, PromptRow) else None
    if isinstance(row, CompletionRow):
        answer = row.completion if isinstance(row.completion, str) else row.completion[-1].content or None
    final = final_answer(answer) if answer is not None else None
    if final is not None:
        facts["solution"] = answer
        answer = final
    return answer, facts


def as_chat(row: R, *, system_prompt: str | None = None) -> R:
    """The row with text prompts as user's turns and text answers as assistant's turns; messages stay as they are.

    Args:
        row: a row with a prompt.
        system_prompt: put before the prompt, unless it has a system turn.
    """
    messages: tuple[Message, ...] = as_prompt_messages(row.prompt)
    if system_prompt is not None and messages[0].role != "system":
        messages = (system(system_prompt), *messages)
    changes: dict[str, Content] = {"prompt": messages}
    for field in ("completion", "chosen", "rejected"):
        if hasattr(row, field):
            changes[field] = as_completion_messages(getattr(row, field))
    return row.replace(**changes)
