"""`token_stats` on a CPU that multiplies bf16: no logit leaves the cache.

The logits are fp32 sums of bf16 products, as CUDA gives them, a block of the vocabulary at a time; forward keeps two
numbers for each token, backward makes the logits again and turns them into gradients, also summed in fp32.

Shapes: N tokens, D width, V vocabulary, W entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.models.kernels import call, library

_HEAD = "head_tiles"
_BLOCK = 2048  # W


def supported() -> bool:
    """Whether this processor has the instructions, and the C is compiled."""
    return library(_HEAD, torch.bfloat16) is not None and bool(call(_HEAD, torch.bfloat16, "head_supported", work=0))


def fits(hidden_ND: Tensor, weight_VD: Tensor, product_dtype: torch.dtype, exact: bool) -> bool:
    """Whether `tiled_stats` does these. It rounds the hidden states: where weights are bf16 in memory and the products
    are to be exact, that would be visible beside the plain product's fp32."""
    return (
        (weight_VD.dtype == torch.float32 or not exact)
        and hidden_ND.device.type == "cpu"
        and product_dtype == torch.bfloat16
        and hidden_ND.dtype in (torch.float32, torch.bfloat16)
        and weight_VD.dtype in (torch.float32, torch.bfloat16)
        and hidden_ND.shape[-1] % 2 == 0
        and hidden_ND.shape[0] > 0
        and supported()
    )


def tiled_stats(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Logprobs of the targets and entropies (zeros unless asked for), fp32; both have gradients."""
    out: tuple[Tensor, Tensor] = _Tiled.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N.contiguous(), temperature, entropy
    )
    return out


def _blocks(weight_VD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The vocabulary's blocks in bf16, with the number of their first entry."""
    for first in range(0, weight_VD.shape[0], _BLOCK):
        yield first, weight_VD[first : first + _BLOCK].to(torch.bfloat16).contiguous()


def _call(function: str, *arguments: Any, work: int) -> None:
    if call(_HEAD, torch.bfloat16, function, *arguments, work=work):
        raise MemoryError("token_stats: no memory for a block of the output head")


class _Tiled(torch.autograd.Function):
    """With z = logits / temperature, p = softmax(z) and entropy E:

    d logprob / dz = onehot(target) - p,    dE / dz = -p (log p + E).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        num, width = hidden_ND.shape
        rounded_ND = hidden_ND.detach().to(torch.bfloat16).contiguous()
        top_N, sum_N = torch.full((num,), -torch.inf), torch.zeros(num)
        spread_N, target_N = torch.zeros(num), torch.full((num,), torch.nan)
        for first, block_WD in _blocks(weight_VD.detach()):
            sums = (top_N, sum_N, spread_N if entropy else None, target_N)
            sizes = (num, width, first, len(block_WD), 1.0 / temperature)
            _call("head_forward", rounded_ND, block_WD, targets_N, *sums, *sizes, work=num * len(block_WD))
        total_N = top_N + sum_N.log()
        entropy_N = sum_N.log() - spread_N / sum_N if entropy else spread_N
        ctx.save_for_backward(rounded_ND, weight_VD, targets_N, total_N, entropy_N)
        ctx.temperature, ctx.entropy, ctx.dtype = temperature, entropy, hidden_ND.dtype
        return target_N - total_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rounded_ND, weight_VD, targets_N, total_N, entropy_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        num, width = rounded_ND.shape
        grad_hidden_ND = torch.zeros(num, width) if wants_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32) if wants_weight else None
        pulls = (grad_logprobs_N.contiguous(), grad_entropy_N.contiguous() if ctx.entropy else None)
        scratch = torch.empty(num * min(_BLOCK, weight_VD.shape[0] + 1), dtype=torch.bfloat16)
        for first, block_WD in _blocks(weight_VD):
            entries = len(block_WD)
            stride = entries + entries % 2  # pairs of columns are multiplied together
            grad_NW = scratch[: num * stride]
            sizes = (stride, num, width, first, entries, 1.0 / ctx.temperature)
            given, work = (rounded_ND, block_WD, targets_N, total_N, entropy_N), num * entries
            _call("head_backward", *given, *pulls, grad_NW, *sizes, work=work)
            if grad_hidden_ND is not None:
                rows_WD = block_WD if stride == entries else torch.nn.functional.pad(block_WD, (0, 0, 0, 1))
                _call("add_product", grad_NW, rows_WD, grad_hidden_ND, num, stride, width, work=work)
            if grad_weight_VD is not None:
                part_WD = grad_weight_VD[first : first + entries]
                places = (grad_NW, stride, rounded_ND, width, part_WD)
                _call("weight_gradient", *places, num, entries, width, 0, work=work)
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.to(ctx.dtype),
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None,
            None,
            None,
        )
