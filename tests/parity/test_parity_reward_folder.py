"""Folders of scored decoders against `transformers`' AutoModelForSequenceClassification, both ways, every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models
from posttrain.models import Decoder, DecoderConfig, ScoredDecoder

transformers = pytest.importorskip("transformers")

VOCAB = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0},
    "llama": BASE,
    "mistral": {**BASE, "sliding_window": 5},
    "qwen2": {**BASE, "tie_word_embeddings": True},
    "qwen3": {**BASE, "head_dim": 16},
    "olmo2": BASE,
}


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (9, 4, 12)]


def ours(model: ScoredDecoder) -> torch.Tensor:
    lengths = [len(row) for row in rows()]
    with torch.no_grad():
        scores_N = model.score_packed(torch.tensor([token for row in rows() for token in row]), lengths)
    return scores_N[torch.tensor(lengths).cumsum(0) - 1]


def theirs(model: Any) -> torch.Tensor:
    longest = max(len(row) for row in rows())
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows()])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows()])
    with torch.no_grad():
        scores: torch.Tensor = model(input_ids=tokens, attention_mask=mask).logits[:, 0]
    return scores


def configured(family: str) -> Any:
    return transformers.AutoConfig.for_model(family, **CASES[family], num_labels=1)


@pytest.mark.parametrize("family", CASES)
def test_transformers_loads_ours(family: str, tmp_path: Path) -> None:
    config = DecoderConfig.from_hf({"model_type": family, **configured(family).to_dict()})
    model = ScoredDecoder(Decoder.random(config, seed=1), seed=2).eval()
    models.save_scored(model, tmp_path / "rm")
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.num_labels == 1
    assert type(loaded).__name__ == models.heads_folder.CLASSIFIERS[family]
    torch.testing.assert_close(ours(model), theirs(loaded.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_ours_loads_what_transformers_saves(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(configured(family)).eval()
    model.save_pretrained(tmp_path / "rm")
    torch.testing.assert_close(ours(models.load_scored(tmp_path / "rm")), theirs(model), rtol=1e-5, atol=1e-5)
