"""The decoder's forward pass as one call of compiled code, for sampling from bf16 weights on a CPU.

With a few million parameters a step of PyTorch's operators spends most of its time between them, and on two cores the
second hardly helps, for each operator is too small to share. decode_step.c goes through all layers at once, each thread
with sequences of its own. Where it does not apply (another family, fp32 weights, no AVX-512 bf16, no compiler) the
engine calls the decoder, with the same result up to rounding.

N rows (tokens of any sequences), V vocabulary, D width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.engine.blocks import BLOCK
from posttrain.engine.draws import Draws
from posttrain.engine.huge import Arena
from posttrain.models import Decoder, DecoderConfig, PlainWeights, load_native

_COLUMNS = 32  # of a packed panel
_HALF = _COLUMNS // 2
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
        *((name, _POINTER) for name in ("tokens", "places", "positions", "outputs", "sequences")),
        *((name, _INT) for name in ("num_rows", "num_sequences")),
        ("all_places", _POINTER),
        ("logits", _POINTER),
        ("logits_stride", _INT),
        *((name, _POINTER) for name in ("kept", "draw")),
    ]


@dataclass(frozen=True)
class _Kernel:
    library: ctypes.CDLL
    tile: int  # rows of scratch that each thread needs
    span: int  # columns of a chunk of logits


@functools.cache
def _kernel() -> _Kernel | None:
    """The compiled library, None where it cannot be had."""
    library = load_native(Path(__file__).with_name("decode_step.c"))
    if library is None or not library.decode_step_supported():
        return None
    assert library.decode_step_block() == BLOCK, "blocks.py lays out what block_attention.h reads"
    library.decode_step.argtypes = (*(_POINTER,) * 7, ctypes.c_int)
    library.draw_rows.argtypes = (*(_POINTER,) * 3, ctypes.c_long, ctypes.c_int)
    library.draw_rows.restype = None
    return _Kernel(library, int(library.decode_step_tile()), int(library.decode_step_span()))


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
        self._kernel = kernel
        self._num_threads = torch.get_num_threads()
        heads = config.num_heads + 2 * config.num_kv_heads
        floats = _padded(heads * config.head_dim)
        halves = _padded(max(config.num_heads * config.head_dim, config.mlp_width))
        rows = kernel.tile * self._num_threads
        self._scratch = (
            torch.empty(rows, config.width),
            torch.empty(rows, floats),
            torch.empty(rows, halves, dtype=torch.bfloat16),
            torch.empty(rows, config.width, dtype=torch.bfloat16),
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
        self._arena = Arena()
        self._kept: dict[str, Tensor] = {}  # what the pointers point to
        self._seen: tuple[object, int] | None = None
        self._call = _Call()
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
        all_places: NDArray[np.void],
        tokens_N: Ints,
        places_N: Ints,
        positions_N: Ints,
        *,
        sequences: Ints | None = None,
        outputs_N: Ints | None = None,
        logits: Tensor | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Run tokens through the decoder; their keys and values are in their stores afterwards.

        Args:
            all_places: of the type `blocks.PLACE`: where sequences have their keys and values.
            tokens_N: rows of one sequence follow one another. Siblings that share blocks attend to them together
                where they follow one another too; no result depends on it.
            places_N: each row's index in `all_places`.
            positions_N: each row's position; what stands before it is in the store or among the earlier rows.
            sequences: where each sequence begins, and at last N; None: each row is a sequence of its own.
            outputs_N: which output each token gives, in rising order, -1 for none; None: all.
            logits: float32 buffer from `buffer`, written over; None makes one.
            draws: draw a token per output; logits are then kept where `draws.kept` says.

        Returns:
            Logits of what follows the tokens that give any, rows × V, fp32; with `draws` those that are kept.
        """
        num = len(tokens_N) if outputs_N is None else int(outputs_N.max()) + 1
        out = self.buffer(num) if logits is None else logits
        call = self._call
        call.tokens, call.places = tokens_N.ctypes.data, places_N.ctypes.data
        call.positions = positions_N.ctypes.data
        call.outputs = None if outputs_N is None else outputs_N.ctypes.data
        call.sequences = None if sequences is None else sequences.ctypes.data
        call.num_rows = len(tokens_N)
        call.num_sequences = len(tokens_N) if sequences is None else len(sequences) - 1
        call.all_places = all_places.ctypes.data
        call.logits, call.logits_stride = out.data_ptr(), out.stride(0)
        call.kept = None if draws is None else draws.kept.ctypes.data
        call.draw = None if draws is None else ctypes.addressof(draws.struct)
        declined = self._kernel.library.decode_step(
            *(ctypes.addressof(part) for part in (self._shape, self._layers, call)),
            *(tensor.data_ptr() for tensor in self._scratch),
            self._threads,
        )
        assert not declined, "`fits` checked the shape"
        return out[:num, : self._config.vocab_size]

    def draw(self, logits: Sequence[Tensor], draws: Draws) -> None:
        """Draw a token from each row of logits (V, fp32)."""
        rows = np.array([row.data_ptr() for row in logits], dtype=np.int64)
        shape, struct = ctypes.addressof(self._shape), ctypes.addressof(draws.struct)
        self._kernel.library.draw_rows(shape, struct, rows.ctypes.data, len(rows), self._threads)

    def draws(self, size: int) -> Draws:
        """Columns for as many outputs as there may be."""
        return Draws(size, -(-self._config.vocab_size // self._kernel.span))

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of some rows."""
        return torch.empty(rows, _padded(self._config.vocab_size))

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""
        return self._config.vocab_size

    @property
    def _threads(self) -> int:
        return min(torch.get_num_threads(), self._num_threads)

    def _pack_layer(self, weights: Mapping[str, Tensor], layer: int) -> None:
        config, target, name = self._config, self._layers[layer], f"layers.{layer}"
        products = {
            "qkv": ("attention.qkv", config.qkv_bias),
            "out": ("attention.out", config.out_bias),
            "up": ("mlp.up", config.mlp_bias),
            "down": ("mlp.down", config.mlp_bias),
        }
        for ours, (theirs, biased) in products.items():
            weight = weights[f"{name}.{theirs}.weight"]
            packed = _packed(_paired(weight) if ours == "up" else weight)
            setattr(target, ours, self._keep(f"{name}.{ours}", packed))
            if biased:
                bias = weights[f"{name}.{theirs}.bias"].float()
                bias = _paired(bias) if ours == "up" else bias
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
        self._kept[name] = self._arena.keep(tensor)
        return self._kept[name].data_ptr()


def _padded(number: int) -> int:
    return -(-number // _COLUMNS) * _COLUMNS


def _paired(rows: Tensor) -> Tensor:
    """Gates and values of an MLP, first all of the one and then of the other, as sixteen of each in turn."""
    halves = rows.reshape(2, -1, *rows.shape[1:])
    missing = -halves.shape[1] % _HALF
    if missing:
        halves = torch.cat([halves, halves.new_zeros(2, missing, *rows.shape[1:])], 1)
    pairs = halves.reshape(2, -1, _HALF, *rows.shape[1:])
    return pairs.transpose(0, 1).flatten(0, 2)


def _packed(weight: Tensor) -> Tensor:
    """A matrix (outputs × inputs) as panels of 32 outputs, in each two inputs of every output side by side."""
    outputs, inputs = weight.shape
    full = torch.nn.functional.pad(weight.to(torch.bfloat16), (0, 0, 0, _padded(outputs) - outputs))
    return full.view(-1, _COLUMNS, inputs // 2, 2).transpose(1, 2).contiguous()
