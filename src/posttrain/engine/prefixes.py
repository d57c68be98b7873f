"""Finished conversations whose keys and values are kept, so that the next turn reads only what is new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from posttrain.core import content_hash
from posttrain.engine.blocks import KeyStore
from posttrain.engine.cache import PromptCache

Kept = PromptCache | KeyStore

# Prefixes are found at multiples of this many tokens: fewer keys to hold, at most this many tokens read twice.
_BLOCK = 16


class PrefixStore:
    """Token sequences with their keys and values, oldest use dropped first."""

    def __init__(self, capacity: int) -> None:
        """Take how many tokens to keep in all; 0 keeps nothing."""
        self.capacity = capacity
        self.num_tokens = 0
        self.num_hits = 0
        self.num_hit_tokens = 0
        self._entries: OrderedDict[str, tuple[tuple[int, ...], Kept]] = OrderedDict()
        self._owners: dict[int, str] = {}  # hash of a block-aligned prefix → the newest entry that begins with it

    def put(self, tokens: Sequence[int], cache: Kept) -> None:
        """Keep a sequence; `cache` has one row, which holds exactly these tokens."""
        kept = tuple(tokens)
        if not _BLOCK <= len(kept) <= self.capacity:
            return
        key = content_hash(kept)
        self._drop(key)
        while self.num_tokens + len(kept) > self.capacity:
            self._drop(next(iter(self._entries)))
        self._entries[key] = (kept, cache)
        self.num_tokens += len(kept)
        for end in range(_BLOCK, len(kept) + 1, _BLOCK):
            self._owners[hash(kept[:end])] = key

    def longest(self, prompt: Sequence[int]) -> tuple[Kept, int] | None:
        """The stored sequence that shares most of the prompt's beginning, and how many tokens of it.

        At least one token of the prompt is left to read: its logits are needed.
        """
        if not self._entries:
            return None
        for end in range((len(prompt) - 1) // _BLOCK * _BLOCK, 0, -_BLOCK):
            key = self._owners.get(hash(tuple(prompt[:end])))
            entry = None if key is None else self._entries.get(key)
            if key is None or entry is None or entry[0][:end] != tuple(prompt[:end]):
                continue
            shared = end
            limit = min(len(entry[0]), len(prompt) - 1)
            while shared < limit and entry[0][shared] == prompt[shared]:
                shared += 1
            self._entries.move_to_end(key)
            self.num_hits += 1
            self.num_hit_tokens += shared
            return entry[1], shared
        return None

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self._entries.clear()
        self._owners.clear()
        self.num_tokens = 0

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.num_tokens -= len(entry[0])
        for end in range(_BLOCK, len(entry[0]) + 1, _BLOCK):
            prefix = hash(entry[0][:end])
            if self._owners.get(prefix) == key:
                del self._owners[prefix]
