"""Which library multiplies fp32 matrices on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

_PROBE_ERROR = 1e-4  # relative to the spread of the product; rounding the factors to bf16 costs about 1e-2


def use_onednn_fp32() -> bool:
    """Give fp32 products to oneDNN on AMD processors with AVX-512, for the whole process.

    PyTorch's default there, MKL, keeps to AVX2 and reaches half the speed. The only switch that PyTorch has allows
    oneDNN to round the factors to bf16 if it thinks that faster, so a probe checks that it does not: on a processor
    where it does, nothing is changed. The choice depends on the processor alone, so a resumed run makes the same.

    Returns:
        Whether oneDNN has them now.
    """
    if not (torch.backends.mkldnn.enabled and hasattr(torch.backends.mkldnn, "matmul") and _is_amd()):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    if _product_error() <= _PROBE_ERROR:
        return True
    switch.fp32_precision = before
    return False


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text(encoding="utf-8", errors="replace")


def _product_error() -> float:
    """The largest error of some products of the shapes that models have, relative to their spread."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((64, 256, 768), (777, 123, 33), (512, 688, 256)):
        left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
        exact = left.double() @ right.double()
        worst = max(worst, float((left @ right - exact).abs().max() / exact.std()))
    return worst
