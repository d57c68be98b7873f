"""Small decoders of every family for the tests of this room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.models import Decoder, DecoderConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 31,
    "width": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "mlp_width": 24,
    "max_positions": 64,
    "init_std": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "num_kv_heads": 4,
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "norm": "layer",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
        "tie_embeddings": True,
    },
    "llama": {},
    "mistral": {"sliding_window": 5, "sliding_layers": (0, 1, 2)},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True, "sliding_window": 4, "sliding_layers": (1, 2)},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "all", "norm_placement": "post"},
}


def make_config(family: str = "llama", **changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**SHAPE, **FAMILIES[family], "family": family, **changes})


@pytest.fixture(params=sorted(FAMILIES))
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    """One configuration of every family."""
    return make_config(request.param)


@pytest.fixture
def llama() -> Decoder:
    """A Llama of 3 layers, 31 tokens."""
    return Decoder.random(make_config("llama"), seed=3)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of numbers."""
    return torch.Generator().manual_seed(11)


@pytest.fixture
def configure() -> Any:
    """`make_config`, for tests that need their own."""
    return make_config
