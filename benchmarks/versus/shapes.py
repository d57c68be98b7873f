"""The models of the comparison: Qwen2-shaped, random weights, written as Hugging Face folders that both sides load.

Runs on our side alone. The tokenizers are real ones where the data folder has them, else one trained on the spot.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from posttrain import models
from posttrain.render import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's size. `tokenizer`: its folder in the data folder; empty: one of `vocab_size` ids is trained."""

    name: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    tokenizer: str = ""
    max_positions: int = 4608

    def config(self, eos_id: int, pad_id: int) -> models.DecoderConfig:
        """The decoder's configuration."""
        return models.DecoderConfig(
            family="qwen2",
            vocab_size=self.vocab_size,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            max_positions=self.max_positions,
            qkv_bias=True,
            rope_theta=1e6,
            tie_embeddings=True,
            eos_ids=(eos_id,),
            pad_id=pad_id,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            vocab_size=512,
            width=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_width=176,
        ),
        Shape(
            name="3m",
            vocab_size=1024,
            width=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            mlp_width=704,
        ),
        Shape(
            name="25m",
            vocab_size=32_064,
            width=384,
            num_layers=8,
            num_heads=6,
            num_kv_heads=2,
            head_dim=64,
            mlp_width=1056,
            tokenizer="phi-3",
        ),
        Shape(
            name="125m",
            vocab_size=151_936,
            width=512,
            num_layers=16,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            mlp_width=1408,
            tokenizer="qwen2.5",
        ),
    )
}


def make_folder(shape: Shape, root: Path, data: Path | None, texts: list[str]) -> Path:
    """The model's folder under `root`, made if it is not there."""
    folder = root / f"model-{shape.name}"
    if (folder / "model.safetensors").exists():
        return folder
    tokenizer = _tokenizer(shape, root, data, texts)
    eos = tokenizer.eos_id
    assert eos is not None, f"the tokenizer of {shape.name} names no end of sequence"
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else eos
    models.save(models.Decoder.random(shape.config(eos, pad), 0), folder, tokenizer=tokenizer)
    return folder


def _tokenizer(shape: Shape, root: Path, data: Path | None, texts: list[str]) -> Tokenizer:
    source = data / "tokenizers" / shape.tokenizer if data is not None and shape.tokenizer else None
    if source is None or not source.is_dir():
        return Tokenizer.train_bpe(
            texts, min(shape.vocab_size, 1024), ("<|pad|>", "<|end|>"), None, eos_token="<|end|>"
        )
    copy = root / f"tokenizer-{shape.tokenizer}"
    copy.mkdir(exist_ok=True)
    (copy / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # take tokenizer.json as it is
    (copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Tokenizer.from_folder(copy)
