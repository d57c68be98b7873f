"""From preference rows to examples: two answers to one prompt as tokens, or one answer with a label.

What cannot be used is written to the run's quarantine file with its cause, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from posttrain import data as rows
from posttrain.core import DataError, Example, RenderError, Task, TokenSequence, generator
from posttrain.data import BadRow, Content, LabelRow, PreferenceRow
from posttrain.recipes.workbench import Workbench
from posttrain.render import Renderer
from posttrain.train.preference import MARGIN_WEIGHTS

R = TypeVar("R", PreferenceRow, LabelRow)

TOO_LONG = "is too long"


class Unusable(Exception):
    """Raised for one row; becomes a line of the quarantine file, or is counted as too long."""

    def __init__(self, field: str, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.field, self.cause, self.detail = field, cause, detail


def pair_examples(
    bench: Workbench,
    renderer: Renderer,
    pairs: Sequence[PreferenceRow],
    max_length: int,
    *,
    chat: bool = False,
    mask_format: bool = False,
    nll_over_prompt: bool = False,
) -> list[Example]:
    """Pairs as examples of two sequences, chosen before rejected; what the assistant wrote is the target.

    Args:
        bench: where bad rows are written (`bad_pairs.jsonl`) and counted.
        renderer: the policy's.
        pairs: rows.
        max_length: rows of which a side is longer are left out and counted, tokens.
        chat: make text prompts and answers turns of the chat template.
        mask_format: leave the tokens that end a turn out of the preference term, by a column of weights (Llama 3,
            section 4.1.4); the NLL term keeps them.
        nll_over_prompt: make the chosen side's prompt a target of the NLL term, with weight 0 in the preference term.

    Raises:
        DataError: more than 5 % of the rows cannot be used, or none is left.
    """
    stops = renderer.stop_tokens if mask_format else frozenset()

    def make(row: PreferenceRow) -> Example:
        chosen = _rendered(renderer, row, row.chosen, "chosen", max_length)
        rejected = _rendered(renderer, row, row.rejected, "rejected", max_length)
        if prompt_of(chosen) != prompt_of(rejected):
            raise Unusable("rejected", "has another prompt than chosen once rendered", _parting(chosen, rejected))
        if mask_format or nll_over_prompt:
            chosen, rejected = _weighted(chosen, stops, nll_over_prompt), _weighted(rejected, stops, False)
        return Example(id=row.id, sequences=(chosen, rejected))

    return _usable(bench, pairs, make, chat)


def label_examples(
    bench: Workbench, renderer: Renderer, answers: Sequence[LabelRow], max_length: int, *, chat: bool = False
) -> list[Example]:
    """Answers with a label as examples of one sequence with the scalar `label`: 1 good, 0 bad.

    Arguments and errors as `pair_examples`.
    """

    def make(row: LabelRow) -> Example:
        sequence = _rendered(renderer, row, row.completion, "completion", max_length)
        return Example(id=row.id, sequences=(sequence,), scalars={"label": float(row.label)})

    return _usable(bench, answers, make, chat)


def mismatched(examples: Sequence[Example], max_length: int, seed: int) -> list[Example]:
    """Each prompt with the answer to another: what KTO estimates the KL on.

    The answers are those of the examples, rotated by one after a shuffle, so that every answer comes once and none
    stays in its own row. (TRL rotates within each batch of the file's order; here the batches of an epoch are shuffled
    anew, so the pairing is one of the whole data set, and can be cached.) Where prompt and answer are longer than
    `max_length` tokens together, the answer's end is cut off.

    Args:
        examples: answers of one sequence each; at least two.
        max_length: tokens.
        seed: decides the pairing.

    Returns:
        An example for each, in order and with the same id.
    """
    order = list(range(len(examples)))
    generator(seed, "mismatched").shuffle(order)
    made: dict[int, Example] = {}
    for place, index in enumerate(order):
        own, other = (examples[each].sequences[0] for each in (index, order[place - 1]))
        prompt, at = prompt_of(own), len(prompt_of(other))
        answer, mask = other.tokens[at:], (False,) * len(prompt) + other.mask[at:]
        tokens = (prompt + answer)[:max_length]
        made[index] = Example(id=examples[index].id, sequences=(TokenSequence(tokens=tokens, mask=mask[:max_length]),))
    return [made[index] for index in range(len(examples))]


def prompt_of(sequence: TokenSequence) -> tuple[int, ...]:
    """The tokens before the first target."""
    return sequence.tokens[: sequence.mask.index(True)]


def _usable(bench: Workbench, given: Sequence[R], make: Callable[[R], Example], chat: bool) -> list[Example]:
    examples: list[Example] = []
    causes: Counter[str] = Counter()
    too_long = 0
    with (bench.run.path / "bad_pairs.jsonl").open("wb") as quarantine:
        for row in given:
            try:
                examples.append(make(rows.as_chat(row) if chat else row))
            except Unusable as fault:
                if fault.cause == TOO_LONG:
                    too_long += 1
                    continue
                causes[f"{fault.field}: {fault.cause}"] += 1
                quarantine.write(_bad_row(row, fault).to_json() + b"\n")
    counted = "; ".join(f"{count} × {cause}" for cause, count in causes.most_common())
    summary = f"{len(examples)} of {len(given)} rows used, {too_long} too long, {causes.total()} bad" + (
        f" (bad_pairs.jsonl): {counted}" if causes else ""
    )
    if causes.total() > 0.05 * len(given) or not examples:
        raise DataError(f"too many rows cannot be used: {summary}")
    if too_long or causes:
        bench.say(summary)
    return examples


def _rendered(renderer: Renderer, row: R, answer: Content, field: str, max_length: int) -> TokenSequence:
    if _is_empty(answer):
        raise Unusable(field, "is empty")
    try:
        rendered = renderer.completion_pair(Task(id=row.id, prompt=row.prompt, tools=row.tools), answer)
    except RenderError as error:
        raise Unusable(field, "is refused by the chat template", str(error)) from error
    if len(rendered.tokens) > max_length:
        raise Unusable(field, TOO_LONG)
    if not any(rendered.mask):
        raise Unusable(field, "has no token of the assistant's")
    return TokenSequence(tokens=rendered.tokens, mask=rendered.mask)


def _is_empty(answer: Content) -> bool:
    """Whether the assistant says nothing: a lone end of turn is no answer to learn from."""
    if isinstance(answer, str):
        return not answer.strip()
    turns = [message for message in answer if message.role == "assistant" and message.train]
    return not any(turn.content.strip() or turn.reasoning or turn.tool_calls for turn in turns)


def _weighted(sequence: TokenSequence, stops: frozenset[int], with_prompt: bool) -> TokenSequence:
    """Weights of the preference term: 0 for tokens that end a turn, and for the prompt where it becomes a target."""
    weights = tuple(
        float(is_target and token not in stops) for token, is_target in zip(sequence.tokens, sequence.mask, strict=True)
    )
    mask = sequence.mask
    if with_prompt:
        start = mask.index(True)
        mask = (False,) + (True,) * (start - 1) + mask[start:]
    return sequence.replace(mask=mask, columns={**sequence.columns, MARGIN_WEIGHTS: weights})


def _parting(chosen: TokenSequence, rejected: TokenSequence) -> str:
    first, other = prompt_of(chosen), prompt_of(rejected)
    pairs = enumerate(zip(first, other, strict=False))
    at = next((place for place, (one, two) in pairs if one != two), min(len(first), len(other)))
    return f"they part at token {at}; prompts of {len(first)} and {len(other)} tokens"


def _bad_row(row: R, fault: Unusable) -> BadRow:
    file, _, line = row.id.rpartition(":")
    number = int(line) if line.isdigit() else 0
    return BadRow(
        file=file if number else row.id,
        line=number,
        field=fault.field,
        cause=fault.cause,
        detail=fault.detail,
        raw=row.to_json().decode(),
    )
