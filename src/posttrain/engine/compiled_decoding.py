"""Decoding through the compiled forward pass: which rows go together, and how their tokens are drawn.

N running rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.engine.blocks import BlockCache, BlockShape, KeyStore
from posttrain.engine.compiled import CompiledDecoder
from posttrain.engine.draws import Drawn
from posttrain.engine.prefill import ReadPrompt
from posttrain.engine.rows import Rows
from posttrain.engine.uniforms import uniforms
from posttrain.models import Decoder

# With a vocabulary up to this, all logits are kept, so that none need be computed twice.
_SMALL_VOCAB = 4096

Slots = NDArray[np.int64]


class CompiledDecoding:
    """Running rows in blocks of keys and values; siblings read their prompt's together. Rows never move."""

    def __init__(self, compiled: CompiledDecoder, model: Decoder, rows: Rows, max_length: int) -> None:
        self._compiled, self._rows = compiled, rows
        num_slots = len(rows.rows)
        self.cache = BlockCache(BlockShape.of(model.config), num_slots, max_length)
        self._keeps_all = model.config.vocab_size <= _SMALL_VOCAB
        self._logits = compiled.buffer(num_slots if self._keeps_all else 1)
        self._draws = compiled.draws(num_slots)
        self._first = compiled.draws(num_slots)
        self._seen = -1  # the rows' count of changes that the columns below belong to
        self._slots: Slots = np.zeros(0, np.int64)
        self._seeds = np.zeros(0, np.uint64)
        self._tops: list[tuple[int, int, int]] = []  # place, row of logits and number of those who want likely tokens

    def refresh(self, model: Decoder, *, changed: bool = False) -> None:
        """Take the weights as they are now."""
        self._compiled.refresh(model, changed=changed)

    def first(self, slots: Slots, prompts: Sequence[ReadPrompt]) -> Drawn:
        """Put rows that start on their prompts, and draw their first tokens."""
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            assert isinstance(prompt.cache, KeyStore), "the compiled pass reads into stores"
            self.cache.fill([slot], prompt.cache, prompt.length)
        table = self._rows.table[slots]
        draws = self._first
        draws.set(table)
        draws.columns["uniforms"][: len(slots)] = uniforms(table["seed"], table["generated"])
        self._compiled.draw([prompt.logits_V for prompt in prompts], draws)
        wanted = [(place, place, int(most)) for place, most in enumerate(table["num_top"].tolist()) if most]
        tops = (
            _top_logprobs(torch.stack([prompt.logits_V for prompt in prompts]), wanted, len(slots)) if wanted else None
        )
        return draws.drawn(len(slots), tops)

    def running(self) -> Slots:
        """Slots in the order in which `decode` takes them: siblings side by side."""
        if self._seen != self._rows.num_changes:
            self._arrange()
        return self._slots

    def decode(self) -> Drawn:
        """One token for each of the `running` rows."""
        slots = self.running()
        num = len(slots)
        table = self._rows.table
        positions = table["length"][slots]
        self._draws.columns["uniforms"][:num] = uniforms(self._seeds, table["generated"][slots])
        self._compiled.forward(
            self.cache.places, table["last"][slots], slots, positions, logits=self._logits, draws=self._draws
        )
        table["length"][slots] = positions + 1
        tops = _top_logprobs(self._kept_logits(), self._tops, num) if self._tops else None
        return self._draws.drawn(num, tops)

    def store(self, slot: int, length: int) -> KeyStore:
        """What a row has cached, on its own."""
        return self.cache.copy(slot, length)

    def scrub(self, slot: int) -> None:
        """Forget what a failed row has cached."""
        self.cache.scrub(slot)

    def release(self, slot: int) -> None:
        """A row has ended."""
        self.cache.release(slot)

    def compact(self) -> None:
        """Rows stay where they are."""

    def _arrange(self) -> None:
        table = self._rows.table
        slots = np.flatnonzero(table["running"])
        self._slots = slots[np.argsort(self.cache.places["shared"][slots], kind="stable")]
        mine = table[self._slots]
        self._seeds = mine["seed"].copy()
        self._draws.set(mine)
        num = len(mine)
        greedy = mine["temperature"] == 0
        truncated = ((mine["top_k"] > 0) | (mine["top_p"] < 1) | (mine["min_p"] > 0)) & ~greedy
        keeps = np.full(num, self._keeps_all) | truncated | (mine["num_top"] > 0)
        kept = np.where(keeps, np.cumsum(keeps) - 1, -1)
        self._draws.kept[:num] = kept
        if keeps.sum() > len(self._logits):
            self._logits = self._compiled.buffer(int(keeps.sum()))
        self._tops = [(int(at), int(kept[at]), int(mine["num_top"][at])) for at in np.flatnonzero(mine["num_top"])]
        self._seen = self._rows.num_changes

    def _kept_logits(self) -> Tensor:
        return self._logits[:, : self._compiled.vocab_size]


def _top_logprobs(logits_MV: Tensor, wanted: Sequence[tuple[int, int, int]], num: int) -> list[list[tuple[int, float]]]:
    """Per row, (token, logprob) from the most likely down; empty for rows that want none."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(num)]
    for place, row, most in wanted:
        logits_V = logits_MV[row]
        top_K, ids_K = logits_V.topk(min(most, len(logits_V)))
        logprobs = (top_K - logits_V.logsumexp(0)).tolist()
        found[place] = list(zip(ids_K.tolist(), logprobs, strict=True))
    return found
