"""Rows to what reward models learn from: ranked answers to one prompt, and answers in labelled steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain import data as rows
from posttrain.core import DataError, Example, Message, RenderError, Task, TokenSequence, UsageError, content_hash
from posttrain.data import Content, PreferenceRow, StepsRow
from posttrain.engine import Encoded
from posttrain.recipes.reward_scoring import RewardPolicy, judged_at_end, judged_at_steps, render_answers
from posttrain.recipes.workbench import Workbench


class Ranked(NamedTuple):
    """Answers to one prompt, the best first, with what the trainer and the report need."""

    example: Example
    prompt: str  # as text
    answers: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens of each answer
    tags: tuple[str, ...]


class Stepped(NamedTuple):
    """An answer in steps."""

    example: Example
    labels: tuple[float | None, ...]


class RankedRow(NamedTuple):
    """A preference row, with the better answer that somebody wrote in place of the chosen one, if there is one."""

    row: PreferenceRow
    edited: Content | None
    tags: tuple[str, ...]


def load_ranked(
    bench: Workbench,
    path: Path,
    *,
    columns: str | None = None,
    edited: str | None = None,
    tags: Sequence[str] = (),
    limit: int | None = None,
) -> list[RankedRow]:
    """Preference rows with the columns that those do not carry.

    Args:
        edited: column with an answer better than the chosen one; rows where it is empty are pairs.
        tags: columns whose values the report tells apart ("subset" → "subset:natural").

    Raises:
        DataError: a column is in no row, or the rows are no preferences.
    """
    where = bench.run.path / "bad_rows.jsonl"
    loaded = rows.load(path, kind="preference", columns=columns, limit=limit, quarantine=where)
    bench.say(loaded.report.summary())
    wanted = [*([edited] if edited else []), *tags]
    extra = _extra_columns(path, columns, wanted, limit) if wanted else {}
    found = []
    for row in loaded:
        own = extra.get(row.id, {})
        better = own.get(edited) if edited else None
        labels = tuple(f"{name}:{own[name]}" for name in tags if own.get(name) is not None)
        found.append(RankedRow(row, _edited(row, better), labels))
    return found


def ranked_examples(
    bench: Workbench,
    policy: RewardPolicy,
    ranked: Sequence[RankedRow],
    max_length: int,
    *,
    chat: bool = False,
    margin: bool = False,
) -> list[Ranked]:
    """Token sequences of all answers, each judged at its end. Rows that cannot be used are left out and counted.

    Args:
        max_length: rows with a longer prompt and answer are left out, tokens.
        chat: make text prompts and answers turns of the chat template.
        margin: rows' margins become the column `levels`.

    Raises:
        DataError: more than 5 % of the rows are refused, or none is left.
    """
    items: list[tuple[Task, Content]] = []
    answers_of: list[list[Content]] = []
    for each in ranked:
        row = rows.as_chat(each.row) if chat else each.row
        better = [] if each.edited is None else [_as_turns(each.edited) if chat else each.edited]
        answers = [*better, row.chosen, row.rejected]
        answers_of.append(answers)
        task = Task(id=row.id, prompt=row.prompt, tools=row.tools)
        items += [(task, answer) for answer in answers]
    rendered = iter(render_answers(policy.renderer, items))
    found: list[Ranked] = []
    refused: list[str] = []
    too_long = 0
    at = 0
    for each, answers in zip(ranked, answers_of, strict=True):
        task = items[at][0]
        at += len(answers)
        own = [next(rendered) for _ in answers]
        problem = next((each for each in own if isinstance(each, RenderError)), None)
        if problem is not None:
            refused.append(f"{task.id}: {problem}")
            continue
        judged = [judged_at_end(each) for each in own if not isinstance(each, RenderError)]
        if max(len(one.tokens) for one in judged) > max_length:
            too_long += 1
            continue
        lengths = tuple(sum(each.mask) for each in own if not isinstance(each, RenderError))
        levels = _levels(each.row, len(answers)) if margin else None
        example = ranked_example(task, judged, levels)
        texts = tuple(answer_text(answer) for answer in answers)
        found.append(Ranked(example, task.prompt_text(), texts, lengths, each.tags))
    check_left_out(bench, len(ranked), refused, too_long, len(found), max_length)
    return found


def ranked_example(task: Task, judged: Sequence[Encoded], levels: Sequence[float] | None = None) -> Example:
    """Answers to one prompt, the best first, as one example; `levels` as `reward_objective` reads them."""
    sequences = []
    for place, (tokens, positions) in enumerate(judged):
        mask = tuple(index in positions for index in range(len(tokens)))
        columns = {} if levels is None else {"levels": tuple(levels[place] if flag else 0.0 for flag in mask)}
        sequences.append(TokenSequence(tokens=tokens, mask=mask, columns=columns))
    return Example(id=task.id, sequences=tuple(sequences), group=prompt_key(task))


def stepped_examples(
    bench: Workbench,
    policy: RewardPolicy,
    steps: Sequence[StepsRow],
    max_length: int,
    *,
    separator: str,
    chat: bool = False,
    until_first_error: bool = False,
) -> list[Stepped]:
    """Answers in steps, each step judged where it ends.

    Args:
        max_length: longer prompts with answers are left out, tokens.
        separator: put between the steps.
        chat: make text prompts a user's turn and the steps the assistant's.
        until_first_error: steps after the first wrong one are no targets: nobody can be right after it.

    Raises:
        DataError: more than 5 % of the rows are refused, or none is left.
    """
    items = []
    for row in steps:
        prompt = rows.as_chat(row).prompt if chat else row.prompt
        items.append((Task(id=row.id, prompt=prompt), separator.join(row.completions)))
    found: list[Stepped] = []
    refused: list[str] = []
    too_long = 0
    for row, (task, answer), rendered in zip(steps, items, render_answers(policy.renderer, items), strict=True):
        try:
            if isinstance(rendered, RenderError):
                raise rendered
            judged = judged_at_steps(policy.tokenizer, rendered, answer, _ends(row.completions, separator))
        except RenderError as error:
            refused.append(f"{row.id}: {error}")
            continue
        if len(judged.tokens) > max_length:
            too_long += 1
            continue
        labels: list[float | None] = [float(label) for label in row.labels]
        if until_first_error and 0.0 in labels:
            first = labels.index(0.0)
            labels[first + 1 :] = [None] * (len(labels) - first - 1)
        found.append(Stepped(step_example(task, judged, labels), tuple(labels)))
    check_left_out(bench, len(steps), refused, too_long, len(found), max_length)
    return found


def step_example(task: Task, judged: Encoded, labels: Sequence[float | None]) -> Example:
    """An answer in steps as one example: labels in [0, 1], hard or soft; None for a step that is no target."""
    label_at = dict(zip(judged.positions, labels, strict=True))
    known = {place: label for place, label in label_at.items() if label is not None}
    sequence = TokenSequence(
        tokens=judged.tokens,
        mask=tuple(index in known for index in range(len(judged.tokens))),
        columns={"labels": tuple(known.get(index, 0.0) for index in range(len(judged.tokens)))},
    )
    return Example(id=task.id, sequences=(sequence,), group=prompt_key(task))


def check_left_out(
    bench: Workbench, num: int, refused: Sequence[str], too_long: int, num_left: int, max_length: int
) -> None:
    """Say what was left out, and stop where it is too much."""
    if refused:
        bench.run.event("refused_rows", count=len(refused), first=list(refused[:5]))
    if too_long:
        bench.say(f"{too_long} of {num} rows are longer than {max_length} tokens and left out")
    if refused and len(refused) == num:
        raise UsageError(f"every row is refused; first: {refused[0]}")
    if len(refused) > 0.05 * num or not num_left:
        raise DataError(
            f"{len(refused)} of {num} rows refused, {too_long} too long, {num_left} left. "
            f"First refusals: {'; '.join(refused[:3])}"
        )


def prompt_key(task: Task) -> str:
    """What rows of one prompt share, so that none of them is trained on while another is held out."""
    prompt = task.prompt if isinstance(task.prompt, str) else [message.to_dict() for message in task.prompt]
    return content_hash({"prompt": prompt})[:16]


def answer_text(answer: Content) -> str:
    """An answer as plain text."""
    return answer if isinstance(answer, str) else "\n".join(message.content for message in answer)


def _levels(row: PreferenceRow, num_answers: int) -> list[float]:
    """No margin is known between an edited answer and the chosen one, which was good enough to be edited."""
    margin = row.margin or 0.0
    return [margin] * (num_answers - 1) + [0.0]


def _ends(steps: Sequence[str], separator: str) -> list[int]:
    ends, at = [], 0
    for step in steps:
        at += len(step) + len(separator)
        ends.append(at)
    return [*ends[:-1], at - len(separator)]


def _edited(row: PreferenceRow, value: Any) -> Content | None:
    if value is None or value == "" or value == []:
        return None
    if not isinstance(value, str):
        raise DataError(f"{row.id}: the edited answer must be text, not {type(value).__name__}")
    text = value if isinstance(row.chosen, str) else _as_turns(value)
    return None if text == row.chosen else text


def _as_turns(answer: Content) -> tuple[Message, ...]:
    return (Message(role="assistant", content=answer),) if isinstance(answer, str) else answer


def _extra_columns(
    path: Path, columns: str | None, wanted: Sequence[str], limit: int | None
) -> dict[str, Mapping[str, Any]]:
    """Further columns by row id, which is made as `data.load` makes it."""
    mapping = rows.ColumnMap.parse(columns)
    found: dict[str, Mapping[str, Any]] = {}
    present: set[str] = set()
    for row in rows.read_rows(path, limit=limit, on_bad=lambda bad: None):
        own = str(mapping.rename(row.values).get("id")) if "id" in mapping.columns else f"{row.file}:{row.line}"
        found[own] = {name: row.values.get(name) for name in wanted}
        present.update(row.values)
    absent = [name for name in wanted if name not in present]
    if absent:
        raise DataError(f"{path}: no column {absent[0]!r}; columns present: {', '.join(sorted(present))}")
    return found
