"""A decoder's forward pass as the trainer needs it, on CPUs that multiply bf16: states at some places of a packed row.

It is `Decoder.hidden` with three differences, none of which changes what is computed: prefixes that sequences share are
computed once (`fused_prefix`), products are those of `fused_linear`, and behind the last layer's attention only the
places that are asked for go on. The decoder's modules and weights are used as they are.

Shapes: N tokens of all sequences, M of them computed, P places, D width, K numbers per head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.models import fused, fused_linear, fused_prefix
from posttrain.models.decoder import Block, Decoder, fused_norm
from posttrain.models.fused_prefix import SharedRow

Angles = tuple[Tensor, Tensor] | None
_PRODUCTS = torch.bfloat16


def shares_prefixes(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `packed_states` does this model, with products of this type on this device.

    It takes pre-norm decoders without learned positions or windows, whose heads are a multiple of 32 wide. Hooks on
    what it takes apart (layers, attention, MLP) would not be called, so there must be none.
    """
    if not isinstance(model, Decoder) or dtype != _PRODUCTS or device.type != "cpu":
        return False
    config = model.config
    shape = (
        config.norm_placement == "pre"
        and config.gated_mlp
        and config.activation == "silu"
        and model.positions is None
        and all(window is None for window in config.windows)
    )
    return (
        shape
        and fused.available(device, dtype)
        and fused_prefix.supported(config.head_dim)
        and fused_linear.supported()
        and not any(_hooked(part) for block in _blocks(model) for part in (block, block.attention, block.mlp))
        and not _hooked(model)
    )


def packed_states(model: Decoder, tokens_N: Tensor, row: SharedRow, places_P: Tensor) -> Tensor:
    """What the output head reads at some places, PD, fp32; runs as if under bf16 autocast.

    Args:
        model: one that `shares_prefixes`.
        tokens_N: token ids of all sequences, end to end.
        row: how they are laid out.
        places_P: indices into `tokens_N`.
    """
    x_MD = model.embed(tokens_N.index_select(0, row.kept_M)[None])[0].float()
    angles = _angles(model, row.position_M)
    wanted_P = row.place_N.index_select(0, places_P)
    recompute = model.recompute_layers and torch.is_grad_enabled()
    last = len(model.layers) - 1
    for index, block in enumerate(_blocks(model)):
        arguments = (block, x_MD, angles, row, wanted_P if index == last else None)
        x_MD = checkpoint(_layer, *arguments, use_reentrant=False) if recompute else _layer(*arguments)
    return fused_norm(model.final_norm, x_MD, torch.float32)[1]


def _layer(block: Block, x_MD: Tensor, angles: Angles, row: SharedRow, wanted_P: Tensor | None) -> Tensor:
    """The residual stream after a layer, of all tokens or of those that are wanted."""
    attention, mlp = block.attention, block.mlp
    H, J = attention.num_heads, attention.num_kv_heads
    x_MD, normed_MD = fused_norm(block.attention_norm, x_MD, _PRODUCTS)
    heads_MAK = fused_linear.linear(attention.qkv, normed_MD).view(-1, H + 2 * J, attention.head_dim)
    if attention.qk_norm != "none":
        weights = (attention.q_norm.weight, attention.k_norm.weight)
        heads_MAK = fused.norm_heads(heads_MAK, *weights, attention.q_norm.eps, H, J)
    read_MHK = fused_prefix.attention(heads_MAK, angles, row, H, J)
    x_MD = fused.add(x_MD, fused_linear.linear(attention.out, read_MHK.flatten(1)))
    if wanted_P is not None:
        x_MD = fused_prefix.rows_at(x_MD, wanted_P)
    x_MD, normed_MD = fused_norm(block.mlp_norm, x_MD, _PRODUCTS)
    inner_MF = fused.silu_gate(fused_linear.linear(mlp.up, normed_MD))
    return fused.add(x_MD, fused_linear.linear(mlp.down, inner_MF))


def _angles(model: Decoder, position_M: Tensor) -> Angles:
    """Cosines and signed sines of every token, MK, fp32."""
    if model.rope is None:
        return None
    cos, sin = (x_1M1K[0, :, 0].contiguous() for x_1M1K in model.rope.rotation(position_M[None], torch.float32))
    return cos, sin


def _blocks(model: Decoder) -> list[Block]:
    return cast("list[Block]", list(model.layers))


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
