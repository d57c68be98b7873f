"""A reward model that was tuned through adapters is saved with what they learned."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain.models import Decoder, DecoderConfig, LoraConfig, ScoredDecoder, add_adapters, load_scored, save_scored

CONFIG = DecoderConfig(
    vocab_size=40, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24, max_positions=32
)


def test_adapters_of_the_trunk_are_saved_merged(tmp_path: Path) -> None:
    model = ScoredDecoder(Decoder.random(CONFIG, 1), seed=2)
    tokens_BT = torch.arange(12)[None]
    before_BT = model(tokens_BT)
    add_adapters(model.decoder, LoraConfig(rank=4), seed=3)
    with torch.no_grad():
        for name, weight in model.decoder.named_parameters():
            if weight.requires_grad and name != "score.weight":
                weight.add_(0.05)
    tuned_BT = model(tokens_BT)
    assert (tuned_BT - before_BT).abs().max() > 1e-3
    save_scored(model, tmp_path)
    torch.testing.assert_close(load_scored(tmp_path)(tokens_BT), tuned_BT, atol=1e-5, rtol=0)
