"""Packed rows in which several sequences go on from one prefix, whose tokens are computed once.

The siblings of a group share their prompt, the sides of a preference pair too. In a causal model a token's state
depends on what is before it alone, so one copy of the prefix serves all: the same states, and in backward the sum of
what every sequence asks of them.

Shapes: N tokens of all sequences end to end, M tokens that are computed, S segments, A = H + 2J heads (queries, keys,
values), K numbers per head, D width, P any places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.core import ModelError
from posttrain.models.kernels import call, library

_ATTENTION, _PIECES = "prefix_attention", "layer_pieces"


class SharedRow(NamedTuple):
    """Which tokens of a packed row are computed, and how they lie.

    A segment is a prefix or what a sequence has behind it. A family is a prefix and the segments that go on from it, or
    a sequence by itself.
    """

    kept_M: Tensor  # int64, which of the N tokens
    place_N: Tensor  # int64, where each token's state is found among the M
    position_M: Tensor  # int64, each token's position in its sequence
    starts: Tensor  # int64, S + 1: where segments begin, and where the last ends
    firsts: Tensor  # int64: the first segment of each family, and the number of all


def share(
    lengths: Sequence[int], families: Sequence[int] | None = None, prefixes: Sequence[int] | None = None
) -> SharedRow:
    """Lay out a row.

    Args:
        lengths: tokens of each sequence; they lie end to end.
        families: how many sequences each family has, one after another; they sum to the number of sequences. None: each
            is by itself.
        prefixes: with how many equal tokens all sequences of each family begin; shorter than any of them. None: 0.

    Raises:
        ModelError: a prefix leaves nothing of a sequence, or the families are not the sequences.
    """
    families = [1] * len(lengths) if families is None else families
    prefixes = [0] * len(families) if prefixes is None else prefixes
    if sum(families) != len(lengths) or len(families) != len(prefixes):
        raise ModelError(f"{len(lengths)} sequences are not families of {list(families)}")
    kept, places, positions, segments, firsts = [], [], [], [], [0]
    token, made, sequence = 0, 0, 0  # of N, of M, of the sequences
    for num, prefix in zip(families, prefixes, strict=True):
        own = lengths[sequence : sequence + num]
        if num < 2 or prefix == 0:  # families of their own
            for length in own:
                kept.append(np.arange(token, token + length))
                places.append(np.arange(made, made + length))
                positions.append(np.arange(length))
                segments.append(length)
                firsts.append(len(segments))
                token, made = token + length, made + length
        else:
            if prefix >= min(own):
                raise ModelError(f"a prefix of {prefix} tokens leaves nothing of a sequence of {min(own)}")
            kept.append(np.arange(token, token + prefix))
            positions.append(np.arange(prefix))
            segments.append(prefix)
            shared, made = np.arange(made, made + prefix), made + prefix
            for length in own:
                rest = length - prefix
                kept.append(np.arange(token + prefix, token + length))
                places += [shared, np.arange(made, made + rest)]
                positions.append(np.arange(prefix, length))
                segments.append(rest)
                token, made = token + length, made + rest
            firsts.append(len(segments))
        sequence += num
    return SharedRow(
        kept_M=torch.from_numpy(np.concatenate(kept)),
        place_N=torch.from_numpy(np.concatenate(places)),
        position_M=torch.from_numpy(np.concatenate(positions)),
        starts=torch.from_numpy(np.cumsum([0, *segments])),
        firsts=torch.tensor(firsts),
    )


def supported(head_dim: int) -> bool:
    """Whether `attention` does heads of this width here."""
    lib = library(_ATTENTION, torch.bfloat16)
    return lib is not None and bool(lib.prefix_supported(head_dim)) and library(_PIECES, torch.bfloat16) is not None


def attention(
    heads_MAK: Tensor, angles: tuple[Tensor, Tensor] | None, row: SharedRow, num_heads: int, num_kv_heads: int
) -> Tensor:
    """Causal attention of bf16 heads within each sequence, MHK; see `fused.attention`."""
    cos_MK, sin_MK = angles if angles is not None else (None, None)
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        heads_MAK.contiguous(), cos_MK, sin_MK, row, (num_heads, num_kv_heads)
    )
    return out


def rows_at(x_MD: Tensor, places_P: Tensor) -> Tensor:
    """Some rows of fp32 numbers, PD; a place may come several times."""
    out: Tensor = _RowsAt.apply(x_MD.contiguous(), places_P.contiguous())  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads_MAK: Tensor,
        cos_MK: Tensor | None,
        sin_MK: Tensor | None,
        row: SharedRow,
        counts: tuple[int, int],
    ) -> Tensor:
        num_tokens, _, width = heads_MAK.shape
        out_MHK, lse_MH = heads_MAK.new_empty(num_tokens, counts[0], width), torch.empty(num_tokens, counts[0])
        ctx.sizes = (len(row.firsts) - 1, *counts, width)
        given = (heads_MAK, cos_MK, sin_MK, row.starts, row.firsts)
        _done(call(_ATTENTION, heads_MAK.dtype, _ATTENTION, *given, *ctx.sizes, out_MHK, lse_MH, work=out_MHK.numel()))
        ctx.save_for_backward(*given, out_MHK, lse_MH)
        return out_MHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MHK: Tensor) -> tuple[Tensor, None, None, None, None]:
        *given, out_MHK, lse_MH = ctx.saved_tensors
        grad_MAK = torch.empty_like(given[0])
        results = (out_MHK, lse_MH, grad_MHK.contiguous(), grad_MAK)
        name, work = "prefix_attention_backward", grad_MHK.numel()
        _done(call(_ATTENTION, grad_MAK.dtype, name, *given, *ctx.sizes, *results, work=work))
        return grad_MAK, None, None, None, None


class _RowsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, places_P: Tensor) -> Tensor:
        num, width = len(places_P), x_MD.shape[1]
        out_PD = x_MD.new_empty(num, width)
        call(_PIECES, torch.bfloat16, "gather_rows", x_MD, places_P, out_PD, num, width, work=out_PD.numel())
        ctx.save_for_backward(places_P)
        ctx.num_rows = len(x_MD)
        return out_PD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        (places_P,) = ctx.saved_tensors
        grad_PD = grad_PD.contiguous()
        num, width = grad_PD.shape
        out_MD = grad_PD.new_zeros(ctx.num_rows, width)
        call(_PIECES, torch.bfloat16, "add_rows", grad_PD, places_P, out_MD, num, width, work=grad_PD.numel())
        return out_MD, None


def _done(status: int) -> None:
    if status:
        raise MemoryError("attention: no memory for one family's keys and values")
