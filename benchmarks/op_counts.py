"""What a piece of work asks of PyTorch, counted: operators, bytes of new tensors, oneDNN primitives, Python calls.

Counts do not depend on what else the machine does, so a change of a few per cent is visible where time is too noisy.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Counts:
    """One piece of work; differences and parts of it may be fractions."""

    ops: float  # operators dispatched, views included
    new_bytes: float  # of tensors whose storage none of the operator's arguments had
    onednn: float  # primitives executed
    onednn_created: float  # primitives compiled
    python_calls: float  # of functions, built-in ones included

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(mine - yours for mine, yours in zip(self.values(), other.values(), strict=True)))

    def __truediv__(self, parts: int) -> Counts:
        return Counts(*(value / parts for value in self.values()))

    def values(self) -> tuple[float, ...]:
        """The numbers in order."""
        return tuple(asdict(self).values())


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.new_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops[str(func)] += 1
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known:
                self.new_bytes += leaf.numel() * leaf.element_size()
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def count(work: Callable[[], object]) -> tuple[Counts, Counter[str]]:
    """Do the work three times, counting something else each time: operators; primitives; calls.

    Returns:
        The counts, and how often each operator was dispatched.
    """
    with _Dispatched() as dispatched:
        work()
    with _captured_stdout() as lines, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        work()
    executed = sum(",exec," in line for line in lines)
    created = sum(",create:cache_miss," in line for line in lines)
    profile = cProfile.Profile()
    profile.runcall(work)
    calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    counts = Counts(sum(dispatched.ops.values()), dispatched.new_bytes, executed, created, calls)
    return counts, dispatched.ops


@contextmanager
def _captured_stdout() -> Iterator[list[str]]:
    """The lines that C code prints meanwhile; filled at the end."""
    lines: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            _flush_c()
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()


def _flush_c() -> None:
    import ctypes

    ctypes.CDLL(None).fflush(None)
