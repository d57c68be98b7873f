"""The engine's pieces of C, as Python functions."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from posttrain.models import load_native

_MACROS = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
_LONG = ctypes.c_long
_POINTER = ctypes.c_void_p
_ARGUMENTS = (
    *(_POINTER, _LONG) * 3,  # queries, new keys, new values, each with its row stride
    *(_POINTER, _POINTER, _LONG, _LONG),  # the cache's keys and values, strides of slot and head
    *(_POINTER, _POINTER),  # lengths, output
    *(_LONG,) * 5,  # rows, J, G, K, window
    ctypes.c_int,  # threads
)


@functools.cache
def decode_attention(dtype: torch.dtype) -> Callable[..., int] | None:
    """Attention of one query per row over a ragged cache, for one type of cache; None where it cannot be had."""
    if dtype not in _MACROS:
        return None
    library = load_native(Path(__file__).with_name("decode_attention.c"), _MACROS[dtype])
    if library is None:
        return None
    kernel: Callable[..., int] = library.decode_attention
    kernel.argtypes = _ARGUMENTS  # type: ignore[attr-defined]
    kernel.restype = ctypes.c_int  # type: ignore[attr-defined]
    return kernel
