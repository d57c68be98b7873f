"""Folders of scored decoders: what is saved comes back, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import models
from posttrain.core import ModelError
from posttrain.models import Decoder, DecoderConfig, ScoredDecoder
from posttrain.models.folder import INDEX, WEIGHTS


def make(config: DecoderConfig) -> ScoredDecoder:
    return ScoredDecoder(Decoder.random(config, seed=1), seed=2).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(5))


def test_scores_come_back_bit_for_bit(config: DecoderConfig, tmp_path: Path) -> None:
    model = make(config)
    models.save_scored(model, tmp_path / "rm")
    back = models.load_scored(tmp_path / "rm")
    assert torch.equal(model(tokens()), back(tokens()))
    assert back.config == config
    assert not back.training
    assert back.decoder.head is None
    values = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert values["architectures"][0].endswith("ForSequenceClassification")
    assert len(values["id2label"]) == 1
    names = load_file(tmp_path / "rm" / WEIGHTS).keys()
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["rm"], "nothing is left beside the folder"


def test_saved_again_it_is_the_same_folder(config: DecoderConfig, tmp_path: Path) -> None:
    models.save_scored(make(config), tmp_path / "a")
    models.save_scored(models.load_scored(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards(config: DecoderConfig, tmp_path: Path) -> None:
    model = make(config)
    models.save_scored(model, tmp_path / "rm", max_shard_size=3000)
    index = json.loads((tmp_path / "rm" / INDEX).read_text())
    held = {path.name: load_file(path) for path in (tmp_path / "rm").glob("*.safetensors")}
    assert len(held) > 2
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert torch.equal(model(tokens()), models.load_scored(tmp_path / "rm")(tokens()))


def test_a_language_model_gets_a_fresh_head(config: DecoderConfig, tmp_path: Path) -> None:
    decoder = Decoder.random(config, seed=1)
    models.save(decoder, tmp_path / "lm")
    model = models.load_scored(tmp_path / "lm", seed=4)
    assert torch.equal(model(tokens()), ScoredDecoder(decoder, seed=4)(tokens()))
    assert not torch.equal(model(tokens()), models.load_scored(tmp_path / "lm", seed=5)(tokens()))
    assert models.load_scored(tmp_path / "lm", zero=True)(tokens()).abs().max() == 0


def test_bfloat16_keeps_the_head_in_float32(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    models.save_scored(make(configure()), tmp_path / "rm")
    model = models.load_scored(tmp_path / "rm", dtype="bfloat16")
    assert model.decoder.embed.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32
    assert model(tokens()).dtype == torch.float32


def test_padding_that_ends_a_sequence_is_not_named(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    """`transformers` would read the score before the end-of-sequence token."""

    def pad_of(**ids: object) -> object:
        models.save_scored(make(configure(**ids)), tmp_path / "rm")
        return json.loads((tmp_path / "rm" / "config.json").read_text())["pad_token_id"]

    assert pad_of(pad_id=3, eos_ids=(2,)) == 3
    assert pad_of(pad_id=2, eos_ids=(2,)) is None
    assert pad_of(pad_id=2, eos_ids=(2, 4)) == 2

    class Tokenizer:
        pad_id = 7

        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    models.save_scored(make(configure()), tmp_path / "rm", tokenizer=Tokenizer())
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["pad_token_id"] == 7


def test_wrong_folders_are_named(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    models.save_scored(make(configure()), tmp_path / "rm")
    weights = tmp_path / "rm" / WEIGHTS
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "score.weight"}, weights)
    with pytest.raises(ModelError, match=r"missing score.weight; unexpected none"):
        models.load_scored(tmp_path / "rm")
    save_file({**tensors, "score.weight": torch.zeros(2, 16)}, weights)
    with pytest.raises(ModelError, match=r"score.weight: shape \[2, 16\], a reward model has \[1, 16\]"):
        models.load_scored(tmp_path / "rm")
    save_file({**tensors, "score.bias": torch.zeros(1)}, weights)
    with pytest.raises(ModelError, match=r"unexpected score.bias"):
        models.load_scored(tmp_path / "rm")
    values = json.loads((tmp_path / "rm" / "config.json").read_text())
    values["id2label"] = {"0": "a", "1": "b"}
    (tmp_path / "rm" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="a classifier of 2 labels"):
        models.load_scored(tmp_path / "rm")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(ModelError, match="no model folder"):
        models.save_scored(make(configure()), tmp_path / "notes")


def test_packed_scores_are_those_of_each_row(config: DecoderConfig) -> None:
    model = make(config)
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
    packed = model.score_packed(torch.tensor([token for row in rows for token in row]), [len(row) for row in rows])
    alone = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
