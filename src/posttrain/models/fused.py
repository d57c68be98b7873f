"""What stands between a layer's matrix products, fused for CPUs: each piece, and its gradient, is one pass over memory.

The pieces take the residual stream in fp32 and give what products read, in their type (fp32 or bf16), and the other way
round. All arithmetic is fp32. They are differentiable functions of tensors, so that adapters, recomputed layers, frozen
layers and hooks are as they are with plain modules. Where `available` says no, the plain modules do the same work.

Shapes: N tokens (any leading shape), D width, M width of the MLP, A = H + 2J heads (queries, keys, values), K numbers
per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.core import ModelError
from posttrain.models.kernels import PARTS, call, library

_PIECES, _ATTENTION = "layer_pieces", "packed_attention"


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the pieces are to be had on a device, for products of some type. The first question compiles them."""
    return device.type == "cpu" and library(_PIECES, dtype) is not None and library(_ATTENTION, dtype) is not None


def norm(x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream as it is, fp32, and its RMSNorm in `dtype`.

    Go on with the first: its gradient and the norm's are then added in one pass.
    """
    out: tuple[Tensor, Tensor] = _Norm.apply(  # type: ignore[no-untyped-call]
        x_ND.contiguous(), weight_D.float(), eps, dtype
    )
    return out


def add(x_ND: Tensor, branch_ND: Tensor) -> Tensor:
    """The residual stream, fp32, plus what a branch gives, in fp32 or bf16."""
    out: Tensor = _Add.apply(x_ND.contiguous(), branch_ND.contiguous())  # type: ignore[no-untyped-call]
    return out


def silu_gate(inner_NM: Tensor) -> Tensor:
    """silu(gate) × values, where `inner_NM` is gates, then values."""
    out: Tensor = _SiluGate.apply(inner_NM.contiguous())  # type: ignore[no-untyped-call]
    return out


class NormShape(NamedTuple):
    """Pieces of a token's heads that are normed alike: `counts[0]` of `widths[0]` numbers, then the second kind."""

    counts: tuple[int, int]
    widths: tuple[int, int]


def norm_heads(
    heads_NAK: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, num_heads: int, num_kv_heads: int
) -> Tensor:
    """Queries and keys normed, values as they are; a new tensor.

    Args:
        heads_NAK: queries, keys, values.
        q_weight: as long as one head, or as all query heads: that many numbers are normed together.
        k_weight: the same of the keys.
        eps: added to the mean square.
        num_heads: H.
        num_kv_heads: J.
    """
    K = heads_NAK.shape[-1]
    widths = (q_weight.numel(), k_weight.numel())
    shape = NormShape((num_heads * K // widths[0], num_kv_heads * K // widths[1]), widths)
    out: Tensor = _NormHeads.apply(  # type: ignore[no-untyped-call]
        heads_NAK.contiguous(), q_weight.float(), k_weight.float(), eps, shape
    )
    return out


class Layout(NamedTuple):
    """Where the sequences of a row lie, and who sees whom in it."""

    starts: Tensor  # int64, S + 1
    num_heads: int  # H
    num_kv_heads: int  # J
    window: int | None


def starts_of(lengths: Sequence[int]) -> Tensor:
    """Where sequences of these lengths begin when they lie end to end, and where the last ends."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=starts[1:])
    return starts


def attention(heads_NAK: Tensor, angles: tuple[Tensor, Tensor] | None, layout: Layout) -> Tensor:
    """Causal attention within each sequence, NHK, of the type of `heads_NAK`.

    Args:
        heads_NAK: queries, keys and values of all tokens, rotary positions not yet applied.
        angles: cosines and signed sines of every token, NK, fp32 (see `rope.Rotation`); None: no rotary positions.
        layout: which tokens are a sequence.

    Raises:
        ModelError: the sequences are not the row.
    """
    if int(layout.starts[-1]) != heads_NAK.shape[0]:
        raise ModelError(f"the sequences hold {int(layout.starts[-1])} tokens, the row {heads_NAK.shape[0]}")
    cos_NK, sin_NK = angles if angles is not None else (None, None)
    out: Tensor = _Attention.apply(heads_NAK.contiguous(), cos_NK, sin_NK, layout)  # type: ignore[no-untyped-call]
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = x_ND.shape[-1]
        rows = x_ND.numel() // width
        out_ND, rstd_N = torch.empty_like(x_ND, dtype=dtype), torch.empty(rows)
        call(_PIECES, dtype, "rms_norm", x_ND, weight_D, out_ND, rstd_N, rows, width, eps, work=x_ND.numel())
        ctx.save_for_backward(x_ND, weight_D, rstd_N)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        return x_ND, out_ND

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x_ND: Tensor | None, grad_ND: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad_ND is None:
            return grad_x_ND, None, None, None
        x_ND, weight_D, rstd_N = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        residual_ND = None if grad_x_ND is None else grad_x_ND.contiguous()
        out_ND, parts_PD = torch.empty_like(x_ND), torch.empty(PARTS, len(weight_D))
        tensors = (grad_ND, residual_ND, x_ND, weight_D, rstd_N, out_ND, parts_PD)
        call(_PIECES, ctx.dtype, "rms_norm_backward", *tensors, len(rstd_N), len(weight_D), work=x_ND.numel())
        return out_ND, parts_PD.sum(0), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, branch_ND: Tensor) -> Tensor:
        ctx.dtype = branch_ND.dtype
        out_ND = torch.empty_like(x_ND)
        call(_PIECES, ctx.dtype, "residual_sum", x_ND, branch_ND, out_ND, x_ND.numel(), work=x_ND.numel())
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1] or ctx.dtype == torch.float32:
            return grad_ND, grad_ND
        grad_ND = grad_ND.contiguous()
        rounded_ND = torch.empty_like(grad_ND, dtype=ctx.dtype)
        call(_PIECES, ctx.dtype, "round_off", grad_ND, rounded_ND, grad_ND.numel(), work=grad_ND.numel())
        return grad_ND, rounded_ND


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner_NM: Tensor) -> Tensor:
        width = inner_NM.shape[-1] // 2
        out_NM = inner_NM.new_empty(*inner_NM.shape[:-1], width)
        rows = out_NM.numel() // width
        call(_PIECES, inner_NM.dtype, "silu_gate", inner_NM, out_NM, rows, width, work=out_NM.numel())
        ctx.save_for_backward(inner_NM)
        return out_NM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> Tensor:
        (inner_NM,) = ctx.saved_tensors
        width = grad_NM.shape[-1]
        grad_NM, out_NM = grad_NM.contiguous(), torch.empty_like(inner_NM)
        sizes = (grad_NM.numel() // width, width)
        call(_PIECES, inner_NM.dtype, "silu_gate_backward", grad_NM, inner_NM, out_NM, *sizes, work=grad_NM.numel())
        return out_NM


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads_NAK: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, shape: NormShape
    ) -> Tensor:
        numbers = heads_NAK.shape[-2] * heads_NAK.shape[-1]
        rows = heads_NAK.numel() // numbers
        out_NAK, rstd = torch.empty_like(heads_NAK), torch.empty(rows, sum(shape.counts))
        ctx.sizes = (rows, numbers, shape.counts[0], shape.widths[0], shape.counts[1], shape.widths[1])
        tensors = (heads_NAK, q_weight, k_weight, out_NAK, rstd)
        call(_PIECES, heads_NAK.dtype, "norm_heads", *tensors, *ctx.sizes, eps, work=heads_NAK.numel())
        ctx.save_for_backward(heads_NAK, q_weight, k_weight, rstd)
        return out_NAK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NAK: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        heads_NAK, q_weight, k_weight, rstd = ctx.saved_tensors
        split = (len(q_weight), len(k_weight))
        out_NAK, parts = torch.empty_like(heads_NAK), torch.empty(PARTS, sum(split))
        tensors = (grad_NAK.contiguous(), heads_NAK, q_weight, k_weight, rstd, out_NAK, parts)
        call(_PIECES, heads_NAK.dtype, "norm_heads_backward", *tensors, *ctx.sizes, work=heads_NAK.numel())
        q_grad, k_grad = torch.split(parts.sum(0), list(split))
        return out_NAK, q_grad, k_grad, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads_NAK: Tensor, cos_NK: Tensor | None, sin_NK: Tensor | None, layout: Layout) -> Tensor:
        num_tokens, _, width = heads_NAK.shape
        H, J = layout.num_heads, layout.num_kv_heads
        out_NHK, lse_NH = heads_NAK.new_empty(num_tokens, H, width), torch.empty(num_tokens, H)
        ctx.sizes = (len(layout.starts) - 1, H, J, width, layout.window or 0)
        given = (heads_NAK, cos_NK, sin_NK, layout.starts)
        results, work = (out_NHK, lse_NH), heads_NAK.numel()
        _done(call(_ATTENTION, heads_NAK.dtype, _ATTENTION, *given, *ctx.sizes, *results, work=work))
        ctx.save_for_backward(heads_NAK, cos_NK, sin_NK, layout.starts, out_NHK, lse_NH)
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor, None, None, None]:
        heads_NAK, cos_NK, sin_NK, starts, out_NHK, lse_NH = ctx.saved_tensors
        grad_NAK = torch.empty_like(heads_NAK)
        given = (heads_NAK, cos_NK, sin_NK, starts)
        results = (out_NHK, lse_NH, grad_NHK.contiguous(), grad_NAK)
        name = "packed_attention_backward"
        _done(call(_ATTENTION, heads_NAK.dtype, name, *given, *ctx.sizes, *results, work=heads_NAK.numel()))
        return grad_NAK, None, None, None


def _done(status: int) -> None:
    if status:
        raise MemoryError("attention: no memory for one sequence's keys and values")
