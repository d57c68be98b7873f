"""One row of plain values to typed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.core import Message
from posttrain.data.chat import parse_messages, parse_tools
from posttrain.data.content import join, label, last_text, prompt, required, text, turns, with_system
from posttrain.data.formats import DatasetType
from posttrain.data.pairs import label_rows, pairwise_rows, preference_rows
from posttrain.data.questions import answer_of, choice_rows, instruction_rows, question_rows, rest
from posttrain.data.rows import CompletionRow, Kind, PromptRow, RowFault, StepsRow, TextRow, TypedRow

MEDIA_COLUMNS = ("images", "videos", "audios")  # without them the texts that speak of them make no sense


def convert(
    values: Mapping[str, Any], dataset_type: DatasetType, columns: tuple[str, ...], kind: Kind, row_id: str
) -> tuple[TypedRow, ...]:
    """The typed rows of one source row: one, but for pairs taken apart and instructions with several instances.

    Args:
        values: the row, under canonical names.
        dataset_type: what it is.
        columns: the columns by which that was seen.
        kind: what to make of it; one of the kinds that the type can become.
        row_id: the id to give.

    Raises:
        RowFault: something is missing, of the wrong type, empty or nonsensical; names the column.
    """
    for field in MEDIA_COLUMNS:
        if values.get(field):
            raise RowFault(field, "holds media, which text models cannot be trained on")
    rows = _convert(values, dataset_type, columns, kind, row_id)
    for row in rows:
        _must_be_storable(row)
    return rows


def _convert(
    values: Mapping[str, Any], dataset_type: DatasetType, columns: tuple[str, ...], kind: Kind, row_id: str
) -> tuple[TypedRow, ...]:
    match dataset_type:
        case DatasetType.LANGUAGE_MODELING if columns == ("text",):
            return (TextRow(id=row_id, text=text(values, "text")),)
        case DatasetType.LANGUAGE_MODELING | DatasetType.SHAREGPT:
            return (_conversation_row(values, columns[0], kind, row_id),)
        case DatasetType.PROMPT_ONLY:
            return (_prompt_row(values, columns[0], row_id),)
        case DatasetType.PROMPT_COMPLETION:
            return (_completion_row(values, columns, kind, row_id),)
        case DatasetType.PREFERENCE:
            return preference_rows(values, kind, row_id)
        case DatasetType.PAIRWISE:
            return pairwise_rows(values, kind, row_id)
        case DatasetType.UNPAIRED_PREFERENCE:
            return label_rows(values, kind, row_id, columns)
        case DatasetType.STEPWISE:
            return (_steps_row(values, kind, row_id),)
        case DatasetType.ALPACA:
            return instruction_rows(values, kind, row_id)
        case DatasetType.QUESTION_ANSWER:
            return question_rows(values, kind, row_id, columns)
        case DatasetType.MULTIPLE_CHOICE:
            return choice_rows(values, row_id, columns)


def _must_be_storable(row: TypedRow) -> None:
    """A row that cannot be written as JSON would fail later, far from its file."""
    try:
        row.to_json()
    except UnicodeEncodeError as error:
        raise RowFault("", "lone surrogate", str(error)) from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RowFault("", "holds a value that JSON cannot", str(error)) from error


def _conversation_row(values: Mapping[str, Any], field: str, kind: Kind, row_id: str) -> TypedRow:
    parsed = with_system(parse_messages(required(values, field), field), values)
    assert not isinstance(parsed, str)
    tools = parse_tools(values.get("tools"))
    if kind == "prompt":
        return _prompt_of(parsed, field, row_id, rest(values, field)).replace(tools=tools)
    if parsed[-1].role != "assistant":
        raise RowFault(field, "does not end with an assistant turn", f"it ends with {parsed[-1].role}")
    if not any(message.role == "assistant" and message.train for message in parsed):
        raise RowFault(field, "has no assistant turn to train on", "all of them have weight 0")
    first = next(index for index, message in enumerate(parsed) if message.role == "assistant")
    return CompletionRow(id=row_id, prompt=parsed[:first], completion=parsed[first:], tools=tools)


def _prompt_of(messages: tuple[Message, ...], field: str, row_id: str, facts: dict[str, Any]) -> PromptRow:
    """The conversation up to its last user turn; what the assistant says at its end is the reference answer."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise RowFault(field, "has no user turn")
    answer = messages[-1].content if messages[-1].role == "assistant" else None
    return PromptRow(id=row_id, prompt=messages[: users[-1] + 1], answer=answer or None, facts=facts)


def _prompt_row(values: Mapping[str, Any], field: str, row_id: str) -> PromptRow:
    answer, facts = (None, {}) if values.get("answer") is None else answer_of(values["answer"], "answer")
    return PromptRow(
        id=row_id,
        prompt=prompt(values, field),
        answer=answer,
        facts={**rest(values, field, "answer"), **facts},
        tools=parse_tools(values.get("tools")),
    )


def _completion_row(values: Mapping[str, Any], columns: tuple[str, ...], kind: Kind, row_id: str) -> TypedRow:
    asked, answered = columns
    before, after = join(prompt(values, asked), turns(values, answered), answered)
    tools = parse_tools(values.get("tools"))
    if kind == "prompt":
        answer, facts = answer_of(last_text(after), answered)
        return PromptRow(
            id=row_id, prompt=before, answer=answer, facts={**rest(values, *columns), **facts}, tools=tools
        )
    if kind == "text":
        if not isinstance(before, str) or not isinstance(after, str):
            raise RowFault(asked, "is not text", "messages have no text without a chat template")
        return TextRow(id=row_id, text=before + after)
    return CompletionRow(id=row_id, prompt=before, completion=after, tools=tools)


def _steps_row(values: Mapping[str, Any], kind: Kind, row_id: str) -> TypedRow:
    before = prompt(values, "prompt")
    if kind == "prompt":
        return PromptRow(id=row_id, prompt=before, facts=rest(values, "prompt"))
    steps, labels = required(values, "completions"), required(values, "labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise RowFault("completions", "is not a list of texts")
    if not isinstance(labels, list) or len(labels) != len(steps):
        found = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise RowFault("labels", "is not one label for each step", f"{found} for {len(steps)} steps")
    flags = tuple(label({"labels": item}, "labels") for item in labels)
    return StepsRow(id=row_id, prompt=before, completions=tuple(steps), labels=flags)
