"""Keys and values in blocks of tokens, as the compiled forward pass reads them; siblings share their prompt's.

L layers, S slots, J key-value heads, C blocks, E elements of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from posttrain.engine.huge import huge_zeros
from posttrain.models import DecoderConfig

BLOCK = 32  # tokens; BLOCK of block_attention.h
_LANES = 32  # a head is padded to a multiple

# `place` of block_attention.h: two addresses, and sizes in blocks.
PLACE = np.dtype([(name, np.int64) for name in ("own", "shared", "own_capacity", "shared_capacity", "num_shared")])


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the blocks of a decoder look like."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def of(config: DecoderConfig) -> BlockShape:
        """Of a decoder."""
        return BlockShape(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)

    @property
    def elements(self) -> int:
        """Of one block of keys, or of values, of one head."""
        return BLOCK * (-(-self.head_dim // _LANES) * _LANES)

    def empty(self, num_blocks: int, *leading: int) -> Tensor:
        """Zeros, not empty: what lies beyond a sequence's end is weighed with 0, but 0 × NaN would still be NaN."""
        return huge_zeros((*leading, self.num_layers, self.num_kv_heads, num_blocks, 2, self.elements))

    def tokens_of(self, blocks_LJC2E: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens as they are elsewhere, each L × J × tokens × head width."""
        layers, heads, num, _, _ = blocks_LJC2E.shape
        lanes = self.elements // BLOCK
        keys = blocks_LJC2E[:, :, :, 0, : BLOCK * self.head_dim].reshape(layers, heads, num, -1, BLOCK, 2)
        values = blocks_LJC2E[:, :, :, 1].reshape(layers, heads, num, lanes // _LANES, BLOCK // 2, _LANES, 2)
        keys = keys.transpose(3, 4).reshape(layers, heads, num * BLOCK, self.head_dim)
        values = values.permute(0, 1, 2, 4, 6, 3, 5).reshape(layers, heads, num * BLOCK, lanes)
        return keys[:, :, :length], values[:, :, :length, : self.head_dim]


class KeyStore:
    """One sequence's keys and values: a prompt that is read, or a conversation that is kept."""

    num_rows = 1

    def __init__(self, shape: BlockShape, num_tokens: int) -> None:
        """Room for so many tokens."""
        self.blocks_LJC2E = shape.empty(-(-num_tokens // BLOCK))

    @property
    def capacity(self) -> int:
        """In blocks."""
        return self.blocks_LJC2E.shape[2]

    def take(self, other: KeyStore, num_tokens: int) -> None:
        """Copy another's first tokens."""
        num = -(-num_tokens // BLOCK)
        self.blocks_LJC2E[:, :, :num].copy_(other.blocks_LJC2E[:, :, :num])


class BlockCache:
    """Preallocated keys and values of every slot, and which prompt's blocks each slot reads besides its own."""

    def __init__(self, shape: BlockShape, num_slots: int, max_length: int) -> None:
        self.shape = shape
        self.slots_SLJC2E = shape.empty(-(-max_length // BLOCK), num_slots)
        self.places = np.zeros(num_slots, dtype=PLACE)
        stride = self.slots_SLJC2E.stride(0) * self.slots_SLJC2E.element_size()
        self.places["own"] = self.slots_SLJC2E.data_ptr() + stride * np.arange(num_slots)
        self.places["own_capacity"] = self.slots_SLJC2E.shape[3]
        self._prompts: list[KeyStore | None] = [None] * num_slots  # alive as long as a slot reads them

    def fill(self, slots: Sequence[int], prompt: KeyStore, length: int) -> None:
        """Let slots go on from a prompt: its whole blocks are shared, the tokens after them copied."""
        num_shared, rest = divmod(length, BLOCK)
        for slot in slots:
            self._prompts[slot] = prompt
            place = self.places[slot]
            place["shared"] = prompt.blocks_LJC2E.data_ptr() if num_shared else 0
            place["shared_capacity"], place["num_shared"] = prompt.capacity, num_shared
            if rest:
                self.slots_SLJC2E[slot, :, :, 0].copy_(prompt.blocks_LJC2E[:, :, num_shared])

    def copy(self, slot: int, length: int) -> KeyStore:
        """A slot's first tokens, on their own."""
        alone = KeyStore(self.shape, length)
        num = alone.capacity
        num_shared = min(int(self.places[slot]["num_shared"]), num)
        prompt = self._prompts[slot]
        if prompt is not None:
            alone.take(prompt, num_shared * BLOCK)
        alone.blocks_LJC2E[:, :, num_shared:].copy_(self.slots_SLJC2E[slot, :, :, : num - num_shared])
        return alone

    def scrub(self, slot: int) -> None:
        """Zero a slot whose row failed, so that its NaNs reach nobody."""
        self.slots_SLJC2E[slot].zero_()

    def release(self, slot: int) -> None:
        """Forget the prompt of a slot whose row has ended."""
        self._prompts[slot] = None
        self.places[slot]["shared"] = self.places[slot]["num_shared"] = 0


def places_of(stores: Sequence[KeyStore]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Places of sequences that share nothing."""
    places = np.zeros(len(stores), dtype=PLACE)
    places["own"] = [store.blocks_LJC2E.data_ptr() for store in stores]
    places["own_capacity"] = [store.capacity for store in stores]
    return places
