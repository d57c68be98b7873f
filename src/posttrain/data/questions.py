"""Questions with reference answers, multiple choice, and instructions (Alpaca, self-instruct)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.core import Message, assistant, user
from posttrain.data.chat import parse_tools
from posttrain.data.content import optional_text, required, text, with_system
from posttrain.data.rows import CompletionRow, Content, Kind, PromptRow, RowFault, TypedRow

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FINAL_ANSWER = re.compile(r"^####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def final_answer(solution: str) -> str | None:
    """What stands after `####` in a GSM8K solution, without thousands separators; None where there is no such line."""
    found = FINAL_ANSWER.findall(solution)
    return re.sub(r"(?<=\d),(?=\d{3})", "", found[-1]) if found else None


def answer_of(value: object, field: str) -> tuple[str, dict[str, Any]]:
    """A reference answer as text, and the facts that its column holds besides.

    Args:
        value: text (after `####`, if it has that), a number, or a list of accepted answers, the main one
            first.
        field: named in faults.
    """
    if isinstance(value, list) and value:
        main, _ = answer_of(value[0], field)
        return main, {"answers": value}
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowFault(field, "is not an answer", f"it is {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    answer = str(value)
    if not answer.strip():
        raise RowFault(field, "is empty")
    final = final_answer(answer)
    return (answer, {}) if final is None else (final, {"solution": answer})


def rest(values: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The columns that are not used otherwise and not null, as facts for graders."""
    return {
        name: value for name, value in values.items() if name not in (*used, "tools", "system") and value is not None
    }


def question_rows(values: Mapping[str, Any], kind: Kind, row_id: str, columns: tuple[str, ...]) -> tuple[TypedRow, ...]:
    """A question and its answer; SVAMP's body and question are joined."""
    *asked, answered = columns
    question = with_system(" ".join(text(values, column).strip() for column in asked), values)
    if len(asked) == 1 and isinstance(question, str):
        question = text(values, asked[0])
    answer, facts = answer_of(required(values, answered), answered)
    tools = parse_tools(values.get("tools"))
    if kind == "completion":
        solution = optional_text(values, "solution") or facts.get("solution", answer)
        completion: Content = solution if isinstance(question, str) else (assistant(solution),)
        return (CompletionRow(id=row_id, prompt=question, completion=completion, tools=tools),)
    facts = {**rest(values, *columns), **facts}
    return (PromptRow(id=row_id, prompt=question, answer=answer, facts=facts, tools=tools),)


def choice_rows(values: Mapping[str, Any], row_id: str, columns: tuple[str, ...]) -> tuple[TypedRow, ...]:
    """Multiple choice: the facts `choices`, `gold` (index) and `letter`; the answer is the right choice's text."""
    asked, listed, marked = columns
    choices = required(values, listed)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise RowFault(listed, "is not a list of two or more texts")
    if all(choice.startswith(f"({letter})") for choice, letter in zip(choices, LETTERS, strict=False)):
        choices = [choice[3:].strip() for choice in choices]
    gold = _gold(required(values, marked), marked, len(choices))
    passage = optional_text(values, "passage").strip()
    question = text(values, asked)
    facts = {**rest(values, *columns), "choices": choices, "gold": gold, "letter": LETTERS[gold]}
    asked_text = f"{passage}\n\n{question}" if passage else question
    return (PromptRow(id=row_id, prompt=asked_text, answer=choices[gold], facts=facts),)


def _gold(value: object, field: str, num_choices: int) -> int:
    gold = LETTERS.find(value) if isinstance(value, str) and len(value) == 1 and value.isalpha() else value
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < min(num_choices, len(LETTERS)):
        raise RowFault(field, "is not one of the choices", f"{value!r} of {num_choices}")
    return gold


def instruction_rows(values: Mapping[str, Any], kind: Kind, row_id: str) -> tuple[TypedRow, ...]:
    """Alpaca's `instruction, input, output` (or `response`), or self-instruct's `instances`, as conversations."""
    instances = values.get("instances")
    if instances is None:
        return (_instruction_row(values, kind, row_id),)
    if not isinstance(instances, list) or not instances or not all(isinstance(item, Mapping) for item in instances):
        raise RowFault("instances", "is not a list of objects")
    ids = [row_id] if len(instances) == 1 else [f"{row_id}/{index}" for index in range(len(instances))]
    return tuple(_instruction_row({**values, **item}, kind, one) for item, one in zip(instances, ids, strict=True))


def _instruction_row(values: Mapping[str, Any], kind: Kind, row_id: str) -> TypedRow:
    output = text(values, "output" if values.get("output") is not None or "response" not in values else "response")
    asked = instruction_prompt(values)
    tools = parse_tools(values.get("tools"))
    if kind == "prompt":
        return PromptRow(id=row_id, prompt=asked, answer=output, tools=tools)
    return CompletionRow(id=row_id, prompt=asked, completion=(assistant(output),), tools=tools)


def instruction_prompt(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns before an Alpaca answer: system prompt, `history` (question and answer pairs), instruction, input."""
    asked, given = text(values, "instruction"), optional_text(values, "input")
    past: list[Message] = []
    for pair in values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) and side for side in pair):
            raise RowFault("history", "is not a list of pairs of texts")
        past += [user(pair[0]), assistant(pair[1])]
    content = with_system((*past, user(f"{asked}\n\n{given}" if given.strip() else asked)), values)
    assert not isinstance(content, str)
    return content
