from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import models
from posttrain.core import ModelError
from posttrain.models import Decoder, DecoderConfig
from posttrain.models.folder import INDEX, WEIGHTS


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def same(left: Decoder, right: Decoder) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_weights_come_back_bit_for_bit(config: DecoderConfig, tmp_path: Path) -> None:
    model = Decoder.random(config, seed=1)
    models.save(model, tmp_path / "m")
    back = models.load(tmp_path / "m")
    assert same(model, back)
    assert back.config == config
    assert not back.training
    assert not [path.name for path in tmp_path.iterdir() if path.name != "m"], "nothing is left beside the folder"


def test_shards_hold_each_weight_once(config: DecoderConfig, tmp_path: Path) -> None:
    model = Decoder.random(config, seed=1)
    models.save(model, tmp_path / "m", max_shard_size=3000)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    held = {path.name: load_file(path) for path in (tmp_path / "m").glob("*.safetensors")}
    assert len(held) > 2
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert same(model, models.load(tmp_path / "m"))


def test_a_tied_head_is_neither_written_twice_nor_lost(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    model = Decoder.random(configure("qwen2"), seed=1)
    models.save(model, tmp_path / "m")
    names = load_file(tmp_path / "m" / WEIGHTS).keys()
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(model, models.load(tmp_path / "m"))  # older folders hold a copy
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ModelError, match=r"lm_head.weight differs from the embedding though config.json ties them"):
        models.load(tmp_path / "m")


def test_wrong_weights_are_named(llama: Decoder, tmp_path: Path) -> None:
    models.save(llama, tmp_path / "m")
    key = "model.layers.1.self_attn.k_proj.weight"
    rewrite(tmp_path / "m", lambda t: t.update({key: t[key][:4].clone()}))
    with pytest.raises(ModelError, match=rf"{key}: shape \[4, 16\], but config.json asks for \[8, 16\]"):
        models.load(tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.update({"model.extra": t.pop(key)}))
    with pytest.raises(ModelError, match=rf"missing {key}; unexpected model.extra"):
        models.load(tmp_path / "m")


def test_a_lost_head_says_what_to_do(llama: Decoder, tmp_path: Path) -> None:
    models.save(llama, tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.__delitem__("lm_head.weight"))
    with pytest.raises(ModelError, match=r"missing lm_head.weight; unexpected none; .*tie_word_embeddings: true"):
        models.load(tmp_path / "m")


def test_gpt2_without_prefix_and_with_mask_buffers(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    model = Decoder.random(configure("gpt2"), seed=1)
    models.save(model, tmp_path / "m")

    def as_first_published(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    rewrite(tmp_path / "m", as_first_published)
    assert same(model, models.load(tmp_path / "m"))


def test_conv1d_is_transposed(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    model = Decoder.random(configure("gpt2"), seed=1)
    models.save(model, tmp_path / "m")
    theirs = load_file(tmp_path / "m" / WEIGHTS)["transformer.h.2.mlp.c_fc.weight"]
    assert theirs.shape == (16, 24)
    assert torch.equal(theirs, model.state_dict()["layers.2.mlp.up.weight"].T)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json: not valid JSON"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"neither model.safetensors nor"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), r"pickle files are never read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x10" * 40), r"not readable as safetensors"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "lost.safetensors"}}'), r"lost.safetensors"),
    ],
)
def test_a_spoilt_folder_is_refused(
    spoil: Callable[[Path], object], message: str, llama: Decoder, tmp_path: Path
) -> None:
    spoil(models.save(llama, tmp_path / "m"))
    with pytest.raises(ModelError, match=message):
        models.load(tmp_path / "m")


def test_a_truncated_file_is_refused(llama: Decoder, tmp_path: Path) -> None:
    path = models.save(llama, tmp_path / "m") / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not readable as safetensors"):
        models.load(tmp_path / "m")


def test_quantised_folders_are_refused(llama: Decoder, tmp_path: Path) -> None:
    path = models.save(llama, tmp_path / "m") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"bits": 4}}))
    with pytest.raises(ModelError, match="quantised"):
        models.load(tmp_path / "m")


class FakeTokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_tokenizer_files_go_along(llama: Decoder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    for name in [*names, "notes.md"]:
        (source / name).write_text('{"eos_token_id": [5, 2]}')
    folder = models.save(llama, tmp_path / "m", tokenizer_files=source)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "config.json", WEIGHTS])
    assert models.load(folder).config.eos_ids == (5, 2)
    folder = models.save(llama, tmp_path / "n", tokenizer=FakeTokenizer())
    assert (folder / "tokenizer.json").exists()
    models.save(llama, tmp_path / "m", tokenizer_files=tmp_path / "m")  # onto itself: nothing may be lost
    assert (tmp_path / "m" / "chat_template.jinja").exists()
    with pytest.raises(ModelError, match="no such folder to copy the tokenizer from"):
        models.save(llama, tmp_path / "m", tokenizer_files=tmp_path / "nowhere")


class FailingTokenizer:
    def save(self, folder: Path) -> None:
        raise OSError("disk full")


def test_a_failed_save_leaves_the_old_folder_whole(llama: Decoder, tmp_path: Path) -> None:
    models.save(llama, tmp_path / "m")
    other = Decoder.random(llama.config, seed=99)
    with pytest.raises(OSError, match="disk full"):
        models.save(other, tmp_path / "m", tokenizer=FailingTokenizer())
    assert same(models.load(tmp_path / "m"), llama)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    models.save(other, tmp_path / "m")
    assert same(models.load(tmp_path / "m"), other)


def test_a_folder_of_something_else_is_never_replaced(llama: Decoder, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("")
    with pytest.raises(ModelError, match="is no model folder"):
        models.save(llama, tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").exists()


def test_dtypes(llama: Decoder, tmp_path: Path) -> None:
    models.save(llama.cast(torch.bfloat16), tmp_path / "m")
    assert models.load(tmp_path / "m").embed.weight.dtype == torch.float32
    assert models.load(tmp_path / "m", dtype="auto").embed.weight.dtype == torch.bfloat16
    assert models.load(tmp_path / "m", dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="'int4' is not one of"):
        models.load(tmp_path / "m", dtype="int4")


def test_names_that_are_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        models.resolve(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no such model folder"):
        models.resolve("./nowhere/at/all")
    hub = pytest.importorskip("huggingface_hub")
    asked: list[object] = []

    def offline(name: str, **options: object) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"hf download some/model --local-dir FOLDER"):
        models.resolve("some/model@v2")
    assert asked == [("some/model", "v2", ["*.safetensors", "*.json", "*.jinja", "*.txt"])]
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_options: str(tmp_path))
    assert models.resolve("some/model") == tmp_path


def test_the_door_names_what_it_has() -> None:
    assert models.__all__ == sorted(models.__all__)
    assert all(hasattr(models, name) for name in models.__all__)
