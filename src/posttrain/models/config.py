"""DecoderConfig: everything that tells one decoder from another."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from posttrain.core import Config, ConfigError, doc
from posttrain.models.hf_config import read_hf_config, write_hf_config

Family = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2"]


class RopeScaling(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rotary frequencies are stretched to reach past the length of pre-training.

    `linear` divides every frequency by `factor` (2306.15595); `llama3` divides the low ones, keeps the high ones and
    blends between (Llama 3, 2407.21783).
    """

    kind: Annotated[Literal["linear", "llama3"], doc("which scheme")]
    factor: Annotated[float, doc("by how much the reach grows", gt=0)]
    low_freq_factor: Annotated[float, doc("llama3: waves longer than original / this are fully divided")] = 1.0
    high_freq_factor: Annotated[float, doc("llama3: waves shorter than original / this are kept")] = 4.0
    original_max_positions: Annotated[int, doc("llama3: tokens of context in pre-training")] = 8192


class DecoderConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a decoder. `DecoderConfig.from_hf` reads config.json; the defaults are a small Llama."""

    family: Annotated[Family, doc("whose names and config.json the folder uses")] = "llama"
    vocab_size: Annotated[int, doc("rows of the embedding: token ids are below it", ge=1)]
    width: Annotated[int, doc("D, numbers per token in the residual stream", ge=1)]
    num_layers: Annotated[int, doc("blocks of attention and MLP", ge=1)]
    num_heads: Annotated[int, doc("H, query heads", ge=1)]
    num_kv_heads: Annotated[int, doc("J, key-value heads; H is a multiple of it", ge=1)]
    head_dim: Annotated[int, doc("K, numbers per head", ge=1)]
    mlp_width: Annotated[int, doc("numbers inside the MLP", ge=1)]
    max_positions: Annotated[int, doc("tokens of context the model is made for", ge=1)]
    activation: Annotated[Literal["silu", "gelu", "gelu_tanh", "relu"], doc("non-linearity of the MLP")] = "silu"
    gated_mlp: Annotated[bool, doc("down(act(gate(x)) * up(x)) rather than down(act(up(x)))")] = True
    norm: Annotated[Literal["rms", "layer"], doc("RMSNorm, or LayerNorm with bias")] = "rms"
    norm_eps: Annotated[float, doc("added to the mean square before the root", ge=0)] = 1e-6
    norm_placement: Annotated[Literal["pre", "post"], doc("x + f(norm(x)), or OLMo 2's x + norm(f(x))")] = "pre"
    qk_norm: Annotated[Literal["none", "head", "all"], doc("RMSNorm of q and k: off, per head, over all heads")] = (
        "none"
    )
    qkv_bias: Annotated[bool, doc("bias on the q, k and v projections")] = False
    out_bias: Annotated[bool, doc("bias on attention's output projection")] = False
    mlp_bias: Annotated[bool, doc("bias on the MLP's projections")] = False
    positions: Annotated[Literal["rope", "learned"], doc("rotary, or a learned table added to the embedding")] = "rope"
    rope_theta: Annotated[float, doc("base of the rotary frequencies", gt=0)] = 10000.0
    rope_scaling: Annotated[RopeScaling | None, doc("how rotary frequencies are stretched")] = None
    sliding_window: Annotated[int | None, doc("tokens that a sliding layer sees, itself included")] = None
    sliding_layers: Annotated[tuple[int, ...], doc("indices of the layers that slide")] = ()
    tie_embeddings: Annotated[bool, doc("the output head is the embedding table")] = False
    init_std: Annotated[float, doc("standard deviation of random weights", ge=0)] = 0.02
    bos_id: Annotated[int | None, doc("token id that begins a sequence")] = None
    eos_ids: Annotated[tuple[int, ...], doc("token ids that end a sequence")] = ()
    pad_id: Annotated[int | None, doc("token id of padding; the decoder gives it no meaning")] = None

    def __post_init__(self) -> None:
        checks = [
            (self.num_heads % self.num_kv_heads == 0, "num_heads", f"a multiple of num_kv_heads={self.num_kv_heads}"),
            (self.positions == "learned" or self.head_dim % 2 == 0, "head_dim", "even, for rotary positions"),
            (self.sliding_window is None or self.sliding_window >= 1, "sliding_window", "at least 1"),
            (all(0 <= i < self.num_layers for i in self.sliding_layers), "sliding_layers", "indices of layers"),
            (not self.sliding_layers or self.sliding_window is not None, "sliding_window", "given for sliding_layers"),
        ]
        for holds, field, rule in checks:
            if not holds:
                raise ConfigError(f"decoder: {field} must be {rule}, not {getattr(self, field)!r}")

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> DecoderConfig:
        """Read the contents of a Hugging Face config.json, as `transformers` 4 or 5 writes it.

        Args:
            values: the parsed JSON.
            where: the file, named in errors.

        Raises:
            ModelError: the model_type is not supported, or it asks for something this decoder does not do.
        """
        return cls.from_dict(read_hf_config(values, where), where=where)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that `transformers` 4 and 5 read."""
        return write_hf_config(self)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer, how many tokens it sees (itself included), or None: all before it."""
        sliding = set(self.sliding_layers)
        return tuple(self.sliding_window if layer in sliding else None for layer in range(self.num_layers))
