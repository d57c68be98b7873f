"""What the compiled forward pass needs to draw tokens, and what it drew, in memory that it writes to.

N outputs, V vocabulary.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_FLOATS = ("uniforms", "temperatures", "top_p", "min_p")
_INTS = ("top_k", "tokens", "valid")
_ORDER = ("uniforms", "temperatures", "top_k", "top_p", "min_p", "tokens", "valid", "logprobs", "policy_logprobs")


class DrawsStruct(ctypes.Structure):
    """`draws` of draw.h."""

    _fields_ = [
        *((name, _POINTER) for name in (*_ORDER, "tops", "sums", "policy_sums")),
        ("num_chunks", _INT),
    ]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One token per row, on the host."""

    tokens_N: NDArray[np.int64]
    logprobs_N: NDArray[np.float32]  # of the distribution sampled from; 0 for greedy rows
    policy_logprobs_N: NDArray[np.float32]  # temperature 1, no truncation
    valid_N: NDArray[np.bool_]  # False where the logits hold NaN or +inf
    tops: list[list[tuple[int, float]]] | None = None  # the most likely tokens, where a row asked for them


class Draws:
    """Columns for as many outputs as there may be."""

    def __init__(self, size: int, num_chunks: int) -> None:
        self.columns: dict[str, NDArray[np.float64]] = {name: np.zeros(size) for name in _FLOATS}
        self.columns["top_p"][:] = 1.0
        self.ints = {name: np.zeros(size, np.int64) for name in _INTS}
        self.logprobs, self.policy_logprobs = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.kept = np.full(size, -1, np.int64)  # row of the logits that an output's are kept in
        self._sums = [np.zeros((size, num_chunks), np.float32) for _ in range(3)]
        arrays: dict[str, NDArray[Any]] = {
            **self.columns,
            **self.ints,
            "logprobs": self.logprobs,
            "policy_logprobs": self.policy_logprobs,
        }
        addresses = {name: arrays[name].ctypes.data for name in _ORDER}
        sums = dict(zip(("tops", "sums", "policy_sums"), (part.ctypes.data for part in self._sums), strict=True))
        self.struct = DrawsStruct(**addresses, **sums, num_chunks=num_chunks)

    def set(self, table: NDArray[np.void]) -> None:
        """How the first rows are drawn, from columns of that name."""
        num = len(table)
        for name, column in (("temperatures", "temperature"), ("top_p", "top_p"), ("min_p", "min_p")):
            self.columns[name][:num] = table[column]
        self.ints["top_k"][:num] = table["top_k"]

    def drawn(self, num: int, tops: list[list[tuple[int, float]]] | None = None) -> Drawn:
        """What was drawn for the first rows; good until the next draw."""
        return Drawn(
            tokens_N=self.ints["tokens"][:num],
            logprobs_N=self.logprobs[:num],
            policy_logprobs_N=self.policy_logprobs[:num],
            valid_N=self.ints["valid"][:num] != 0,
            tops=tops,
        )
