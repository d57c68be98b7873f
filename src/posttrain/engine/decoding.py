"""Decoding through PyTorch: the slot cache, one forward pass of single tokens, and drawing from its logits.

N running rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.engine.attention import SingleTokens
from posttrain.engine.blocks import KeyStore
from posttrain.engine.cache import PromptCache, SlotCache
from posttrain.engine.draws import Drawn
from posttrain.engine.graphs import CudaRecorder, Record, StepGraphs
from posttrain.engine.prefill import ReadPrompt
from posttrain.engine.rows import Rows
from posttrain.engine.sampling import Sampled, sample
from posttrain.engine.uniforms import uniforms
from posttrain.models import Decoder

Slots = NDArray[np.int64]


class Decoding(Protocol):
    """Where running rows have their keys and values, and how they get their next token."""

    def refresh(self, model: Decoder, *, changed: bool = False) -> None:
        """Take the weights as they are now."""
        ...

    def first(self, slots: Slots, prompts: Sequence[ReadPrompt]) -> Drawn:
        """Put rows that start on their prompts, and draw their first tokens."""
        ...

    def running(self) -> Slots:
        """Slots in the order in which `decode` takes them."""
        ...

    def decode(self) -> Drawn:
        """One token for each of the `running` rows, whose last tokens are cached afterwards."""
        ...

    def compact(self) -> None:
        """Make up for rows that have ended, before `running` and `decode`."""
        ...

    def store(self, slot: int, length: int) -> PromptCache | KeyStore:
        """What a row has cached, on its own."""
        ...

    def scrub(self, slot: int) -> None:
        """Forget what a failed row has cached."""
        ...

    def release(self, slot: int) -> None:
        """A row has ended."""
        ...


class PlainDecoding:
    """Running rows are the first slots, without holes, so that a step's tensors are slices.

    On CUDA steps are recorded and replayed, and the host waits for the device once a step: for the drawn tokens.
    """

    def __init__(self, model: Decoder, rows: Rows, max_length: int, record: Record | None = None) -> None:
        """Lay out the cache. `record`: how steps are recorded; None: as CUDA graphs on CUDA, else not at all."""
        config, weight = model.config, next(model.parameters())
        self.model, self.device = model, weight.device
        self._rows = rows
        self.cache = SlotCache(
            num_layers=config.num_layers,
            num_slots=len(rows.rows),
            num_kv_heads=config.num_kv_heads,
            max_length=max_length,
            head_dim=config.head_dim,
            dtype=weight.dtype,
            device=self.device,
        )
        if record is None and self.device.type == "cuda":
            record = CudaRecorder()
        self.graphs: StepGraphs | None = None
        if record is not None:
            self.graphs = StepGraphs(
                self._forward, num_slots=len(rows.rows), max_length=max_length, device=self.device, record=record
            )

    def refresh(self, model: Decoder, *, changed: bool = False) -> None:
        """Take the weights as they are now. Those of the same decoder are where they were."""
        if model is not self.model and self.graphs is not None:
            self.graphs.clear()
        self.model = model

    def first(self, slots: Slots, prompts: Sequence[ReadPrompt]) -> Drawn:
        """Put rows that start on their prompts, and draw their first tokens."""
        by_cache: dict[int, tuple[PromptCache, list[int], list[ReadPrompt]]] = {}
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            assert isinstance(prompt.cache, PromptCache), "PyTorch reads into whole tensors"
            _, some, theirs = by_cache.setdefault(id(prompt.cache), (prompt.cache, [], []))
            some.append(slot)
            theirs.append(prompt)
        for cache, some, theirs in by_cache.values():
            self.cache.fill(some, cache, [p.row for p in theirs], max(p.length for p in theirs))
        return self.draw(torch.stack([prompt.logits_V for prompt in prompts]), slots, whole=False)

    def running(self) -> Slots:
        """The first slots."""
        return np.arange(self._rows.num)

    def decode(self) -> Drawn:
        """One token for every running row."""
        num = self._rows.num
        table = self._rows.table[:num]
        if self.graphs is not None:
            logits_NV = self.graphs.run(table["last"].copy(), table["length"].copy())
            table["length"] += 1
            return self.draw(logits_NV, np.arange(num), whole=True)
        width = self._width()
        lengths, last = np.zeros(width, np.int64), np.zeros(width, np.int64)
        lengths[:num], last[:num] = table["length"], table["last"]
        logits_NV = self.logits(lengths, last)[:num]
        table["length"] += 1
        return self.draw(logits_NV, np.arange(num), whole=True)

    def logits(self, lengths: Slots, last: Slots) -> Tensor:
        """One forward pass: row i has `lengths[i]` tokens cached and goes on with token `last[i]`."""
        longest = int(lengths.max())
        lengths_N = torch.from_numpy(lengths).to(self.device)
        tokens_N1 = torch.from_numpy(last).to(self.device)[:, None]
        attend = SingleTokens(self.cache, lengths_N, longest, ragged=int(lengths.min()) != longest)
        hidden_N1D = self.model.hidden(tokens_N1, positions_BT=lengths_N[:, None], attend=attend)
        return self.model.logits(hidden_N1D[: self._rows.num, 0])

    def _forward(self, tokens_N1: Tensor, lengths_N: Tensor, capacity: int) -> Tensor:
        """The same in shapes that do not depend on the rows' lengths."""
        attend = SingleTokens(self.cache, lengths_N, capacity - 1, ragged=True)
        hidden_N1D = self.model.hidden(tokens_N1, positions_BT=lengths_N[:, None], attend=attend)
        return self.model.logits(hidden_N1D[:, 0])

    def draw(self, logits_NV: Tensor, slots: Slots, *, whole: bool) -> Drawn:
        """A token per slot. `whole`: the slots are all running rows."""
        table = self._rows.table
        uniforms_N = torch.from_numpy(uniforms(table["seed"][slots], table["generated"][slots])).to(self.device)
        how = self._rows.sampling(self.device) if whole else self._rows.sampling_of(slots, self.device)
        drawn = sample(logits_NV, uniforms_N, how)
        # One copy to the host per step; float64 holds every token id exactly.
        columns = torch.stack(
            [x.double() for x in (drawn.tokens_N, drawn.logprobs_N, drawn.policy_logprobs_N, drawn.valid_N)]
        ).cpu()
        tokens, logprobs, policy_logprobs, valid = columns.numpy()
        return Drawn(
            tokens_N=tokens.astype(np.int64),
            logprobs_N=logprobs,
            policy_logprobs_N=policy_logprobs,
            valid_N=valid != 0,
            tops=None if drawn.top_ids_NK is None else _top_logprobs(drawn),
        )

    def compact(self) -> None:
        """Fill the holes that finished rows left."""
        for source, target in self._rows.holes():
            self.cache.move(source, target, int(self._rows.table["length"][source]))
            self._rows.move(source, target)
        self._rows.num = self._rows.num_running

    def store(self, slot: int, length: int) -> PromptCache:
        """What a row has cached, on its own."""
        return self.cache.copy(slot, length)

    def scrub(self, slot: int) -> None:
        """Forget what a failed row has cached."""
        self.cache.scrub(slot)

    def release(self, slot: int) -> None:
        """Nothing to do: the next row writes over it."""

    def _width(self) -> int:
        """Rows to decode: the running ones, on a CPU in bf16 a few idle slots more.

        oneDNN compiles and keeps a product for every shape: with each number of rows its own, a run spends more time on
        that than on products, and grows by megabytes a step.
        """
        num = self._rows.num
        if self.device.type != "cpu" or self.cache.dtype != torch.bfloat16:
            return num
        multiple = 8 if num <= 64 else 32
        return min(-(-num // multiple) * multiple, len(self._rows.rows))


def _top_logprobs(drawn: Sampled) -> list[list[tuple[int, float]]]:
    """Per row, (token, logprob) from the most likely down."""
    assert drawn.top_ids_NK is not None
    assert drawn.top_logprobs_NK is not None
    pairs = zip(drawn.top_ids_NK.tolist(), drawn.top_logprobs_NK.tolist(), strict=True)
    return [list(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
