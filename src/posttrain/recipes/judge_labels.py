"""Files of human labels: pairs with votes, or single answers that people called right or wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from posttrain.core import DataError, Task
from posttrain.data import Row, read_rows
from posttrain.evaluate.judge_calibration import Vote

_VOTES: dict[Any, Vote] = {"a": "a", "b": "b", "tie": "tie", 1: "a", 2: "b", 0: "tie", "A": "a", "B": "b"}


class LabelledPair(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers to a task and what people voted."""

    id: str
    task: Task
    a: str
    b: str
    votes: tuple[Vote, ...]


class LabelledAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to a task and whether people call it right."""

    id: str
    task: Task
    text: str
    votes: tuple[bool, ...]


def read_labels(path: Path, limit: int | None = None) -> list[LabelledPair] | list[LabelledAnswer]:
    """Rows of a file of human labels.

    Known forms of pairs: PandaLM's (`instruction input response1 response2 annotator1 annotator2 …`), LLMBar's
    (`input output_1 output_2 label`), and `prompt a b votes`, a vote being "a", "b" or "tie" (or 1, 2, 0). Of answers:
    `prompt answer votes` (booleans) or `prompt answer label`, with `reference` where there is one. `facts` are kept.

    Raises:
        DataError: a row is of none of these forms, or rows of both kinds are mixed.
    """
    pairs: list[LabelledPair] = []
    answers: list[LabelledAnswer] = []
    for number, row in enumerate(read_rows(path, limit=limit)):
        found = _pair(row, number) or _answer(row, number)
        if found is None:
            raise DataError(
                f"{path}: {row.file}:{row.line}: no human labels that are known: {', '.join(row.values)}. Give the "
                "columns prompt, a, b, votes (of pairs), or prompt, answer, votes (of answers)"
            )
        if isinstance(found, LabelledPair):
            pairs.append(found)
        else:
            answers.append(found)
    if pairs and answers:
        raise DataError(f"{path}: {len(pairs)} pairs and {len(answers)} single answers; put them into two files")
    if not pairs and not answers:
        raise DataError(f"{path}: no rows")
    return pairs or answers


def _pair(row: Row, number: int) -> LabelledPair | None:
    values = row.values
    for names in (("a", "b"), ("output_1", "output_2"), ("response1", "response2")):
        if set(names) <= set(values):
            break
    else:
        return None
    annotators = sorted(name for name in values if name.startswith("annotator"))
    given = values.get("votes", [values[name] for name in annotators] or [values.get("label")])
    try:
        votes = tuple(_VOTES[vote] for vote in given)
    except (KeyError, TypeError):
        raise DataError(f"{row.file}:{row.line}: votes must be a, b or tie (or 1, 2, 0), not {given!r}") from None
    a, b = (str(values[name]) for name in names)
    return LabelledPair(id=_id(row, number), task=_task(row, number), a=a, b=b, votes=votes)


def _answer(row: Row, number: int) -> LabelledAnswer | None:
    values = row.values
    given = values.get("votes", [values["label"]] if "label" in values else None)
    if "answer" not in values or given is None:
        return None
    if not all(vote in (True, False) for vote in given):
        raise DataError(f"{row.file}:{row.line}: labels of answers must be true or false, not {given!r}")
    votes = tuple(bool(vote) for vote in given)
    return LabelledAnswer(id=_id(row, number), task=_task(row, number), text=str(values["answer"]), votes=votes)


def _task(row: Row, number: int) -> Task:
    values = row.values
    texts = [values.get("prompt", values.get("instruction")), values.get("input")]
    prompt = "\n".join(str(text) for text in texts if text)
    if not prompt:
        raise DataError(f"{row.file}:{row.line}: no prompt; give the column prompt (or instruction, input)")
    reference = values.get("reference")
    facts = values.get("facts") or {}
    return Task(id=_id(row, number), prompt=prompt, answer=None if reference is None else str(reference), facts=facts)


def _id(row: Row, number: int) -> str:
    return str(row.values.get("id", row.values.get("idx", number)))
