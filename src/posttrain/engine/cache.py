"""Where keys and values live: one slot per running row, and a prompt's own while it is being read.

L layers, N rows, S slots, J key–value heads, H query heads, T tokens of this call, M tokens of capacity, C tokens
attended to, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SlotCache:
    """Preallocated keys and values of every slot; running rows occupy the slots 0 … N-1, without holes."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_slots, num_kv_heads, max_length, head_dim)
        # Zeros, not empty: what lies beyond a row's length is masked, but 0 × NaN would still be NaN.
        self.keys: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_slots, self.num_kv_heads, self.max_length, self.head_dim = shape
        self.device, self.dtype = device, dtype

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for store in (self.keys, self.values):
            for layer in store:
                layer[target, :, :length].copy_(layer[source, :, :length])

    def fill(self, slots: Sequence[int], prompt: PromptCache, rows: Sequence[int], length: int) -> None:
        """Copy prompts into slots: row `rows[i]` of the prompt cache goes to `slots[i]`."""
        first, num = slots[0], len(slots)
        in_order = list(slots) == list(range(first, first + num))
        chosen = None
        if list(rows) != list(range(prompt.num_rows)):
            chosen = torch.tensor(rows, device=self.device)
        for ours, theirs in ((self.keys, prompt.keys), (self.values, prompt.values)):
            for layer, new_NJMK in zip(ours, theirs, strict=True):
                source = new_NJMK[:, :, :length]
                if chosen is not None:
                    source = source.index_select(0, chosen)
                if in_order:
                    layer[first : first + num, :, :length].copy_(source)
                else:
                    for slot, row in zip(slots, source, strict=True):
                        layer[slot, :, :length].copy_(row)

    def copy(self, slot: int, length: int) -> PromptCache:
        """A slot's first `length` tokens, on their own."""
        alone = PromptCache(len(self.keys), 1)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            alone.put(layer, keys[slot : slot + 1, :, :length].clone(), values[slot : slot + 1, :, :length].clone())
        return alone

    def scrub(self, slot: int) -> None:
        """Zero a slot whose row failed, so that its NaNs reach nobody."""
        for store in (self.keys, self.values):
            for layer in store:
                layer[slot].zero_()


class PromptCache:
    """Keys and values of prompts while they are read, in one pass or chunk by chunk."""

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self._slots: list[Tensor | None] = [None] * (2 * num_layers)
        self._num_layers = num_layers

    @property
    def keys(self) -> list[Tensor]:
        """L tensors NJMK."""
        return [tensor for tensor in self._slots[: self._num_layers] if tensor is not None]

    @property
    def values(self) -> list[Tensor]:
        """L tensors NJMK."""
        return [tensor for tensor in self._slots[self._num_layers :] if tensor is not None]

    def put(self, layer: int, keys_NJMK: Tensor, values_NJMK: Tensor) -> None:
        """Take a layer's tensors as they are, without a copy."""
        self._slots[layer], self._slots[self._num_layers + layer] = keys_NJMK, values_NJMK

    def get(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """A layer's keys and values, None where it has none yet."""
        keys, values = self._slots[layer], self._slots[self._num_layers + layer]
        return None if keys is None or values is None else (keys, values)

    def row(self, row: int, length: int) -> PromptCache:
        """One row's first `length` tokens, copied, so that the rest can be freed."""
        alone = PromptCache(self._num_layers, 1)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            alone.put(layer, keys[row : row + 1, :, :length].clone(), values[row : row + 1, :, :length].clone())
        return alone
