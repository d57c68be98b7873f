"""Which data set format a row is in, and how columns are renamed.

The six types and their columns are TRL's ("Dataset formats and types"); the others are the shapes in which public data
sets come. A format is recognised by its columns; a column that is null counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeAlias

from posttrain.core import DataError, Record, UsageError
from posttrain.data.rows import KINDS, Kind


class DatasetType(StrEnum):
    """What a row is made of."""

    LANGUAGE_MODELING = "language_modeling"  # text | messages
    PROMPT_ONLY = "prompt_only"  # prompt
    PROMPT_COMPLETION = "prompt_completion"  # prompt, completion
    PREFERENCE = "preference"  # chosen, rejected and mostly prompt
    UNPAIRED_PREFERENCE = "unpaired_preference"  # prompt, completion, label | messages, label
    STEPWISE = "stepwise_supervision"  # prompt, completions, labels
    SHAREGPT = "sharegpt"  # conversations of from/value turns, with system, tools
    ALPACA = "alpaca"  # instruction, input, output | response
    QUESTION_ANSWER = "question_answer"  # question, answer (GSM8K, MATH, TriviaQA, SVAMP, BIG-Bench Hard …)
    MULTIPLE_CHOICE = "multiple_choice"  # query, choices, gold (ARC, MMLU, AGIEval …)
    PAIRWISE = "pairwise"  # input, output_1, output_2, label 1 | 2 (LLMBar, MT-Bench judgements)


class Format(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The format of a row."""

    type: DatasetType
    conversational: bool = False  # messages rather than text
    implicit_prompt: bool = False  # a preference whose prompt is the shared beginning of both sides

    @property
    def name(self) -> str:
        """For messages and reports."""
        how = "conversational " if self.conversational else ""
        return f"{how}{self.type.value}" + (" with implicit prompt" if self.implicit_prompt else "")


# For each type: the kinds of typed rows it can become, the natural one first.
KINDS_OF: dict[DatasetType, tuple[Kind, ...]] = {
    DatasetType.LANGUAGE_MODELING: ("text", "completion", "prompt"),
    DatasetType.PROMPT_ONLY: ("prompt",),
    DatasetType.PROMPT_COMPLETION: ("completion", "prompt", "text"),
    DatasetType.PREFERENCE: ("preference", "completion", "prompt", "unpaired"),
    DatasetType.UNPAIRED_PREFERENCE: ("unpaired", "prompt"),
    DatasetType.STEPWISE: ("steps", "prompt"),
    DatasetType.SHAREGPT: ("completion", "prompt"),
    DatasetType.ALPACA: ("completion", "prompt"),
    DatasetType.QUESTION_ANSWER: ("prompt", "completion"),
    DatasetType.MULTIPLE_CHOICE: ("prompt",),
    DatasetType.PAIRWISE: ("preference", "completion", "prompt", "unpaired"),
}

# Sets of columns that name a type, the most telling first. A row is of the first type whose columns it has all of.
SIGNATURES: tuple[tuple[DatasetType, tuple[str, ...]], ...] = (
    (DatasetType.STEPWISE, ("prompt", "completions", "labels")),
    (DatasetType.PREFERENCE, ("chosen", "rejected")),
    (DatasetType.PAIRWISE, ("input", "output_1", "output_2", "label")),
    (DatasetType.UNPAIRED_PREFERENCE, ("prompt", "completion", "label")),
    (DatasetType.UNPAIRED_PREFERENCE, ("messages", "label")),
    (DatasetType.UNPAIRED_PREFERENCE, ("conversations", "kto_tag")),
    (DatasetType.SHAREGPT, ("conversations",)),
    (DatasetType.SHAREGPT, ("conversation",)),
    (DatasetType.LANGUAGE_MODELING, ("messages",)),
    (DatasetType.PROMPT_COMPLETION, ("prompt", "completion")),
    (DatasetType.PROMPT_COMPLETION, ("prompt", "response")),
    (DatasetType.PROMPT_COMPLETION, ("context", "continuation")),
    (DatasetType.MULTIPLE_CHOICE, ("query", "choices", "gold")),
    (DatasetType.MULTIPLE_CHOICE, ("question", "choices", "answer")),
    (DatasetType.MULTIPLE_CHOICE, ("question", "options", "label")),
    (DatasetType.ALPACA, ("instruction", "output")),
    (DatasetType.ALPACA, ("instruction", "response")),
    (DatasetType.ALPACA, ("instruction", "instances")),
    (DatasetType.QUESTION_ANSWER, ("problem", "answer")),
    (DatasetType.QUESTION_ANSWER, ("Body", "Question", "Answer")),
    (DatasetType.QUESTION_ANSWER, ("question", "answer")),
    (DatasetType.QUESTION_ANSWER, ("context", "answer")),
    (DatasetType.QUESTION_ANSWER, ("input", "target")),
    (DatasetType.PROMPT_ONLY, ("text", "test_list")),
    (DatasetType.PROMPT_ONLY, ("prompt",)),
    (DatasetType.LANGUAGE_MODELING, ("text",)),
)

# Canonical names that a column may be mapped to.
TARGETS = (
    "id",
    "text",
    "messages",
    "conversations",
    "system",
    "prompt",
    "completion",
    "answer",
    "chosen",
    "rejected",
    "margin",
    "label",
    "completions",
    "labels",
    "tools",
    "instruction",
    "input",
    "output",
)


def signature(values: Mapping[str, Any], kind: Kind | None = None) -> tuple[DatasetType, tuple[str, ...]] | None:
    """The type of a row and the columns that say so; only types that can become `kind`, if one is given."""
    for dataset_type, columns in SIGNATURES:
        if kind is not None and kind not in kinds_of(dataset_type, columns):
            continue
        if all(values.get(column) is not None for column in columns):
            return dataset_type, columns
    return None


def kinds_of(dataset_type: DatasetType, columns: tuple[str, ...]) -> tuple[Kind, ...]:
    """The kinds that a type can become: messages have no text of their own, text has no prompt."""
    if dataset_type is DatasetType.LANGUAGE_MODELING:
        return ("completion", "prompt") if columns == ("messages",) else ("text",)
    return KINDS_OF[dataset_type]


def detect(values: Mapping[str, Any], kind: Kind | None = None) -> Format:
    """The format of one row.

    Args:
        values: the row.
        kind: what it shall become; decides where a row's columns fit several types.

    Raises:
        DataError: no known format; names the columns present.
    """
    found = signature(values, kind)
    if found is None:
        raise DataError(explain_unknown(values, kind))
    dataset_type, columns = found
    return Format(
        type=dataset_type,
        conversational=_conversational(values, columns),
        implicit_prompt=dataset_type is DatasetType.PREFERENCE and not _has_prompt(values),
    )


def explain_unknown(values: Mapping[str, Any], kind: Kind | None) -> str:
    """Why a row is of no format that can become `kind`, and what to do."""
    present = ", ".join(values) or "none"
    advice = 'name them with columns, for example columns={"prompt": "question", "completion": "answer"}'
    other = signature(values)
    if kind is None or other is None:
        return f"no known data format has the columns {present}; {advice}"
    made = ", ".join(kinds_of(*other))
    return f"rows with the columns {present} are {other[0].value}: they become {made}, not {kind}; {advice}"


PROMPT_COLUMNS = ("prompt", "question", "instruction", "messages", "conversations", "conversation")


def _has_prompt(values: Mapping[str, Any]) -> bool:
    return any(values.get(column) is not None for column in PROMPT_COLUMNS)


def _conversational(values: Mapping[str, Any], columns: tuple[str, ...]) -> bool:
    considered = {*columns, *(PROMPT_COLUMNS if "chosen" in columns else ())}
    for column in considered:
        value = values.get(column)
        if column in ("messages", "conversations", "conversation") and value is not None:
            return True
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and ("role" in first or "from" in first):
            return True
    return False


class ColumnMap(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of the file's columns stand for which canonical ones: `{"prompt": "question", "completion": "answer"}`."""

    columns: dict[str, str]

    @classmethod
    def parse(cls, given: ColumnMap | Mapping[str, str] | str | None) -> ColumnMap:
        """From a mapping, or from text such as `prompt=question,completion=answer`.

        Raises:
            UsageError: an unknown canonical name, the same column twice, or text of another shape.
        """
        if isinstance(given, ColumnMap):
            return given
        if isinstance(given, str):
            pairs = [part.partition("=") for part in given.split(",") if part.strip()]
            if not all(sign and target.strip() and source.strip() for target, sign, source in pairs):
                raise UsageError(
                    f"columns {given!r}: write canonical=column, … as in prompt=question,completion=answer"
                )
            targets = [target.strip() for target, _, _ in pairs]
            if len(set(targets)) < len(targets):
                raise UsageError(f"columns {given!r}: a canonical name stands twice")
            given = {target.strip(): source.strip() for target, _, source in pairs}
        columns = dict(given or {})
        for target in columns:
            if target not in TARGETS:
                raise UsageError(f"columns: {target!r} is not a canonical name; those are {', '.join(TARGETS)}")
        if len(set(columns.values())) < len(columns):
            raise UsageError(f"columns: one column stands for two names in {columns}")
        return cls(columns=columns)

    def check(self, present: Mapping[str, Any], where: str) -> None:
        """Refuse a mapping that names a column which the file does not have.

        Raises:
            DataError: names the missing column and those present.
        """
        for target, source in self.columns.items():
            if source not in present:
                raise DataError(f"{where}: no column {source!r} (for {target}); columns present: {', '.join(present)}")

    def rename(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The row under canonical names. A column that a mapped one takes the name of is left out."""
        if not self.columns:
            return dict(values)
        moved = set(self.columns.values())
        kept = {name: value for name, value in values.items() if name not in moved and name not in self.columns}
        return {**{target: values.get(source) for target, source in self.columns.items()}, **kept}


Columns: TypeAlias = ColumnMap | Mapping[str, str] | str


def check_kind(kind: str | None) -> None:
    """Refuse an unknown kind.

    Raises:
        UsageError: names the known ones.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"kind {kind!r} is not known; it is one of {', '.join(KINDS)}")
