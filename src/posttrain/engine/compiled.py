"""The decoder's forward pass as one call of compiled code, for sampling from bf16 weights on a CPU.

With a few million parameters a step of PyTorch's operators spends most of its time between them, and on two cores the
second hardly helps, for each operator is too small to share. decode_step.c goes through all layers at once, each thread
with sequences of its own. Where it does not apply (another family, fp32 weights, no AVX-512 bf16, no compiler) the
engine calls the decoder, with the same result up to rounding.

N rows (tokens of any sequences), V vocabulary, D width, J key-value heads, M capacity, K head width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.models import Decoder, DecoderConfig, PlainWeights, load_native

_COLUMNS = 32  # of a packed panel
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
Ints = NDArray[np.int64]


class _Shape(ctypes.Structure):
    """`model_shape` of decode_step.c."""

    _fields_ = [
        *((name, _INT) for name in ("layers", "width", "heads", "kv_heads", "head_dim", "mlp", "vocab")),
        *((name, _INT) for name in ("scratch_floats", "scratch_halves")),
        ("eps", ctypes.c_double),
        *((name, _POINTER) for name in ("embed", "final_norm", "head", "cosines", "sines")),
    ]


class _Layer(ctypes.Structure):
    """`layer_weights` of decode_step.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, _POINTER) for name in ("qkv_bias", "out_bias", "up_bias", "down_bias")),
        *((name, _POINTER) for name in ("qkv", "out", "up", "down")),
        ("window", _INT),
    ]


class _Call(ctypes.Structure):
    """`call` of decode_step.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("tokens", "slots", "positions", "outputs", "sequences")),
        *((name, _INT) for name in ("num_rows", "num_sequences")),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _INT) for name in ("slot_stride", "head_stride")),
        ("logits", _POINTER),
        ("logits_stride", _INT),
    ]


@functools.cache
def _kernel() -> tuple[Callable[..., int], int] | None:
    """The function and how many rows of scratch each thread needs."""
    library = load_native(Path(__file__).with_name("decode_step.c"))
    if library is None or not library.decode_step_supported():
        return None
    kernel: Callable[..., int] = library.decode_step
    kernel.argtypes = (*(_POINTER,) * 7, ctypes.c_int)  # type: ignore[attr-defined]
    kernel.restype = ctypes.c_int  # type: ignore[attr-defined]
    return kernel, int(library.decode_step_tile())


def fits(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled pass knows this family and shape, and can be had."""
    known = (
        config.norm == "rms"
        and config.norm_placement == "pre"
        and config.qk_norm in ("none", "head")
        and config.positions == "rope"
        and config.gated_mlp
        and config.activation == "silu"
    )
    even = config.width % _COLUMNS == 0 and config.mlp_width % 2 == 0 and config.head_dim % 2 == 0
    small = config.head_dim <= 256 and config.num_heads // config.num_kv_heads <= 64
    return known and even and small and device.type == "cpu" and dtype == torch.bfloat16 and _kernel() is not None


class CompiledDecoder:
    """The packed weights of one decoder."""

    def __init__(self, model: Decoder, max_length: int) -> None:
        """Pack the weights of a decoder that `fits`; positions stay below `max_length`."""
        config = model.config
        self._config = config
        kernel = _kernel()
        assert kernel is not None, "`fits` asked for it"
        self._kernel, tile = kernel
        self._num_threads = torch.get_num_threads()
        heads = config.num_heads + 2 * config.num_kv_heads
        floats = max(_padded(heads * config.head_dim), _padded(2 * config.mlp_width))
        halves = _padded(max(config.num_heads * config.head_dim, config.mlp_width))
        rows = tile * self._num_threads
        self._scratch = (
            torch.empty(rows, config.width),
            torch.empty(rows, floats),
            torch.empty(rows, halves, dtype=torch.bfloat16),
            torch.empty(rows, 2 * config.width, dtype=torch.bfloat16),
        )
        assert model.rope is not None, "a decoder that fits has rotary positions"
        rotation = model.rope.rotation(torch.arange(max_length)[None], torch.float32)
        half = config.head_dim // 2
        self._cosines = rotation.cos_BT1K[0, :, 0, :half].contiguous()
        self._sines = rotation.sin_BT1K[0, :, 0, half:].contiguous()
        self._shape = _Shape(
            layers=config.num_layers,
            width=config.width,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            mlp=config.mlp_width,
            vocab=config.vocab_size,
            scratch_floats=floats,
            scratch_halves=halves,
            eps=config.norm_eps,
            cosines=self._cosines.data_ptr(),
            sines=self._sines.data_ptr(),
        )
        self._layers = (_Layer * config.num_layers)()
        self._kept: dict[str, Tensor] = {}  # what the pointers point to
        self._seen: tuple[object, int] | None = None
        self.refresh(model)

    def refresh(self, model: Decoder, *, changed: bool = False) -> None:
        """Pack the weights again where they have changed since; merged, if the decoder has adapters.

        Args:
            model: of the same shape; where it has changed in place, PyTorch has counted it.
            changed: it has changed, whatever PyTorch says: it counts nothing for weights made in inference mode.
        """
        seen = (model, sum(weight._version for weight in model.parameters() if not weight.is_inference()))
        if seen == self._seen and not changed:
            return
        with torch.no_grad():
            weights = PlainWeights(model)
            for layer in range(self._config.num_layers):
                self._pack_layer(weights, layer)
            head = "embed.weight" if self._config.tie_embeddings else "head.weight"
            table = weights["embed.weight"].to(torch.bfloat16).contiguous()
            self._kept["embed"], self._shape.embed = table, table.data_ptr()
            self._shape.final_norm = self._keep("final_norm", weights["final_norm.weight"].float())
            self._shape.head = self._keep("head", _packed(weights[head]))
        self._seen = seen

    def forward(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        tokens_N: Ints,
        slots_N: Ints,
        positions_N: Ints,
        *,
        sequences: Ints | None = None,
        outputs_N: Ints | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Run tokens through the decoder; their keys and values are in the cache afterwards.

        Args:
            keys: of each layer, slots × J × M × K, bf16, all of the same strides.
            values: the same.
            tokens_N: rows of one sequence follow one another.
            slots_N: each row's slot of the cache.
            positions_N: each row's position; what stands before it is in the cache or among the earlier rows.
            sequences: where each sequence begins, and at last N; None: each row is a sequence of its own.
            outputs_N: which row of the result each token's logits are, in rising order, -1 for none; None: all.
            logits: float32 buffer of at least so many rows, from `buffer`, written over; None makes one.

        Returns:
            Logits of what follows the tokens that give any, rows × V, fp32.
        """
        num = len(tokens_N) if outputs_N is None else int(outputs_N.max()) + 1
        out = self.buffer(num) if logits is None else logits
        layers = len(keys)
        key_places = (ctypes.c_void_p * layers)(*(tensor.data_ptr() for tensor in keys))
        value_places = (ctypes.c_void_p * layers)(*(tensor.data_ptr() for tensor in values))
        call = _Call(
            tokens=tokens_N.ctypes.data,
            slots=slots_N.ctypes.data,
            positions=positions_N.ctypes.data,
            outputs=None if outputs_N is None else outputs_N.ctypes.data,
            sequences=None if sequences is None else sequences.ctypes.data,
            num_rows=len(tokens_N),
            num_sequences=len(tokens_N) if sequences is None else len(sequences) - 1,
            keys=ctypes.addressof(key_places),
            values=ctypes.addressof(value_places),
            slot_stride=keys[0].stride(0),
            head_stride=keys[0].stride(1),
            logits=out.data_ptr(),
            logits_stride=out.stride(0),
        )
        declined = self._kernel(
            *(ctypes.addressof(part) for part in (self._shape, self._layers, call)),
            *(tensor.data_ptr() for tensor in self._scratch),
            min(torch.get_num_threads(), self._num_threads),
        )
        assert not declined, "`fits` checked the shape"
        return out[:num, : self._config.vocab_size]

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of some rows."""
        return torch.empty(rows, _padded(self._config.vocab_size))

    def _pack_layer(self, weights: Mapping[str, Tensor], layer: int) -> None:
        config, target, name = self._config, self._layers[layer], f"layers.{layer}"
        products = {
            "qkv": ("attention.qkv", config.qkv_bias),
            "out": ("attention.out", config.out_bias),
            "up": ("mlp.up", config.mlp_bias),
            "down": ("mlp.down", config.mlp_bias),
        }
        for ours, (theirs, biased) in products.items():
            packed = _packed(weights[f"{name}.{theirs}.weight"])
            setattr(target, ours, self._keep(f"{name}.{ours}", packed))
            if biased:
                bias = weights[f"{name}.{theirs}.bias"].float()
                bias = torch.nn.functional.pad(bias, (0, _padded(len(bias)) - len(bias)))
                setattr(target, f"{ours}_bias", self._keep(f"{name}.{ours}_bias", bias))
        norms = {"attention_norm": "attention_norm", "mlp_norm": "mlp_norm"}
        if config.qk_norm == "head":
            norms |= {"q_norm": "attention.q_norm", "k_norm": "attention.k_norm"}
        for ours, theirs in norms.items():
            setattr(target, ours, self._keep(f"{name}.{ours}", weights[f"{name}.{theirs}.weight"].float()))
        target.window = config.windows[layer] or 0

    def _keep(self, name: str, tensor: Tensor) -> int:
        """Hold a tensor in memory and give its address; where there is one of that name already, write into it."""
        known = self._kept.get(name)
        if known is not None and known.shape == tensor.shape:
            known.copy_(tensor)
            return known.data_ptr()
        self._kept[name] = tensor.contiguous().clone()
        return self._kept[name].data_ptr()


def _padded(number: int) -> int:
    return -(-number // _COLUMNS) * _COLUMNS


def _packed(weight: Tensor) -> Tensor:
    """A matrix (outputs × inputs) as panels of 32 outputs, in each two inputs of every output side by side."""
    outputs, inputs = weight.shape
    full = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, 0, 0, _padded(outputs) - outputs))
    return full.view(-1, _COLUMNS, inputs // 2, 2).transpose(1, 2).contiguous()
