"""A reward model as recipes hold it: the model, its tokenizer and template, and where in an answer it judges."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from posttrain import models
from posttrain.core import Message, ModelError, Record, RenderError, Task
from posttrain.engine import Encoded, LocalScorer
from posttrain.render import Rendered, Renderer, Tokenizer

FORMAT_FILE = "reward_format.json"


class RewardFormat(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="reward_format/1"
):
    """What a reward model's numbers mean; a file beside its weights."""

    kind: Literal["outcome", "process"] = "outcome"
    separator: str = "\n\n"  # between the steps of an answer, for a process
    mean: float = 0.0  # of the rewards on its held-out answers, and their standard deviation: to put it on a scale
    std: float = 1.0


@dataclass(frozen=True)
class RewardPolicy:
    """A scored decoder with what turns text into its tokens. `models.load_scored` of the folder is a critic's start."""

    model: models.ScoredDecoder
    tokenizer: Tokenizer
    renderer: Renderer
    path: Path
    format: RewardFormat

    def save(self, folder: Path, form: RewardFormat) -> Path:
        """Write a folder that `transformers`' AutoModelForSequenceClassification loads, and the format beside it."""
        return models.save_scored(self.model, folder, tokenizer=_TokenizerAndFormat(self.tokenizer, form))

    def encode(self, items: Sequence[tuple[Task, str]]) -> list[Encoded | Exception]:
        """Prompts with answers as tokens, and where this model judges each: `LocalScorer` takes this."""
        found: list[Encoded | Exception] = []
        for (_, answer), rendered in zip(items, render_answers(self.renderer, items), strict=True):
            try:
                if isinstance(rendered, RenderError):
                    raise rendered
                if self.format.kind == "outcome":
                    found.append(judged_at_end(rendered))
                else:
                    ends = step_ends(answer, self.format.separator)
                    found.append(judged_at_steps(self.tokenizer, rendered, answer, ends))
            except RenderError as error:  # one answer's failure is data
                found.append(error)
        return found

    def scorer(
        self, *, batch_tokens: int = 8192, inline: bool = False, dtype: torch.dtype | None = None
    ) -> LocalScorer:
        """A scorer for `grade.RewardModel`."""
        return LocalScorer(self.model, self.encode, batch_tokens=batch_tokens, inline=inline, dtype=dtype)


class _TokenizerAndFormat:
    """Writes both into the folder while it is still unfinished, so that the whole appears at once."""

    def __init__(self, tokenizer: Tokenizer, form: RewardFormat) -> None:
        self.pad_id = tokenizer.pad_id
        self._tokenizer = tokenizer
        self._form = form

    def save(self, folder: Path) -> None:
        self._tokenizer.save(folder)
        (folder / FORMAT_FILE).write_bytes(self._form.to_json() + b"\n")


def load_reward(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    template: Path | None = None,
    seed: int = 0,
) -> RewardPolicy:
    """A reward model from its folder, or a language model with a fresh head.

    Args:
        name_or_path: folder of `…ForSequenceClassification` or of a language model, or a Hugging Face name.
        device: "cpu", "cuda" …
        dtype: of the trunk's weights.
        template: a chat template file that replaces the folder's own.
        seed: of a fresh head.

    Raises:
        ModelError: the folder lacks something, or the tokenizer knows more ids than the model has rows.
    """
    folder = models.resolve(name_or_path)
    model = models.load_scored(folder, dtype=dtype, device=device, seed=seed)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer gives ids up to {tokenizer.vocab_size - 1}, "
            f"the model has embeddings for {model.config.vocab_size}"
        )
    text = template.read_text(encoding="utf-8") if template else None
    path = folder / FORMAT_FILE
    form = RewardFormat.from_json(path.read_bytes(), str(path)) if path.exists() else RewardFormat()
    return RewardPolicy(model, tokenizer, Renderer(tokenizer, text), folder, form)


def judged_at_end(rendered: Rendered) -> Encoded:
    """The sequence up to the token that ends the answer, judged there: exactly what a sampler would have written.

    What a template writes after the end of the turn (a line feed) is left out.

    Raises:
        RenderError: no token is the answer's.
    """
    if not any(rendered.mask):
        raise RenderError("no token of the rendered conversation is the answer's, so there is nothing to judge")
    last = len(rendered.mask) - 1 - rendered.mask[::-1].index(True)
    return Encoded(rendered.tokens[: last + 1], (last,))


def step_ends(answer: str, separator: str) -> list[int]:
    """Where the steps of an answer end, in characters, each with its separator; blank steps belong to the one before.

    Raises:
        RenderError: nothing but blanks.
    """
    ends: list[int] = []
    at = 0
    for piece in answer.split(separator):
        end = min(len(answer), at + len(piece) + len(separator))
        if piece.strip() or not ends:
            ends.append(end)
        else:
            ends[-1] = end
        at = end
    if not answer.strip():
        raise RenderError("the answer is empty, so it has no step to judge")
    return ends


def judged_at_steps(tokenizer: Tokenizer, rendered: Rendered, answer: str, ends: Sequence[int]) -> Encoded:
    """The sequence up to the answer's end, judged at the token with the last character of each step's separator; the
    last step at the token that ends the answer.

    Args:
        rendered: prompt and answer; its mask covers the answer and what ends it.
        answer: the answer's text, as it stands in the rendering.
        ends: character offsets in `answer` at which its steps end, ascending.

    Raises:
        RenderError: the template changes the answer, so that its steps cannot be found; or two steps end in one token.
    """
    tokens, (last,) = judged_at_end(rendered)
    first = rendered.mask.index(True)
    written = tokens[first:]
    text = tokenizer.decode(written)
    begin = text.find(answer)
    if begin < 0:
        raise RenderError("the rendered answer is not the text that was given, so its steps cannot be found")

    def reach(count: int) -> int:
        """How far the first tokens reach, in characters; a character cut in two is not there yet."""
        return len(tokenizer.decode(written[:count]).rstrip("\ufffd"))

    positions = []
    for end in ends[:-1]:
        fewest = bisect_left(range(len(written) + 1), begin + end, key=reach)
        positions.append(first + fewest - 1)
    positions.append(last)
    if len(set(positions)) < len(positions) or positions != sorted(positions):
        raise RenderError(f"{len(positions)} steps end in {len(set(positions))} tokens; choose another separator")
    return Encoded(tokens, tuple(positions))


def render_answers(
    renderer: Renderer, items: Sequence[tuple[Task, str | tuple[Message, ...]]]
) -> list[Rendered | RenderError]:
    """Each task's prompt with an answer to it as tokens, conversations in one call of the chat template.

    The mask covers the answer. An item that cannot be rendered is an error in its place.
    """
    found: list[Rendered | RenderError] = [RenderError("not rendered")] * len(items)
    chats: dict[int, list[Message]] = {}
    for index, (task, answer) in enumerate(items):
        if not isinstance(task.prompt, str):
            turns = (Message(role="assistant", content=answer),) if isinstance(answer, str) else answer
            context = [m.replace(train=False) if m.role == "assistant" else m for m in task.prompt]
            chats[index] = [*context, *turns]
            continue
        try:
            found[index] = renderer.completion_pair(task, answer)
        except RenderError as error:  # one row's failure is data
            found[index] = error
    if chats:
        tools = [items[index][0].tools for index in chats]
        rendered_chats = renderer.try_render_many(list(chats.values()), tools=tools)
        for index, rendered in zip(chats, rendered_chats, strict=True):
            found[index] = rendered
    return found
