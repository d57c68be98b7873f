"""config.json of each family ↔ the fields of DecoderConfig.

Reads what `transformers` 4 writes (`rope_theta`, `rope_scaling`) and what 5 writes (`rope_parameters`); writes both.
Keys that change what the model computes and are not supported are refused by name, never passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.core import ModelError

if TYPE_CHECKING:
    from posttrain.models.config import DecoderConfig

# What a config.json means where it leaves a key out: the defaults of each family's configuration class.
_SHARED = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attention_bias": False,
    "mlp_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SHARED, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048},
    "mistral": {
        **_SHARED,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {**_SHARED, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": {
        **_SHARED,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    "olmo2": {
        **_SHARED,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "max_position_embeddings": 2048,
    },
    "gpt2": {
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    },
}
FAMILIES = tuple(sorted(DEFAULTS))

# `max_window_layers`: layers below it attend to everything, where the config turns sliding windows on.
_MAX_WINDOW_LAYERS = 28
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def read_hf_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a DecoderConfig, from the contents of a config.json.

    Raises:
        ModelError: an unknown model_type, a missing key, or something this decoder does not compute.
    """
    family = values.get("model_type")
    if family not in DEFAULTS:
        raise ModelError(
            f"{where}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}. A model of the "
            "same computation under another name loads with model_type set to the family it follows; another "
            "architecture needs its own entry in posttrain/models/hf_config.py and posttrain/models/weights.py"
        )
    known = {**DEFAULTS[family], **values}
    return _read_gpt2(known, where) if family == "gpt2" else _read_llama_like(known, where)


def _need(values: dict[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise ModelError(f"{where}: the key {key!r} is missing")
    return values[key]


def _read_llama_like(values: dict[str, Any], where: str) -> dict[str, Any]:
    family = values["model_type"]
    width = _need(values, "hidden_size", where)
    num_heads = _need(values, "num_attention_heads", where)
    bias = bool(values["attention_bias"])
    return {
        "family": family,
        "vocab_size": _need(values, "vocab_size", where),
        "width": width,
        "num_layers": _need(values, "num_hidden_layers", where),
        "num_heads": num_heads,
        "num_kv_heads": values["num_key_value_heads"] or num_heads,
        "head_dim": values["head_dim"] or width // num_heads,
        "mlp_width": _need(values, "intermediate_size", where),
        "max_positions": values["max_position_embeddings"],
        "activation": _activation(values["hidden_act"], where),
        "norm_eps": values["rms_norm_eps"],
        "norm_placement": "post" if family == "olmo2" else "pre",
        "qk_norm": {"qwen3": "head", "olmo2": "all"}.get(family, "none"),
        "qkv_bias": family == "qwen2" or (bias and family != "mistral"),
        "out_bias": bias and family in ("llama", "qwen3", "olmo2"),
        "mlp_bias": bool(values["mlp_bias"]) and family == "llama",
        **_read_rope(values, where),
        **_read_windows(values, where),
        **_read_shared(values),
    }


def _read_gpt2(values: dict[str, Any], where: str) -> dict[str, Any]:
    unsupported = {
        "scale_attn_weights": values.get("scale_attn_weights", True) is not True,
        "scale_attn_by_inverse_layer_idx": bool(values.get("scale_attn_by_inverse_layer_idx", False)),
        "add_cross_attention": bool(values.get("add_cross_attention", False)),
    }
    for key, found in unsupported.items():
        if found:
            raise ModelError(f"{where}: {key}={values[key]!r} is not supported")
    width, num_heads = _need(values, "n_embd", where), _need(values, "n_head", where)
    return {
        "family": "gpt2",
        "vocab_size": _need(values, "vocab_size", where),
        "width": width,
        "num_layers": _need(values, "n_layer", where),
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": width // num_heads,
        "mlp_width": values["n_inner"] or 4 * width,
        "max_positions": values["n_positions"],
        "activation": _activation(values["activation_function"], where),
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": values["layer_norm_epsilon"],
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
        **_read_shared(values),
    }


def _read_shared(values: dict[str, Any]) -> dict[str, Any]:
    eos = values["eos_token_id"]
    return {
        "tie_embeddings": bool(values["tie_word_embeddings"]),
        "init_std": values["initializer_range"],
        "bos_id": values["bos_token_id"],
        "eos_ids": [] if eos is None else eos if isinstance(eos, list) else [eos],
        "pad_id": values["pad_token_id"],
    }


def _activation(name: str, where: str) -> str:
    if name not in _ACTIVATIONS:
        raise ModelError(f"{where}: activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _read_rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    # transformers 5 keeps everything in rope_parameters; 4 keeps the base in rope_theta, the rest in rope_scaling
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10000.0
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(f"{where}: partial_rotary_factor={partial} is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind not in ("linear", "llama3"):
        raise ModelError(f"{where}: rope type {kind!r} is not supported; supported are default, linear, llama3")
    scaling: dict[str, Any] = {"kind": kind, "factor": float(_need(rope, "factor", where))}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        scaling["low_freq_factor"] = float(_need(rope, "low_freq_factor", where))
        scaling["high_freq_factor"] = float(_need(rope, "high_freq_factor", where))
        scaling["original_max_positions"] = original or values["max_position_embeddings"]
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _read_windows(values: dict[str, Any], where: str) -> dict[str, Any]:
    num_layers = _need(values, "num_hidden_layers", where)
    window = values.get("sliding_window")
    if values["model_type"] in ("qwen2", "qwen3"):
        window = window if values["use_sliding_window"] else None
        first = values.get("max_window_layers", _MAX_WINDOW_LAYERS)
        sliding = [layer for layer in range(num_layers) if layer >= first]
    elif values["model_type"] == "mistral":
        sliding = list(range(num_layers))
    else:
        return {}
    kinds = values.get("layer_types")
    if kinds is not None and values["model_type"] != "mistral":  # mistral's own implementation passes layer_types over
        if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"{where}: layer_types must name full_attention or sliding_attention for each of the {num_layers} "
                f"layers, not {kinds!r}"
            )
        sliding = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    if window is None:
        return {}
    return {"sliding_window": window, "sliding_layers": sliding}


def write_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The contents of a config.json that `transformers` 4 and 5 read.

    Raises:
        ModelError: the fields are ones that the family's config.json cannot say.
    """
    values = _write_gpt2(config) if config.family == "gpt2" else _write_llama_like(config)
    eos = list(config.eos_ids)
    values |= {
        "model_type": config.family,
        "architectures": [ARCHITECTURES[config.family]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_id,
    }
    read_back = type(config).from_hf(values)
    if read_back != config:
        wrong = [
            f"{key}={mine!r} (would be read as {theirs!r})"
            for key, mine in config.to_dict().items()
            if mine != (theirs := read_back.to_dict()[key])
        ]
        raise ModelError(
            f"a {config.family} config.json cannot say {'; '.join(wrong)}. Choose a family that has these features"
        )
    return values


ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "layer_norm_epsilon": config.norm_eps,
    }


def _write_llama_like(config: DecoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        **_write_rope(config),
    }
    if config.family in ("llama", "qwen3", "olmo2"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        sliding = set(config.sliding_layers)
        values |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": min(sliding, default=config.num_layers),
            "layer_types": [
                "sliding_attention" if layer in sliding else "full_attention" for layer in range(config.num_layers)
            ],
        }
    return values


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
        return {"rope_theta": config.rope_theta, "rope_scaling": None, "rope_parameters": parameters}
    old: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        old |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    # rope_theta inside too: where both are present, transformers 5 takes rope_scaling for rope_parameters
    old["rope_theta"] = config.rope_theta
    return {"rope_theta": config.rope_theta, "rope_scaling": old, "rope_parameters": dict(old)}
