"""A base in 4 bits: NF4 of QLoRA (Dettmers et al., https://arxiv.org/abs/2305.14314), by `bitsandbytes`.

Only the matrices inside the layers are packed; embeddings, norms and the output head stay as they are. A packed matrix
does not learn: it is a base for adapters.

N tokens (any leading shape), D inputs, F outputs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core import MissingExtraError, ModelError
from posttrain.models.decoder import Decoder

_DEVICES = ("cpu", "cuda", "xpu")
_BLOCK = 64  # weights that share a scale


class FourBitLinear(nn.Module):
    """A linear layer whose matrix is kept in NF4 with doubly quantised scales, 4.13 bits per weight."""

    def __init__(self, linear: nn.Linear) -> None:
        """Pack a layer's matrix.

        Raises:
            MissingExtraError: `bitsandbytes` is not installed.
            ModelError: the device has no 4-bit kernels.
        """
        super().__init__()
        bnb, device = _bitsandbytes(), linear.weight.device
        if device.type not in _DEVICES:
            raise ModelError(f"4-bit weights run on {', '.join(_DEVICES)}, not on {device.type}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training
        with torch.no_grad():
            packed, state = bnb.functional.quantize_4bit(
                linear.weight.detach().contiguous(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
            )
        # a buffer that no checkpoint holds: it is the base's, and comes from the base's folder
        self.register_buffer("codes", packed, persistent=False)
        self.codes: Tensor
        self._state: Any = state
        self.bias: nn.Parameter | None = linear.bias
        if linear.bias is not None:
            linear.bias.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The matrix as it is read, FD; a new tensor in the type that was packed."""
        weight: Tensor = _bitsandbytes().functional.dequantize_4bit(self.codes, self._quant_state())
        return weight

    def product(self, x_ND: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias, differentiable in x."""
        out_NF: Tensor = _bitsandbytes().matmul_4bit(x_ND, self.codes.t(), quant_state=self._quant_state())
        return out_NF if bias is None else out_NF + bias.to(out_NF.dtype)

    def forward(self, x_ND: Tensor) -> Tensor:
        """x Wᵀ + bias."""
        return self.product(x_ND, self.bias)

    def _quant_state(self) -> Any:
        """The scales, beside the codes wherever those have gone."""
        if self._state.absmax.device != self.codes.device:
            self._state.to(self.codes.device)
        return self._state


def quantise(model: Decoder) -> Decoder:
    """Pack every matrix inside the decoder's layers into 4 bits, in place. Adapters go on top, afterwards.

    Raises:
        MissingExtraError: `bitsandbytes` is not installed.
        ModelError: the device has no 4-bit kernels, or the model has adapters already.
    """
    _bitsandbytes()
    for name, module in list(model.layers.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(model.layers.get_submodule(parent), leaf, FourBitLinear(module))
        elif isinstance(module, nn.Linear):
            raise ModelError(f"layers.{name} is a {type(module).__name__}: pack the base before adapters are added")
    return model.requires_grad_(False)


def _bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError:
        raise MissingExtraError("bitsandbytes", "quantised", "a base in 4 bits") from None
