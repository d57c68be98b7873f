"""The room's pieces of C, as Python functions of tensors.

Every function takes contiguous tensors on the CPU and knows no gradients: `fused` and `token_stats_tiled` do.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from posttrain.models.native import load_native

_MACROS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, dict[str, tuple[type, ...]]] = {
    "layer_pieces": {
        "rms_norm": (*(_POINTER,) * 4, _LONG, _LONG, _FLOAT, _INT),
        "rms_norm_backward": (*(_POINTER,) * 7, _LONG, _LONG, _INT),
        "norm_heads": (*(_POINTER,) * 5, *(_LONG,) * 6, _FLOAT, _INT),
        "norm_heads_backward": (*(_POINTER,) * 7, *(_LONG,) * 6, _INT),
        "residual_sum": (*(_POINTER,) * 3, _LONG, _INT),
        "gather_rows": (*(_POINTER,) * 3, _LONG, _LONG, _INT),
        "add_rows": (*(_POINTER,) * 3, _LONG, _LONG, _INT),
        "round_off": (*(_POINTER,) * 2, _LONG, _INT),
        "silu_gate": (*(_POINTER,) * 2, _LONG, _LONG, _INT),
        "silu_gate_backward": (*(_POINTER,) * 3, _LONG, _LONG, _INT),
    },
    "packed_attention": {
        "packed_attention": (*(_POINTER,) * 4, *(_LONG,) * 5, *(_POINTER,) * 2, _INT),
        "packed_attention_backward": (*(_POINTER,) * 4, *(_LONG,) * 5, *(_POINTER,) * 4, _INT),
    },
    "prefix_attention": {
        "prefix_supported": (_INT,),
        "prefix_attention": (*(_POINTER,) * 5, *(_LONG,) * 4, *(_POINTER,) * 2, _INT),
        "prefix_attention_backward": (*(_POINTER,) * 5, *(_LONG,) * 4, *(_POINTER,) * 4, _INT),
    },
    "layer_products": {
        "products_supported": (_INT,),
        "project_rows": (*(_POINTER,) * 4, *(_LONG,) * 3, _INT),
        "pull_back_rows": (*(_POINTER,) * 3, *(_LONG,) * 3, _INT),
        "project_gradient": (*(_POINTER,) * 4, *(_LONG,) * 3, _INT, _INT),
    },
    "head_tiles": {
        "head_supported": (_INT,),
        "head_forward": (*(_POINTER,) * 7, *(_LONG,) * 4, _FLOAT, _INT),
        "head_backward": (*(_POINTER,) * 8, *(_LONG,) * 5, _FLOAT, _INT),
        "weight_gradient": (_POINTER, _LONG, _POINTER, _LONG, _POINTER, *(_LONG,) * 3, _INT, _INT),
        "add_product": (*(_POINTER,) * 3, *(_LONG,) * 3, _INT),
    },
}
PARTS = 64  # of the sums over rows, as in layer_pieces.c
_WORTH_THREADS = 1 << 14  # numbers below which starting a second thread takes longer than the work


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """A C file of this folder, compiled for one type of matrix products; None where it cannot be had."""
    if dtype not in _MACROS:
        return None
    found = load_native(Path(__file__).with_name(f"{name}.c"), _MACROS[dtype])
    if found is not None:
        for function, arguments in _SIGNATURES[name].items():
            if hasattr(found, function):  # where the processor lacks what it needs, it is not compiled
                getattr(found, function).argtypes = arguments
    return found


def call(name: str, dtype: torch.dtype, function: str, *arguments: Tensor | int | float | None, work: int) -> int:
    """Call a C function: tensors become pointers, and the number of threads is added, by the numbers to be worked on.

    Raises:
        RuntimeError: the library cannot be had; callers ask `library` first.
    """
    lib = library(name, dtype)
    if lib is None:
        raise RuntimeError(f"{name}: no native library")
    threads = torch.get_num_threads() if work > _WORTH_THREADS else 1
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    status: int = getattr(lib, function)(*plain, threads)
    return status
