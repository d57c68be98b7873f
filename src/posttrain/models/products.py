"""fp32 matrix products of the trainer on a CPU, by oneDNN: the BLAS that PyTorch calls for fp32 is half as fast on some
processors, and no slower product was seen on others. bf16 products are oneDNN's in PyTorch itself.

oneDNN prepares a product for every shape that it meets, so this is for callers whose shapes are few.

Shapes: N rows (any leading shape), D inputs, F outputs.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FEWEST_ROWS = 64  # below it, calling costs more than is won
_BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch.cpu.get_capabilities() names them


def quickest_dtype(device: str = "cpu") -> Literal["float32", "bfloat16"]:
    """The type of matrix products to train and sample in on a device, where a recipe leaves the choice to it.

    bf16, except on a processor without instructions for it: there it is emulated, more slowly than fp32 is computed.
    """
    if torch.device(device).type != "cpu":
        return "bfloat16"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if any(found.get(name) for name in _BF16_PRODUCTS) else "float32"


@functools.cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_linear_pointwise"
    )


def linear(module: nn.Module, x_ND: Tensor) -> Tensor:
    """`module(x_ND)`, where that is a plain linear layer in fp32 by a faster product."""
    out_NF: Tensor
    if type(module) is nn.Linear and _plain(module, x_ND):
        out_NF = _Linear.apply(x_ND, module.weight, module.bias)  # type: ignore[no-untyped-call]
    else:
        out_NF = module(x_ND)
    return out_NF


def times_transposed(left_ND: Tensor, right_FD: Tensor) -> Tensor:
    """left × rightᵀ, without gradient; oneDNN's where both are fp32 and on the CPU."""
    fast = left_ND.dtype == right_FD.dtype == torch.float32 and left_ND.device.type == "cpu"
    if fast and len(left_ND) >= _FEWEST_ROWS and torch.backends.mkldnn.enabled and _has_onednn():
        out_NF: Tensor = torch.ops.mkldnn._linear_pointwise(left_ND, right_FD, None, "none", [], "")
        return out_NF
    return left_ND @ right_FD.T


def _plain(module: nn.Linear, x_ND: Tensor) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return (
        not hooks
        and bool(torch.backends.mkldnn.enabled)
        and x_ND.device.type == "cpu"
        and x_ND.dtype == module.weight.dtype == torch.float32
        and x_ND.numel() >= _FEWEST_ROWS * x_ND.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
    )


class _Linear(torch.autograd.Function):
    """x Wᵀ + bias and its gradients."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.has_bias = bias_F is not None
        flat_ND = x_ND.reshape(-1, x_ND.shape[-1])
        out_NF: Tensor = torch.ops.mkldnn._linear_pointwise(flat_ND, weight_FD, bias_F, "none", [], "")
        return out_NF.view(*x_ND.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_ND, weight_FD = ctx.saved_tensors
        flat_NF, flat_ND = grad_NF.reshape(-1, grad_NF.shape[-1]), x_ND.reshape(-1, x_ND.shape[-1])
        grad_x = times_transposed(flat_NF, weight_FD.T).view(x_ND.shape) if ctx.needs_input_grad[0] else None
        grad_weight = times_transposed(flat_NF.T, flat_ND.T) if ctx.needs_input_grad[1] else None
        grad_bias = flat_NF.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
