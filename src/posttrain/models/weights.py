"""Names of weights: ours ↔ those of Hugging Face folders, one table per family.

Each of our parameters is one or several tensors of theirs, stacked by rows: `attention.qkv` is q over k over v, a
gated `mlp.up` is gate over up. GPT-2 keeps its matrices transposed (Conv1D) and its q, k, v already side by side. The
table is a bijection: every name on either side occurs once. A tied head has no entry, on either side.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from posttrain.models.config import DecoderConfig


class Entry(NamedTuple):
    """One of our parameters and the tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()  # of each of theirs, where there are several
    transposed: bool = False  # theirs is columns by rows


PREFIX = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2"), "model.") | {"gpt2": "transformer."}

# buffers that older versions saved beside the weights
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")

# within a layer: ours → theirs, for the norms and projections that all Llama-like families share
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
}
_GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def weight_table(config: DecoderConfig) -> list[Entry]:
    """All parameters of a decoder, in the order of the forward pass."""
    return _gpt2_table(config) if config.family == "gpt2" else _llama_like_table(config)


def canonical_name(name: str, config: DecoderConfig) -> str | None:
    """A tensor's name with the family's prefix, which some folders leave out; None for buffers that are no weights."""
    if _BUFFERS.search(name):
        return None
    prefix = PREFIX[config.family]
    return name if name == "lm_head.weight" or name.startswith(prefix) else prefix + name


def _llama_like_table(config: DecoderConfig) -> list[Entry]:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    table = [Entry("embed.weight", ("model.embed_tokens.weight",))]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        qkv = tuple(f"{theirs}self_attn.{part}_proj" for part in "qkv")
        table += _stacked(f"{ours}attention.qkv", qkv, (heads, kv_heads, kv_heads), bias=config.qkv_bias)
        if config.qk_norm != "none":
            table += [
                Entry(f"{ours}attention.{part}_norm.weight", (f"{theirs}self_attn.{part}_norm.weight",))
                for part in "qk"
            ]
        table += _stacked(f"{ours}attention.out", (f"{theirs}self_attn.o_proj",), (), bias=config.out_bias)
        up = (f"{theirs}mlp.gate_proj", f"{theirs}mlp.up_proj")
        table += _stacked(f"{ours}mlp.up", up, (config.mlp_width, config.mlp_width), bias=config.mlp_bias)
        table += _stacked(f"{ours}mlp.down", (f"{theirs}mlp.down_proj",), (), bias=config.mlp_bias)
        for mine, name in _NORMS[config.norm_placement].items():
            table.append(Entry(f"{ours}{mine}.weight", (f"{theirs}{name}.weight",)))
    table.append(Entry("final_norm.weight", ("model.norm.weight",)))
    return table + _head(config)


def _gpt2_table(config: DecoderConfig) -> list[Entry]:
    table = [
        Entry("embed.weight", ("transformer.wte.weight",)),
        Entry("positions.weight", ("transformer.wpe.weight",)),
    ]
    for layer in range(config.num_layers):
        for mine, name in _GPT2_LAYER.items():
            ours, theirs = f"layers.{layer}.{mine}", f"transformer.h.{layer}.{name}"
            table.append(Entry(f"{ours}.weight", (f"{theirs}.weight",), transposed="norm" not in mine))
            table.append(Entry(f"{ours}.bias", (f"{theirs}.bias",)))
    table += [Entry(f"final_norm.{kind}", (f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias")]
    return table + _head(config)


def _stacked(ours: str, theirs: tuple[str, ...], rows: tuple[int, ...], *, bias: bool) -> list[Entry]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), rows) for kind in kinds]


def _head(config: DecoderConfig) -> list[Entry]:
    return [] if config.tie_embeddings else [Entry("head.weight", ("lm_head.weight",))]
