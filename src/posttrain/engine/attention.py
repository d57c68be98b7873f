"""How the engine's three kinds of call attend: whole prompts, chunks that continue a prompt, and single tokens.

Each class is an `Attend` as `posttrain.models` calls it, once per layer, with queries and keys after rotary embedding.
B rows, T tokens of this call, H query heads, J key–value heads, G = H/J queries that share one, C tokens attended to,
M capacity, K head width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from posttrain.engine import native
from posttrain.engine.cache import PromptCache, SlotCache

# Rows × tokens below which starting a second thread takes longer than the work.
_WORTH_THREADS = 512


class WholePrompts:
    """Causal attention within right-padded prompts, read from their first token; keys and values go to `cache`."""

    def __init__(self, cache: PromptCache) -> None:
        self._cache = cache
        self._masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, *, window: int | None) -> Tensor:
        """Attention output BTHK."""
        q, k, v = q_BTHK.transpose(1, 2), k_BTJK.transpose(1, 2), v_BTJK.transpose(1, 2)
        self._cache.put(layer, k, v)
        length = q.shape[2]
        grouped = q.shape[1] != k.shape[1]
        if window is None or window >= length:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            mask = self._masks.setdefault((length, window), _causal(length, window, q.device))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2)


class ContinuedPrompts:
    """Attention of the next tokens of prompts whose beginning is in `cache` already, row by row at its own place."""

    def __init__(self, cache: PromptCache, starts: NDArray[np.int64], num_tokens: int, device: torch.device) -> None:
        """Row b's tokens of this call stand at positions `starts[b]` … `starts[b] + num_tokens - 1`."""
        self._cache = cache
        self._positions_BT = torch.from_numpy(starts[:, None] + np.arange(num_tokens)).to(device)
        self._end = int(starts.max()) + num_tokens
        self._same_start = int(starts[0]) if bool((starts == starts[0]).all()) else None
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, *, window: int | None) -> Tensor:
        """Attention output BTHK."""
        stored = self._cache.get(layer)
        assert stored is not None, "a continued prompt has a beginning"
        q, k, v = q_BTHK.transpose(1, 2), k_BTJK.transpose(1, 2), v_BTJK.transpose(1, 2)
        for store_BJMK, new_BJTK in zip(stored, (k, v), strict=True):
            if self._same_start is not None:
                store_BJMK[:, :, self._same_start : self._end] = new_BJTK
            else:
                index = self._positions_BT[:, None, :, None].expand(new_BJTK.shape)
                store_BJMK.scatter_(2, index, new_BJTK)
        keys, values = (store_BJMK[:, :, : self._end] for store_BJMK in stored)
        if window not in self._masks:
            self._masks[window] = _visible(self._positions_BT, self._end, window)[:, None]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._masks[window], enable_gqa=grouped)
        return out.transpose(1, 2)


class SingleTokens:
    """Attention of one new token per running row, over the slot cache's active prefix."""

    def __init__(self, cache: SlotCache, lengths_B: Tensor, longest: int, ragged: bool) -> None:
        """Take how many tokens each row has cached already (B), the most of them, and whether they differ."""
        self._cache = cache
        self._lengths_B = lengths_B
        self._num_rows = len(lengths_B)
        self._end = longest + 1
        self._ragged = ragged
        self._masks: dict[int | None, Tensor | None] = {}
        self._places: Tensor | None = None
        self._kernel = native.decode_attention(cache.dtype) if cache.device.type == "cpu" else None

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, *, window: int | None) -> Tensor:
        """Attention output BTHK, T = 1."""
        num_rows, _, heads, width = q_BTHK.shape
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if self._kernel is not None and q_BTHK.dtype == keys.dtype:
            out = self._attend_natively(q_BTHK, k_BTJK, v_BTJK, keys, values, window)
            if out is not None:
                return out
        places = self._flat_places()
        keys.view(-1, width).index_copy_(0, places, k_BTJK.reshape(-1, width))
        values.view(-1, width).index_copy_(0, places, v_BTJK.reshape(-1, width))
        # The G queries of one key–value head stand where tokens would, so that nothing is repeated in memory.
        q_BJGK = q_BTHK.reshape(num_rows, self._cache.num_kv_heads, -1, width)
        keys_BJCK, values_BJCK = keys[:num_rows, :, : self._end], values[:num_rows, :, : self._end]
        if q_BTHK.dtype == torch.bfloat16 and q_BTHK.device.type == "cpu":
            out = _batched_products(q_BJGK, keys_BJCK, values_BJCK, self._mask(window, torch.float32))
        else:
            mask = self._mask(window, q_BTHK.dtype)
            out = F.scaled_dot_product_attention(q_BJGK, keys_BJCK, values_BJCK, attn_mask=mask)
        return out.reshape(num_rows, 1, heads, width)

    def _attend_natively(
        self, q_BTHK: Tensor, k_BTJK: Tensor, v_BTJK: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor | None:
        """The compiled kernel's answer, None where it declines the shape."""
        assert self._kernel is not None
        num_rows, _, heads, width = q_BTHK.shape
        q, k, v = (_with_joined_heads(x) for x in (q_BTHK, k_BTJK, v_BTJK))
        out = torch.empty(q_BTHK.shape, dtype=q.dtype)
        kv_heads = self._cache.num_kv_heads
        declined = self._kernel(
            *(item for x in (q, k, v) for item in (x.data_ptr(), x.stride(0))),
            *(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1)),
            *(self._lengths_B.data_ptr(), out.data_ptr()),
            *(num_rows, kv_heads, heads // kv_heads, width, window or 0),
            torch.get_num_threads() if num_rows * self._end > _WORTH_THREADS else 1,
        )
        return None if declined else out

    def _flat_places(self) -> Tensor:
        """Where each new key goes in the cache seen as rows of K numbers."""
        if self._places is None:
            cache, lengths_B1 = self._cache, self._lengths_B[:, None]
            heads_J = torch.arange(cache.num_kv_heads, device=cache.device)
            slots_B1 = torch.arange(self._num_rows, device=cache.device)[:, None]
            self._places = ((slots_B1 * cache.num_kv_heads + heads_J) * cache.max_length + lengths_B1).view(-1)
        return self._places

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window is not None and window >= self._end:
            window = None
        if window is None and not self._ragged:
            return None
        if window not in self._masks:
            visible = _visible(self._lengths_B[:, None], self._end, window)
            # Additive, because a boolean mask is converted once per layer.
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._masks[window] = mask.masked_fill_(~visible, float("-inf"))[:, None]
        return self._masks[window]


def _with_joined_heads(x_BTHK: Tensor) -> Tensor:
    """As it is, if the heads of a token follow one another in memory, else a copy in which they do."""
    joined = x_BTHK.stride(3) == 1 and x_BTHK.stride(2) == x_BTHK.shape[3]
    return x_BTHK if joined else x_BTHK.contiguous()


def _batched_products(q_BJGK: Tensor, keys_BJCK: Tensor, values_BJCK: Tensor, mask_B11C: Tensor | None) -> Tensor:
    """Attention of a few queries as two batched products: on a CPU in bf16, faster than PyTorch's fused kernel."""
    num_rows, kv_heads, group, width = q_BJGK.shape
    flat_q = (q_BJGK * width**-0.5).flatten(0, 1)
    # Keys on the left: with them as the tall factor the product is 3 × faster than the other way round.
    scores = torch.bmm(keys_BJCK.flatten(0, 1), flat_q.transpose(1, 2)).transpose(1, 2).float()
    if mask_B11C is not None:
        scores.view(num_rows, kv_heads, group, -1).add_(mask_B11C)
    probs = torch.softmax(scores, -1).to(q_BJGK.dtype)
    return torch.bmm(probs, values_BJCK.flatten(0, 1)).view(q_BJGK.shape)


def _visible(positions_BT: Tensor, end: int, window: int | None) -> Tensor:
    """Bool BTC: which of the first `end` tokens each position attends to; a window counts the position itself."""
    columns_C = torch.arange(end, device=positions_BT.device)
    visible = columns_C <= positions_BT[..., None]
    if window is not None:
        visible &= columns_C > positions_BT[..., None] - window
    return visible


def _causal(length: int, window: int, device: torch.device) -> Tensor:
    return _visible(torch.arange(length, device=device)[None], length, window)
