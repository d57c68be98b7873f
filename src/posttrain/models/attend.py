"""Causal attention, and the seam through which an engine's cache or a trainer's packing replaces it.

Shapes: B batch, T tokens, H query heads, J key-value heads, K numbers per head, N tokens of all sequences in a row,
S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.core import ModelError
from posttrain.models import fused

_LONG = 512  # tokens of one sequence from which a single thread is too slow


class Attend(Protocol):
    """Lets every query see the keys it may see. Called once per layer, in order, within a forward pass."""

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, *, window: int | None) -> Tensor:
        """Attention's output, BTHK.

        Args:
            layer: index of the layer, from 0.
            q_BTHK: queries, rotary positions applied, not yet scaled by K ** -0.5.
            k_BTJK: keys of the same tokens, rotary positions applied. Query head h reads key-value head h // (H / J).
            v_BTJK: values.
            window: how many tokens a query sees, itself included; None for all before it.
        """
        ...


class CausalAttend:
    """Each token sees itself and the tokens before it, in its own sequence.

    Without `lengths`, every row is a sequence; padding on the right needs no mask, for nothing real sees it. With
    `lengths`, the batch is one row in which sequences of these lengths follow one another, and none sees another.
    Packed rows cost what their sequences cost: on a CPU, sequences of similar length are gathered into one padded
    batch; on CUDA, in bf16 or fp16, PyTorch's variable-length kernel takes the row as it is.
    """

    def __init__(self, lengths: Sequence[int] | None = None) -> None:
        self.lengths = None if lengths is None else tuple(int(length) for length in lengths)
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ModelError(f"lengths of packed sequences must each be at least 1, not {self.lengths}")
        self._buckets: dict[torch.device, list[_Bucket]] = {}
        self._offsets: dict[torch.device, Tensor] = {}
        self._starts: Tensor | None = None

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, *, window: int | None) -> Tensor:
        """See `Attend`."""
        if self.lengths is None:
            return causal_attention(q_BTHK, k_BTJK, v_BTJK, window)
        if q_BTHK.shape[0] != 1 or q_BTHK.shape[1] != sum(self.lengths):
            raise ModelError(
                f"packed attention takes one row of sum(lengths) = {sum(self.lengths)} tokens, "
                f"not {tuple(q_BTHK.shape[:2])}"
            )
        if len(self.lengths) == 1:
            return causal_attention(q_BTHK, k_BTJK, v_BTJK, window)
        q_NHK, k_NJK, v_NJK = q_BTHK[0], k_BTJK[0], v_BTJK[0]
        if q_NHK.is_cuda and q_NHK.dtype in (torch.bfloat16, torch.float16) and _varlen() is not None:
            return self._varlen_attention(q_NHK, k_NJK, v_NJK, window)[None]
        return self._bucketed_attention(q_NHK, k_NJK, v_NJK, window)[None]

    def fits(self, heads_BTAK: Tensor, num_kv_heads: int) -> bool:
        """Whether `attend_fused` is to be had for these heads, and the faster one."""
        num_rows, num_tokens = heads_BTAK.shape[:2]
        lengths = self._lengths_of(num_rows, num_tokens)
        # a sequence's key-value head is one thread's work
        busy = len(lengths) * num_kv_heads >= torch.get_num_threads() or num_tokens < _LONG
        whole = sum(lengths) == num_rows * num_tokens  # if not, the call says what is wrong
        return whole and busy and fused.available(heads_BTAK.device, heads_BTAK.dtype)

    def attend_fused(
        self, heads_BTAK: Tensor, angles: tuple[Tensor, Tensor] | None, num_heads: int, window: int | None
    ) -> Tensor:
        """The same as calling it, by the room's own kernel, from queries, keys and values side by side.

        Args:
            heads_BTAK: A = H + 2J heads, rotary positions not yet applied.
            angles: see `fused.attention`.
            num_heads: H.
            window: see `Attend`.

        Returns:
            BTHK.
        """
        num_rows, num_tokens, num_all, _ = heads_BTAK.shape
        lengths = self._lengths_of(num_rows, num_tokens)
        if self._starts is None or len(self._starts) != len(lengths) + 1 or self.lengths is None:
            self._starts = fused.starts_of(lengths)
        layout = fused.Layout(self._starts, num_heads, (num_all - num_heads) // 2, window)
        out_NHK = fused.attention(heads_BTAK.flatten(0, 1), angles, layout)
        return out_NHK.view(num_rows, num_tokens, *out_NHK.shape[1:])

    def _lengths_of(self, num_rows: int, num_tokens: int) -> tuple[int, ...]:
        return self.lengths if self.lengths is not None else (num_tokens,) * num_rows

    def _bucketed_attention(self, q_NHK: Tensor, k_NJK: Tensor, v_NJK: Tensor, window: int | None) -> Tensor:
        device = q_NHK.device
        if device not in self._buckets:
            self._buckets[device] = _make_buckets(self.lengths or (), device)
        buckets = self._buckets[device]
        if len(buckets) == 1 and buckets[0].full:
            shape = (buckets[0].num, buckets[0].longest)
            q, k, v = (x.reshape(*shape, *x.shape[1:]) for x in (q_NHK, k_NJK, v_NJK))
            return causal_attention(q, k, v, window).flatten(0, 1)
        outs = []
        for bucket in buckets:
            q, k, v = (_Pad.apply(x, bucket) for x in (q_NHK, k_NJK, v_NJK))  # type: ignore[no-untyped-call]
            outs.append(_Unpad.apply(causal_attention(q, k, v, window), bucket))  # type: ignore[no-untyped-call]
        order = torch.cat([bucket.tokens for bucket in buckets])
        out_NHK: Tensor = _Scatter.apply(torch.cat(outs), order)  # type: ignore[no-untyped-call]
        return out_NHK

    def _varlen_attention(self, q_NHK: Tensor, k_NJK: Tensor, v_NJK: Tensor, window: int | None) -> Tensor:
        lengths = self.lengths or ()
        device = q_NHK.device
        if device not in self._offsets:
            self._offsets[device] = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        offsets, longest = self._offsets[device], max(lengths)
        left = -1 if window is None or window >= longest else window - 1
        kernel = _varlen()
        assert kernel is not None
        out: Tensor = kernel(
            q_NHK,
            k_NJK,
            v_NJK,
            offsets,
            offsets,
            longest,
            longest,
            window_size=(left, 0),
            enable_gqa=q_NHK.shape[1] != k_NJK.shape[1],
        )
        return out


def packed_positions(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Positions of a packed row, 1 × sum(lengths): 0, 1, 2 … begins anew with every sequence."""
    starts = fused.starts_of(lengths)
    within_N = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(starts.diff())
    return within_N[None].to(device)


def causal_attention(q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, window: int | None) -> Tensor:
    """Causal attention within each row, BTHK, of the type of `q_BTHK`."""
    dtype, device = q_BTHK.dtype, q_BTHK.device
    if device.type == "cpu" and dtype != torch.float32:
        # on a CPU the bf16 kernel is no faster forward and several times slower backward than the fp32 one
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q_BTHK.float(), k_BTJK.float(), v_BTJK.float(), window).to(dtype)
    num_tokens = q_BTHK.shape[1]
    mask_TT = None
    if window is not None and window < num_tokens:
        positions = torch.arange(num_tokens, device=device)
        age_TT = positions[:, None] - positions
        mask_TT = (age_TT >= 0) & (age_TT < window)
    out_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTJK.transpose(1, 2),
        v_BTJK.transpose(1, 2),
        attn_mask=mask_TT,
        is_causal=mask_TT is None,
        enable_gqa=q_BTHK.shape[2] != k_BTJK.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def _varlen() -> Any:
    """PyTorch's variable-length attention, or None where this PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


class _Bucket(NamedTuple):
    """Sequences of similar length, as one padded batch."""

    num: int  # S
    longest: int  # T of the padded batch
    tokens: Tensor  # M, which of the N tokens are in it, sequence by sequence
    slots: Tensor  # M, where each goes in the flattened padded batch
    full: bool  # no padding, and the tokens are all N in order


def _make_buckets(lengths: Sequence[int], device: torch.device) -> list[_Bucket]:
    """Group sequences so that none is padded to more than twice its length."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(index)
    buckets = []
    for members in groups.values():
        longest = max(lengths[index] for index in members)
        tokens = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in members])
        slots = torch.cat([torch.arange(lengths[index]) + row * longest for row, index in enumerate(members)])
        full = len(members) == len(lengths) and len(tokens) == len(members) * longest
        buckets.append(_Bucket(len(members), longest, tokens.to(device), slots.to(device), full))
    return buckets


class _Pad(torch.autograd.Function):
    """Tokens of a packed row → a zero-padded batch. Autograd's own gather would add where plain copies do."""

    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, bucket: _Bucket) -> Tensor:
        ctx.bucket, ctx.num_tokens = bucket, x_NHK.shape[0]
        flat = x_NHK.new_zeros(bucket.num * bucket.longest, *x_NHK.shape[1:])
        flat.index_copy_(0, bucket.slots, x_NHK.index_select(0, bucket.tokens))
        return flat.view(bucket.num, bucket.longest, *flat.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad_STHK: Tensor) -> tuple[Tensor, None]:
        grad = grad_STHK.new_zeros(ctx.num_tokens, *grad_STHK.shape[2:])
        grad.index_copy_(0, ctx.bucket.tokens, grad_STHK.flatten(0, 1).index_select(0, ctx.bucket.slots))
        return grad, None


class _Unpad(torch.autograd.Function):
    """A padded batch → its tokens, M of them."""

    @staticmethod
    def forward(ctx: Any, x_STHK: Tensor, bucket: _Bucket) -> Tensor:
        ctx.bucket = bucket
        return x_STHK.flatten(0, 1).index_select(0, bucket.slots)

    @staticmethod
    def backward(ctx: Any, grad_MHK: Tensor) -> tuple[Tensor, None]:
        bucket = ctx.bucket
        flat = grad_MHK.new_zeros(bucket.num * bucket.longest, *grad_MHK.shape[1:])
        flat.index_copy_(0, bucket.slots, grad_MHK)
        return flat.view(bucket.num, bucket.longest, *flat.shape[1:]), None


class _Scatter(torch.autograd.Function):
    """Rows back to their places; `order` is a permutation."""

    @staticmethod
    def forward(ctx: Any, x_NHK: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return torch.empty_like(x_NHK).index_copy_(0, order, x_NHK)

    @staticmethod
    def backward(ctx: Any, grad_NHK: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad_NHK.index_select(0, order), None
