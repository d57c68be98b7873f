"""Rotary positions (RoFormer, 2104.09864), in the two-halves layout of Llama checkpoints.

Shapes: B batch, T tokens, H heads of any kind, K numbers per head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.models.config import DecoderConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosines and signed sines of one forward pass, ready to multiply all heads of all layers."""

    cos_BT1K: Tensor
    sin_BT1K: Tensor  # the first half negated, so that rotating is one roll and one multiply-add


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) by its position's angle.

    Args:
        x_BTHK: queries and keys, heads side by side.
        rotation: from `Rope.rotation`, of the same type; if of another, in that, and the result is rounded.
    """
    dtype = x_BTHK.dtype
    if rotation.cos_BT1K.dtype != dtype:
        return rotate(x_BTHK.to(rotation.cos_BT1K.dtype), rotation).to(dtype)
    half = x_BTHK.shape[-1] // 2
    return torch.addcmul(x_BTHK * rotation.cos_BT1K, x_BTHK.roll(half, -1), rotation.sin_BT1K)


class Rope:
    """The frequencies of one model. No module and no buffer: `module.to(bfloat16)` must not round them."""

    def __init__(self, config: DecoderConfig) -> None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)
        if config.rope_scaling is not None:
            frequencies = scale_frequencies(frequencies, config.rope_scaling)
        self._frequencies_by_device = {torch.device("cpu"): torch.cat((frequencies, frequencies))}
        sign = torch.ones(config.head_dim, device="cpu")
        sign[: config.head_dim // 2] = -1.0
        self._sign_by_device = {torch.device("cpu"): sign}
        self._table = (torch.empty(0, config.head_dim, device="cpu"), torch.empty(0, config.head_dim, device="cpu"))

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines at some positions, computed in fp32 and given in `dtype`."""
        device = positions_BT.device
        if device.type == "cpu":
            cos_PK, sin_PK = self._tables(int(positions_BT.max()) + 1)
            shape, flat = (*positions_BT.shape, 1, cos_PK.shape[-1]), positions_BT.flatten()
            cos_BT1K, sin_BT1K = (table.index_select(0, flat).view(shape) for table in (cos_PK, sin_PK))
            return Rotation(cos_BT1K.to(dtype), sin_BT1K.to(dtype))
        if device not in self._frequencies_by_device:
            self._frequencies_by_device[device] = self._frequencies_by_device[torch.device("cpu")].to(device)
            self._sign_by_device[device] = self._sign_by_device[torch.device("cpu")].to(device)
        angles_BT1K = positions_BT[:, :, None, None] * self._frequencies_by_device[device]
        sin_BT1K = angles_BT1K.sin() * self._sign_by_device[device]
        return Rotation(angles_BT1K.cos().to(dtype), sin_BT1K.to(dtype))

    def _tables(self, num: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of positions from 0 to at least `num`, fp32, on the CPU; kept and grown."""
        cos_PK, sin_PK = self._table
        if len(cos_PK) < num:
            cpu = torch.device("cpu")
            positions_P1 = torch.arange(max(64, 1 << (num - 1).bit_length()))[:, None]
            angles_PK = positions_P1 * self._frequencies_by_device[cpu]
            cos_PK, sin_PK = angles_PK.cos(), angles_PK.sin() * self._sign_by_device[cpu]
            self._table = (cos_PK, sin_PK)  # in one assignment: a sampler's thread may ask at the same time
        return cos_PK, sin_PK


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch rotary frequencies.

    `llama3`: a wave that turns fewer than `low_freq_factor` times in the original context is slowed by `factor`; one
    that turns more than `high_freq_factor` times is kept; between them the two are blended linearly in the number of
    turns.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
