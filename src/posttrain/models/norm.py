"""The two norms. Both compute in fp32 and give fp32, whatever comes in.

Shapes: N tokens (any leading shape), D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) × weight (1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """The normed vectors, fp32."""
        x_ND, weight_D = x_ND.float(), self.weight.float()
        if x_ND.device.type != "cpu":
            return F.rms_norm(x_ND, weight_D.shape, weight_D, self.eps)
        if not torch.is_grad_enabled():
            return (x_ND * _rstd(x_ND, self.eps)).mul_(weight_D)
        out_ND: Tensor = _CpuRmsNorm.apply(x_ND, weight_D, self.eps)  # type: ignore[no-untyped-call]
        return out_ND


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) × weight + bias (1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """The normed vectors, fp32."""
        return F.layer_norm(x_ND.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)


def _rstd(x_ND: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps), N1, in fewer operations than PyTorch's own, which is composite on a CPU."""
    norm_N1: Tensor = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return norm_N1.square_().mul_(1.0 / x_ND.shape[-1]).add_(eps).rsqrt_()


class _CpuRmsNorm(torch.autograd.Function):
    """RMSNorm with its gradient in few passes over memory, several times faster than PyTorch's on a CPU."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rstd_N1 = _rstd(x_ND, eps)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return (x_ND * rstd_N1).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        gx_ND = grad_ND * x_ND
        with torch.autocast("cpu", enabled=False):  # these two sums must not be taken in bf16
            grad_weight_D = gx_ND.flatten(0, -2).T @ rstd_N1.flatten()
            pull_N1 = (gx_ND @ weight_D).unsqueeze_(-1)
        pull_N1.mul_(rstd_N1.pow(3).div_(-x_ND.shape[-1]))
        grad_x_ND = torch.mul(grad_ND, weight_D, out=gx_ND).mul_(rstd_N1).addcmul_(x_ND, pull_N1)
        return grad_x_ND, grad_weight_D, None
