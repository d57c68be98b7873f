"""Greedy completions of a batch, token by token against `transformers` generate, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models
from posttrain.core import Sampling
from posttrain.engine import LocalEngine

transformers = pytest.importorskip("transformers")

VOCAB = 97
NEW = 24
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": {**BASE, "model_type": "llama"},
    "mistral-window": {**BASE, "model_type": "mistral", "sliding_window": 9},
    "qwen2": {**BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 16},
    "olmo2": {**BASE, "model_type": "olmo2"},
}


class Ids:
    """Text is of no interest here."""

    vocab_size = VOCAB
    eos_ids = frozenset({2})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: Any, *, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens))


def prompts() -> list[list[int]]:
    """Fourteen prompts of 1 to 40 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = [1, 40, 3, 17, 8, 9, 10, 33, 2, 5, 26, 12, 7, 16]
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def reference(folder: Path) -> list[list[int]]:
    """What transformers generates, each prompt alone, with and without reaching the end of sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in prompts():
        with torch.no_grad():
            tokens = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW, do_sample=False
            )
        out.append(tokens[0, len(prompt) :].tolist())
    return out


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]]]:
    """A random checkpoint of one family, and the reference completions."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(FAMILIES[request.param]))
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder, reference(folder)


@pytest.mark.parametrize(
    "options", [{"max_batch": 16}, {"max_batch": 3, "prefill_tokens": 8}], ids=["together", "few slots, chunks"]
)
def test_greedy_is_that_of_transformers(checkpoint: tuple[Path, list[list[int]]], options: dict[str, int]) -> None:
    folder, wanted = checkpoint
    with LocalEngine(models.load(folder), Ids(), **options) as engine:
        out = engine.generate(prompts(), Sampling(max_tokens=NEW, temperature=0))
    assert [list(completion.tokens) for completion in out] == wanted
