from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.core import ConfigError, ModelError
from posttrain.models import Decoder, DecoderConfig, RopeScaling, flops_per_token, num_parameters
from posttrain.models.rope import Rope, rotate, scale_frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 4}


def test_every_family_survives_the_way_to_config_json_and_back(config: DecoderConfig) -> None:
    assert DecoderConfig.from_hf(config.to_hf()) == config
    assert DecoderConfig.from_dict(config.to_dict()) == config


def test_a_family_refuses_what_its_config_json_cannot_say(configure: Callable[..., DecoderConfig]) -> None:
    with pytest.raises(ModelError, match=r"a llama config.json cannot say qk_norm='head'"):
        configure("llama", qk_norm="head").to_hf()
    with pytest.raises(ModelError, match=r"norm_placement='pre'"):
        configure("olmo2", norm_placement="pre").to_hf()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**LLAMA, "model_type": "mamba"}, r"'mamba' is not supported; supported are gpt2, llama, mistral, olmo2"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope type 'yarn' is not supported"),
        ({**LLAMA, "rope_parameters": {"rope_type": "longrope"}}, r"rope type 'longrope' is not supported"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
        ({**LLAMA, "hidden_act": "mish"}, r"activation 'mish' is not supported"),
        ({**LLAMA, "hidden_size": None}, r"the key 'hidden_size' is missing"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"'low_freq_factor' is missing"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True is not supported"),
        ({**GPT2, "scale_attn_weights": False}, r"scale_attn_weights=False is not supported"),
        ({**LLAMA, "model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, r"layer_types must name"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DecoderConfig.from_hf(values)


def test_shapes_that_cannot_be_are_refused(configure: Callable[..., DecoderConfig]) -> None:
    for changes in (
        {"num_kv_heads": 3},
        {"head_dim": 5},
        {"sliding_layers": (0,)},
        {"sliding_window": 4, "sliding_layers": (7,)},
    ):
        with pytest.raises(ConfigError, match="must be"):
            configure("llama", **changes)


def test_windows_by_layer() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert DecoderConfig.from_hf({**qwen, "use_sliding_window": True}).windows == (None, None, None, 8)
    assert DecoderConfig.from_hf(qwen).windows == (None,) * 4
    kinds = ["sliding_attention", "full_attention"] * 2
    both = {**qwen, "use_sliding_window": True, "layer_types": kinds}
    assert DecoderConfig.from_hf(both).windows == (8, None, 8, None)
    mistral = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}
    assert DecoderConfig.from_hf(mistral).windows == (4096,) * 4
    assert DecoderConfig.from_hf({**mistral, "sliding_window": None}).windows == (None,) * 4


def test_defaults_where_config_json_is_silent() -> None:
    llama, gpt2 = DecoderConfig.from_hf(LLAMA), DecoderConfig.from_hf(GPT2)
    assert (llama.num_kv_heads, llama.head_dim, llama.tie_embeddings, llama.eos_ids) == (4, 4, False, (2,))
    assert (gpt2.mlp_width, gpt2.max_positions, gpt2.tie_embeddings) == (64, 1024, True)
    assert DecoderConfig.from_hf({**LLAMA, "eos_token_id": [7, 9]}).eos_ids == (7, 9)
    assert DecoderConfig.from_hf({**LLAMA, "model_type": "qwen3"}).head_dim == 128


def test_llama3_scaling_by_hand() -> None:
    scaling = RopeScaling(kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=100)
    # turns in 100 tokens: 10 (kept), 0.5 (divided), 2.5 (half way between 1 and 4: the mean of the two)
    turns = torch.tensor([10.0, 0.5, 2.5])
    frequencies = turns * 2 * math.pi / 100
    ratio = scale_frequencies(frequencies, scaling) / frequencies
    assert torch.allclose(ratio, torch.tensor([1.0, 1 / 8, (1 + 1 / 8) / 2]), atol=1e-6)


def test_rotation_by_hand(configure: Callable[..., DecoderConfig]) -> None:
    rope = Rope(configure("llama", rope_theta=100.0))  # K = 4: frequencies 1 and 100 ** -0.5 = 0.1
    rotation = rope.rotation(torch.tensor([[0, 3]]), torch.float32)
    x_BTHK = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 2, 1, 4)  # pairs (1, 0) and (0, 1)
    turned = rotate(x_BTHK, rotation)
    assert torch.allclose(turned[0, 0, 0], x_BTHK[0, 0, 0])
    expected = torch.tensor([math.cos(3), -math.sin(0.3), math.sin(3), math.cos(0.3)])
    assert torch.allclose(turned[0, 1, 0], expected, atol=1e-6)


def test_frequencies_are_not_rounded_with_the_weights(llama: Decoder) -> None:
    before = llama.rope.rotation(torch.tensor([[1000]]), torch.float32)  # type: ignore[union-attr]
    llama.to(torch.bfloat16)
    after = llama.rope.rotation(torch.tensor([[1000]]), torch.float32)  # type: ignore[union-attr]
    assert torch.equal(before.cos_BT1K, after.cos_BT1K)


def test_counts_by_hand(configure: Callable[..., DecoderConfig]) -> None:
    # layer: qkv 16 × 32, out 16 × 16, gate, up and down 16 × 24, two norms of 16; embedding and head 31 × 16; last norm
    matrices = 3 * (16 * 32 + 16 * 16 + 3 * 16 * 24) + 31 * 16
    assert num_parameters(configure("llama")) == matrices + 31 * 16 + 3 * 2 * 16 + 16
    assert num_parameters(configure("llama", tie_embeddings=True)) == matrices + 7 * 16
    # each layer: q · k and p · v, a multiplication and an addition each, for 4 heads of 4 numbers and 10 tokens seen
    assert flops_per_token(configure("llama"), 10) == 2 * matrices + 3 * 2 * 2 * 16 * 10
    assert flops_per_token(configure("mistral"), 10) == 2 * matrices + 3 * 2 * 2 * 16 * 5


def test_counts_are_those_of_the_module(config: DecoderConfig) -> None:
    assert num_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())
