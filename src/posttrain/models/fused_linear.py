"""A layer's projections on CPUs that multiply bf16: bf16 in and out, fp32 sums, weights and gradients in fp32.

The weights are packed straight from fp32, and their gradient is summed in fp32 and never rounded; PyTorch's autocast
makes a bf16 copy of every weight, and rounds every gradient to bf16 on its way.

Shapes: N rows, D inputs, F outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.models.kernels import call, library

_PRODUCTS = "layer_products"


def supported() -> bool:
    """Whether this processor has the instructions, and the C is compiled."""
    lib = library(_PRODUCTS, torch.bfloat16)
    return lib is not None and bool(lib.products_supported(1))


def linear(module: nn.Module, x_ND: Tensor) -> Tensor:
    """`module(x_ND)` in bf16: where it is a plain linear layer with fp32 weights by `layer_products.c`."""
    if type(module) is nn.Linear and _plain(module):
        out_NF: Tensor = _Linear.apply(x_ND.contiguous(), module.weight, module.bias)  # type: ignore[no-untyped-call]
        return out_NF
    out: Tensor = module(x_ND)
    return out.to(torch.bfloat16)


def _plain(module: nn.Linear) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    weight_FD = module.weight
    even = weight_FD.shape[0] % 2 == 0 and weight_FD.shape[1] % 2 == 0  # numbers are multiplied in pairs
    return not hooks and even and weight_FD.dtype == torch.float32 and weight_FD.is_contiguous()


class _Linear(torch.autograd.Function):
    """x Wᵀ + bias and its gradients."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        outputs, inputs = weight_FD.shape
        out_NF = x_ND.new_empty(len(x_ND), outputs)
        _done(_call("project_rows", x_ND, weight_FD, bias_F, out_NF, len(x_ND), inputs, outputs))
        ctx.save_for_backward(x_ND, weight_FD)
        ctx.has_bias = bias_F is not None
        return out_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_ND, weight_FD = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        sizes = (len(x_ND), weight_FD.shape[1], weight_FD.shape[0])
        grad_x_ND = grad_weight_FD = grad_bias_F = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = torch.empty_like(x_ND)
            _done(_call("pull_back_rows", grad_NF, weight_FD, grad_x_ND, *sizes))
        wants_bias = ctx.has_bias and ctx.needs_input_grad[2]
        if ctx.needs_input_grad[1]:
            grad_weight_FD = torch.empty_like(weight_FD)
            grad_bias_F = weight_FD.new_empty(sizes[2]) if wants_bias else None
            _done(_call("project_gradient", grad_NF, x_ND, grad_weight_FD, grad_bias_F, *sizes, 0))
        elif wants_bias:
            grad_bias_F = grad_NF.sum(0, dtype=torch.float32)
        return grad_x_ND, grad_weight_FD, grad_bias_F


def _call(function: str, *arguments: Any) -> int:
    return call(_PRODUCTS, torch.bfloat16, function, *arguments, work=arguments[0].numel())


def _done(status: int) -> None:
    if status:
        raise MemoryError("a projection: no memory for its packed weights")
