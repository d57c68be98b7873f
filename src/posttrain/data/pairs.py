"""Preference rows: explicit and implicit prompts, text and messages, and judgements between two outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import Message
from posttrain.data.chat import parse_messages, parse_tools
from posttrain.data.content import as_prompt_messages, join, label, number, prompt, required, text, turns, with_system
from posttrain.data.questions import instruction_prompt
from posttrain.data.rows import CompletionRow, Content, Kind, LabelRow, PreferenceRow, PromptRow, RowFault, TypedRow

DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
CONVERSATIONS = ("messages", "conversations", "conversation")


def preference_rows(values: Mapping[str, Any], kind: Kind, row_id: str) -> tuple[TypedRow, ...]:
    """A row with `chosen` and `rejected`."""
    before, chosen, rejected = _sides(values)
    pair = _pair(row_id, before, chosen, rejected, values)
    return as_kind(pair, kind)


def pairwise_rows(values: Mapping[str, Any], kind: Kind, row_id: str) -> tuple[TypedRow, ...]:
    """A judgement: `input`, `output_1`, `output_2` and which of them is better, 1 or 2."""
    outputs = (text(values, "output_1"), text(values, "output_2"))
    better = required(values, "label")
    if better not in (1, 2, "1", "2") or isinstance(better, bool):
        raise RowFault("label", "is not 1 or 2", repr(better))
    chosen, rejected = outputs if int(better) == 1 else outputs[::-1]
    return as_kind(_pair(row_id, text(values, "input"), chosen, rejected, values), kind)


def _pair(row_id: str, before: Content, chosen: Content, rejected: Content, values: Mapping[str, Any]) -> PreferenceRow:
    conversational = not all(isinstance(content, str) for content in (before, chosen, rejected))
    first: Content = as_prompt_messages(before) if conversational else before
    before, chosen = join(first, chosen, "chosen")
    before, rejected = join(before, rejected, "rejected")
    if chosen == rejected:
        raise RowFault("rejected", "equals chosen")
    return PreferenceRow(
        id=row_id,
        prompt=before,
        chosen=chosen,
        rejected=rejected,
        margin=_margin(values),
        tools=parse_tools(values.get("tools")),
    )


def _margin(values: Mapping[str, Any]) -> float | None:
    """The column `margin`, or the difference of the columns `score_chosen` and `score_rejected`."""
    chosen, rejected = number(values, "score_chosen"), number(values, "score_rejected")
    difference = None if chosen is None or rejected is None else chosen - rejected
    margin = number(values, "margin")
    return difference if margin is None else margin


def as_kind(pair: PreferenceRow, kind: Kind) -> tuple[TypedRow, ...]:
    """A pair as itself, as its chosen side alone, as its prompt alone, or as two labelled answers."""
    if kind == "completion":
        return (CompletionRow(id=pair.id, prompt=pair.prompt, completion=pair.chosen, tools=pair.tools),)
    if kind == "prompt":
        return (PromptRow(id=pair.id, prompt=pair.prompt, tools=pair.tools),)
    return unpair(pair) if kind == "unpaired" else (pair,)


def unpair(pair: PreferenceRow) -> tuple[LabelRow, LabelRow]:
    """The two sides of a pair as one good and one bad answer."""
    good = LabelRow(id=f"{pair.id}/chosen", prompt=pair.prompt, completion=pair.chosen, label=True, tools=pair.tools)
    bad = LabelRow(
        id=f"{pair.id}/rejected", prompt=pair.prompt, completion=pair.rejected, label=False, tools=pair.tools
    )
    return good, bad


def _sides(values: Mapping[str, Any]) -> tuple[Content, Content, Content]:
    """Prompt, chosen and rejected of a row, in whichever way it gives them."""
    if _whole_conversation(values.get("chosen")) and _whole_conversation(values.get("rejected")):
        chosen = parse_messages(required(values, "chosen"), "chosen")
        return shared_turns(chosen, parse_messages(required(values, "rejected"), "rejected"), values)
    for field in CONVERSATIONS:
        if values.get(field) is not None:
            return prompt(values, field), turns(values, "chosen"), turns(values, "rejected")
    if values.get("instruction") is not None:
        return instruction_prompt(values), turns(values, "chosen"), turns(values, "rejected")
    for field in ("prompt", "question"):
        if values.get(field) is not None:
            return prompt(values, field), turns(values, "chosen"), turns(values, "rejected")
    return _implicit(values)


def _whole_conversation(value: object) -> bool:
    """Whether one side holds the prompt's turns too (a list that begins with someone other than the assistant)."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    first = value[0].get("role", value[0].get("from"))
    return first in ("user", "human", "system", "developer")


def _implicit(values: Mapping[str, Any]) -> tuple[Content, Content, Content]:
    """The prompt as what both sides begin with."""
    chosen, rejected = turns(values, "chosen"), turns(values, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowFault("rejected", "is of another form than chosen", "one is text, the other messages")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise RowFault("prompt", "is missing", "neither side holds the turns before the answer")
    if chosen.startswith("\n\nHuman:") and rejected.startswith("\n\nHuman:"):
        return shared_turns(parse_dialogue(chosen, "chosen"), parse_dialogue(rejected, "rejected"), values)
    return shared_text(chosen, rejected)


def shared_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits two texts where they part, at a word's boundary: the answers begin with the space before their first word.

    Raises:
        RowFault: they are equal, begin differently, or one of them ends where they part.
    """
    if chosen == rejected:
        raise RowFault("rejected", "equals chosen")
    cut = _num_shared(chosen, rejected)
    while cut and not (chosen[cut : cut + 1].isspace() or rejected[cut : cut + 1].isspace()):
        cut -= 1
    before = chosen[:cut]
    if not before.strip():
        raise RowFault("prompt", "is missing", "chosen and rejected have no common beginning to take as prompt")
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if not side[cut:].strip():
            raise RowFault(field, "is empty", "nothing follows the common beginning")
    return before, chosen[cut:], rejected[cut:]


def shared_turns(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], values: Mapping[str, Any]
) -> tuple[Content, Content, Content]:
    """Splits two conversations at the first turn in which they differ, which must be the assistant's.

    Raises:
        RowFault: they are equal, differ in another's turn, or one of them ends there.
    """
    if chosen == rejected:
        raise RowFault("rejected", "equals chosen")
    cut = _num_shared(chosen, rejected)
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if cut == len(side):
            raise RowFault(field, "is empty", "the other side goes on where it ends")
        if side[cut].role != "assistant":
            raise RowFault(field, "parts from the other side in another's turn", f"turn {cut + 1} is {side[cut].role}")
    return with_system(chosen[:cut], values), chosen[cut:], rejected[cut:]


def _num_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many characters or turns two sequences have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def parse_dialogue(value: str, field: str) -> tuple[Message, ...]:
    """The turns of a dialogue in HH-RLHF's notation: `\\n\\nHuman: …\\n\\nAssistant: …`."""
    parts = DIALOGUE.split(value)
    names = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return parse_messages([{"role": names[name], "content": content.strip()} for name, content in pairs], field)


def label_rows(values: Mapping[str, Any], kind: Kind, row_id: str, columns: tuple[str, ...]) -> tuple[TypedRow, ...]:
    """A labelled answer: `prompt, completion, label`, or a conversation whose last turn the label is about."""
    tools = parse_tools(values.get("tools"))
    if columns[0] == "prompt":
        before, answer = join(prompt(values, "prompt"), turns(values, "completion"), "completion")
    else:
        messages = with_system(parse_messages(required(values, columns[0]), columns[0]), values)
        if isinstance(messages[-1], Message) and messages[-1].role != "assistant":
            raise RowFault(columns[0], "does not end with an assistant turn", f"it ends with {messages[-1].role}")
        before, answer = messages[:-1], messages[-1:]
    good = label(values, columns[-1])
    if kind == "prompt":
        return (PromptRow(id=row_id, prompt=before, tools=tools),)
    return (LabelRow(id=row_id, prompt=before, completion=answer, label=good, tools=tools),)
