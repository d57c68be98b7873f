"""LocalScorer: answers to rewards by a scored decoder here, many at once.

Items that wait at the same time, from however many callers, share packed rows: sequences end to end, none of which
sees another, so that padding costs nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from posttrain.core import ConfigError, EngineError, Task
from posttrain.models import ScoredDecoder


class Encoded(NamedTuple):
    """A prompt with its answer as tokens, and where the model is to judge."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]  # ascending: the last token of an outcome, the last of each step of a process


Scored = tuple[float, ...] | Exception
"""What became of one item: its numbers, or why there are none."""

Encode = Callable[[Sequence[tuple[Task, str]]], Sequence[Encoded | Exception]]
"""From tasks and answers to tokens, many at once; an item that cannot be encoded is an exception in its place."""


class LocalScorer:
    """Scores texts with a `ScoredDecoder`; implements `grade.ScoreText`.

    Args:
        model: the reward model; put into evaluation mode.
        encode: from tasks and answers to tokens and the places that are judged.
        batch_tokens: tokens of one packed row, at most; a longer item goes alone.
        wait_s: how long an item waits for others to share its row, seconds.
        inline: compute in the thread that asks. A training loop has one pool of threads then; the event loop stands
            still meanwhile.
        dtype: of matrix products, under autocast; None: that of the weights.
    """

    def __init__(
        self,
        model: ScoredDecoder,
        encode: Encode,
        *,
        batch_tokens: int = 8192,
        wait_s: float = 0.002,
        inline: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_tokens < 1 or wait_s < 0:
            raise ConfigError(
                f"scorer: batch_tokens must be above 0 and wait_s 0 or more, not {batch_tokens}, {wait_s}"
            )
        self.model = model.eval()
        self.encode = encode
        self.batch_tokens = batch_tokens
        self.num_batches = 0  # packed rows computed so far
        self._wait_s = wait_s
        self._inline = inline
        self._dtype = dtype
        self._waiting: list[tuple[tuple[Task, str], asyncio.Future[Scored]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Task[None] | None = None

    async def score(self, items: Sequence[tuple[Task, str]]) -> list[Scored]:
        """The numbers of each item, in order; an exception in place of an item that cannot be scored.

        A caller that gives up (a deadline) leaves the others' rows as they are.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # what waited in a loop that ended has nobody to wait for it
            self._loop, self._waiting, self._running = loop, [], None
        futures: list[asyncio.Future[Scored]] = [loop.create_future() for _ in items]
        self._waiting += zip(items, futures, strict=True)
        if self._waiting and (self._running is None or self._running.done()):
            self._running = loop.create_task(self._run())
        return list(await asyncio.gather(*futures))

    def score_now(self, items: Sequence[tuple[Task, str]]) -> list[Scored]:
        """`score` for callers without an event loop; blocks."""
        found: list[Scored] = [EngineError("not scored")] * len(items)
        sound: dict[int, Encoded] = {}
        for index, encoded in enumerate(self.encode(items)):
            problem = encoded if isinstance(encoded, Exception) else self._problem(encoded)
            if problem is not None:
                found[index] = problem
            elif isinstance(encoded, Encoded):
                sound[index] = encoded
        for index, values in zip(sound, self.score_tokens(list(sound.values())), strict=True):
            found[index] = values
        return found

    def score_tokens(self, items: Sequence[Encoded]) -> list[Scored]:
        """The numbers of sequences that are tokens already: one packed forward pass for each row; blocks."""
        found: list[Scored] = [EngineError("not scored")] * len(items)
        for members in self._rows([len(item.tokens) for item in items]):
            for index, values in zip(members, self._forward([items[index] for index in members]), strict=True):
                found[index] = values
        return found

    async def _run(self) -> None:
        """Serve what waits until nothing does."""
        await asyncio.sleep(self._wait_s)
        while self._waiting:
            batch = [(item, future) for item, future in self._waiting if not future.done()]
            self._waiting = []
            items = [item for item, _ in batch]
            try:
                found = self.score_now(items) if self._inline else await asyncio.to_thread(self.score_now, items)
            except Exception as error:  # noqa: BLE001  a forward pass that fails is every waiting item's failure
                found = [EngineError(f"the reward model failed: {type(error).__name__}: {error}")] * len(batch)
            for (_, future), values in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(values)

    def _problem(self, encoded: Encoded) -> EngineError | None:
        num, limit, vocabulary = len(encoded.tokens), self.model.config.max_positions, self.model.config.vocab_size
        if num > limit:
            return EngineError(f"{num} tokens, but the reward model has {limit} positions")
        if not encoded.positions or not all(0 <= place < num for place in encoded.positions):
            return EngineError(f"nothing to judge: {num} tokens, judged at {list(encoded.positions)[:5]}")
        if min(encoded.tokens) < 0 or max(encoded.tokens) >= vocabulary:
            return EngineError(f"a token id is outside the reward model's vocabulary of {vocabulary}")
        return None

    def _rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which items share a row: longest first, so that those of a row are of similar length."""
        rows: list[list[int]] = []
        room = 0
        for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
            if not rows or lengths[index] > room:
                rows.append([])
                room = self.batch_tokens
            rows[-1].append(index)
            room -= lengths[index]
        return rows

    @torch.inference_mode()
    def _forward(self, items: Sequence[Encoded]) -> list[Scored]:
        device = self.model.score.weight.device
        tokens_N = torch.tensor([token for item in items for token in item.tokens], device=device)
        lengths = [len(item.tokens) for item in items]
        autocast = nullcontext() if self._dtype is None else torch.autocast(device.type, self._dtype)
        with autocast:
            scores = self.model.score_packed(tokens_N, lengths).float().cpu().tolist()
        self.num_batches += 1
        found: list[Scored] = []
        start = 0
        for item, length in zip(items, lengths, strict=True):
            values = tuple(scores[start + place] for place in item.positions)
            finite = all(math.isfinite(value) for value in values)
            found.append(values if finite else EngineError(f"the reward model's scores are {values[:5]}"))
            start += length
        return found
