"""Memory in large pages: weights and caches that are read from end to end at every step.

With pages of 4 kB the processor looks up a new address for every 64 cache lines, and its own reading ahead ends there.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 32 << 20  # bytes that small tensors share


def huge_zeros(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros, in pages as large as the system gives; memory that is never touched is never taken."""
    size = math.prod(shape) * dtype.itemsize
    if size < 2 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.frombuffer(_pages(size), dtype=dtype, count=math.prod(shape)).view(tuple(shape))


class Arena:
    """Room for many tensors that live equally long, side by side in large pages."""

    def __init__(self) -> None:
        self._chunk = torch.zeros(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, contiguous and at the beginning of a cache line."""
        size = tensor.numel() * tensor.element_size()
        if self._used + size > len(self._chunk):
            self._chunk, self._used = huge_zeros([max(size, _CHUNK)], torch.uint8), 0
        copy = self._chunk[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // 64) * 64
        return copy.copy_(tensor)


def _pages(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a kernel without them: small pages do
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
