"""What the machine multiplies at best: the rate of the fastest large matrix product in fp32 and in bf16.

Several shapes and several ways to the product, because libraries differ: on AMD processors MKL, behind `@` in fp32,
reaches half of what oneDNN does. A share of peak is stated against the best of them. Needs torch alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SHAPES = ((2048, 2048, 2048), (4096, 1024, 4096), (1024, 4096, 1024), (8192, 512, 2048))  # M, K, N
REPEATS = 3


def matmul_peak() -> dict[str, float]:
    """Floating-point operations per second of the best product, by dtype."""
    with torch.inference_mode():
        return {name: _best(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}


def _best(dtype: torch.dtype) -> float:
    best = 0.0
    for rows, inner, columns in SHAPES:
        x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        for product in _products(x, weight):
            product()
            for _ in range(REPEATS):
                started_s = time.perf_counter()
                product()
                best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started_s))
    return best


def _products(x: Tensor, weight: Tensor) -> Iterator[Callable[[], Tensor]]:
    yield lambda: torch.nn.functional.linear(x, weight)
    if torch.backends.mkldnn.is_available() and x.dtype == torch.float32:
        packed, packed_weight = x.to_mkldnn(), weight.to_mkldnn()
        yield lambda: torch._C._nn.mkldnn_linear(packed, packed_weight)
