"""Merging, with numbers worked by hand, and over folders."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain import models
from posttrain.core import ConfigError, ModelError
from posttrain.models import Decoder, DecoderConfig, Merge, merge_folders, merge_tensors
from posttrain.models.folder import INDEX, WEIGHTS
from posttrain.models.merging import average, drop_and_rescale, ema, slerp, ties, trim, weighted_sum
from posttrain.models.merging_folders import FolderReader


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Worked by hand


def test_average() -> None:
    close(average([row(1, 2), row(3, 6)], [1, 1]), row(2, 4))
    close(average([row(1, 2), row(3, 6)], [3, 1]), row(1.5, 3))  # (3·1 + 3) / 4, (3·2 + 6) / 4
    close(average([row(1, 0), row(0, 1), row(2, 2)], [1, 2, 1]), row(0.75, 1.0))


def test_ema() -> None:
    # 8 → 0.75·8 + 0.25·4 = 7 → 0.75·7 + 0.25·(−1) = 5
    close(ema([row(8), row(4), row(-1)], 0.75), row(5))


def test_slerp() -> None:
    half = math.sqrt(0.5)  # halfway between two axes, on the arc and not on the chord
    close(slerp(row(1, 0), row(0, 1), 0.5), row(half, half))
    # a third of 90 degrees is 30
    close(slerp(row(1, 0), row(0, 1), 1 / 3), row(math.cos(math.pi / 6), math.sin(math.pi / 6)))
    close(slerp(row(1, 0), row(2, 0), 0.25), row(1.25, 0))  # parallel: the straight line
    close(slerp(row(0, 0), row(2, 0), 0.5), row(1, 0))
    for t, end in ((0.0, row(1, 0)), (1.0, row(0, 3))):
        close(slerp(row(1, 0), row(0, 3), t), end)


def test_task_arithmetic() -> None:
    close(weighted_sum([row(1, -1), row(2, 2)], [1, -0.5]), row(0, -2))
    config = Merge(method="task", weights=(1.0, 2.0), scale=0.5)
    # base + 0.5 · (1·(2−1) + 2·(0−1)), base + 0.5 · (1·(5−1) + 2·(1−1))
    close(merge_tensors([row(2, 5), row(0, 1)], config, base=row(1, 1)), row(0.5, 3.0))


def test_trim_keeps_the_largest() -> None:
    close(trim(row(0.1, -5, 2, 0.3), 0.5), row(0, -5, 2, 0))
    close(trim(row(0.1, -5, 2, 0.3), 0.26), row(0, -5, 2, 0))  # ⌈1.04⌉ = 2
    close(trim(row(1, 2), 1.0), row(1, 2))


def test_ties_elects_signs_and_averages_those_that_agree() -> None:
    vectors = [row(3, 1, 0, -2), row(1, -4, 0, -2), row(-2, 1, 0, 1)]
    # totals 2, −2, 0, −3: signs +, −, none, −; those that agree: (3, 1), (−4), none, (−2, −2)
    close(ties(vectors, [1, 1, 1], 1.0), row(2, -4, 0, -2))
    # with weights 1, 1, 3 the totals are −2, 0: and 1 − 4 + 3 = 0 elects nobody; −2 − 2 + 3 = −1
    close(ties(vectors, [1, 1, 3], 1.0), row(-2, 0, 0, -2))
    # half of the numbers: (3, ·, ·, −2), (·, −4, ·, −2), (−2, 1 or 1, …)
    close(ties(vectors[:2], [1, 1], 0.5), row(3, -4, 0, -2))
    config = Merge(method="ties", density=1.0, scale=0.5)
    close(merge_tensors([vector + 1 for vector in vectors], config, base=torch.ones(4)), 1 + row(1, -2, 0, -1))


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    vector = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) + 2.0
    thinned = drop_and_rescale(vector, 0.25, seed=3)
    kept = thinned != 0
    assert kept.float().mean() == pytest.approx(0.25, abs=0.01)
    close(thinned[kept], vector[kept] * 4)
    assert thinned.mean() == pytest.approx(2.0, abs=0.05)
    assert torch.equal(thinned, drop_and_rescale(vector, 0.25, seed=3))
    assert not torch.equal(thinned, drop_and_rescale(vector, 0.25, seed=4))
    close(drop_and_rescale(vector, 1.0, seed=0), vector)


def test_dare_draws_for_every_model_and_tensor_apart() -> None:
    ones, zeros = torch.ones(1000), torch.zeros(1000)
    config = Merge(method="dare", density=0.5)
    both = merge_tensors([ones, ones], config, base=zeros, name="a")
    assert set(both.tolist()) == {0.0, 2.0, 4.0}, "the two models drop different numbers"
    assert not torch.equal(both, merge_tensors([ones, ones], config, base=zeros, name="b"))
    assert torch.equal(both, merge_tensors([ones, ones], config, base=zeros, name="a"))
    assert set(merge_tensors([ones, ones], config.replace(method="dare_ties"), base=zeros).tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("method", ["average", "ema", "slerp", "task", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_give_themselves(method: Any, dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    tensors = [tensor] * (2 if method == "slerp" else 3)
    config = Merge(method=method)
    merged = merge_tensors(tensors, config, base=tensor if method in ("task", "ties") else None)
    assert torch.equal(merged.to(dtype), tensor)


@pytest.mark.parametrize(
    ("config", "num_models", "has_base", "message"),
    [
        (Merge(), 1, False, "average of 1 models"),
        (Merge(method="slerp"), 3, False, "slerp takes 2"),
        (Merge(weights=(1.0,)), 2, False, "1 weights for 2 models"),
        (Merge(weights=(1.0, -1.0)), 2, False, "not sum to 0"),
        (Merge(method="slerp", weights=(1.0, 1.0)), 2, False, "takes no weights, but t"),
        (Merge(method="ties"), 2, False, "needs the base model"),
        (Merge(), 2, True, "takes no base model"),
    ],
)
def test_what_cannot_be_merged_is_refused(config: Merge, num_models: int, has_base: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(num_models, has_base=has_base)


# Folders


def write(folder: Path, config: DecoderConfig, seed: int, **options: Any) -> Path:
    models.save(Decoder.random(config, seed), folder, **options)
    return folder


def tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def test_folders_are_merged_tensor_by_tensor(config: DecoderConfig, tmp_path: Path) -> None:
    folders = [write(tmp_path / str(seed), config, seed) for seed in range(3)]
    merge_folders(folders, tmp_path / "merged", Merge(weights=(2.0, 1.0, 1.0)))
    merged = models.load(tmp_path / "merged")
    parents = [models.load(folder).state_dict() for folder in folders]
    assert merged.config == models.load(folders[0]).config
    for name, weight in merged.state_dict().items():
        expected = 0.5 * parents[0][name] + 0.25 * parents[1][name] + 0.25 * parents[2][name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_shards_and_types_of_the_first(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    config = configure("llama")
    first = tmp_path / "first"
    models.save(Decoder.random(config, 1, dtype=torch.bfloat16), first, max_shard_size=3000)
    second = write(tmp_path / "second", config, 2)
    merge_folders([first, second], tmp_path / "merged", Merge(method="slerp"), max_shard_size=3000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 2
    assert (tmp_path / "merged" / INDEX).exists()
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(file.stat().st_size < 6000 for file in files)
    models.load(tmp_path / "merged")


def test_an_average_of_identical_folders_is_the_folder(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    folder = write(tmp_path / "one", configure("qwen2"), 1)
    merge_folders([folder, folder, folder], tmp_path / "merged", Merge())
    before, after = (load_file(path / WEIGHTS) for path in (folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_no_more_than_a_tensor_of_each_model_is_in_memory(
    configure: Callable[..., DecoderConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write(tmp_path / str(seed), configure("llama"), seed) for seed in range(3)]
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = FolderReader.tensor

    def watched(reader: FolderReader, name: str) -> Tensor:
        nonlocal most
        tensor = read(reader, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in alive))
        return tensor

    monkeypatch.setattr(FolderReader, "tensor", watched)
    merge_folders(folders[:2], tmp_path / "merged", Merge(method="ties"), base=folders[2])
    assert len(alive) > 30
    assert most == 3


def test_models_that_differ_are_refused(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    first = write(tmp_path / "first", configure("llama"), 1)
    others = {
        "model_type 'llama' and 'qwen3'": configure("qwen3"),
        "vocab_size 31 and 32": configure("llama", vocab_size=32),
        "num_layers 3 and 2": configure("llama", num_layers=2),
        "rope_theta 10000.0 and 5000.0": configure("llama", rope_theta=5000.0),
    }
    for number, (message, config) in enumerate(others.items()):
        other = write(tmp_path / f"other-{number}", config, 2)
        with pytest.raises(ModelError, match=f"cannot be merged: .*{message}"):
            merge_folders([first, other], tmp_path / "merged", Merge())
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*")), "nothing is left lying about"


def test_shapes_and_vocabularies_are_compared(configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    folders = [write(tmp_path / str(seed), configure("llama"), seed) for seed in range(2)]
    tokenizer(folders[0], {"a": 0, "b": 1, "c": 2})
    tokenizer(folders[1], {"a": 0, "c": 1, "b": 2})
    with pytest.raises(ModelError, match=r"vocabularies differ, first in token 1 \('b'\)"):
        merge_folders(folders, tmp_path / "merged", Merge())
    tokenizer(folders[1], {"c": 2, "b": 1, "a": 0})
    merge_folders(folders, tmp_path / "merged", Merge())
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    tensors = load_file(folders[1] / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folders[1] / WEIGHTS)
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \[16\] and \[5\]"):
        merge_folders(folders, tmp_path / "merged", Merge())
    del tensors["model.norm.weight"]
    save_file(tensors, folders[1] / WEIGHTS)
    with pytest.raises(ModelError, match=r"only one of them has model\.norm\.weight"):
        merge_folders(folders, tmp_path / "merged", Merge())
    with pytest.raises(ModelError, match="is one of the models"):
        merge_folders(folders, folders[0], Merge())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ModelError, match="is no model folder"):
        merge_folders(folders, tmp_path / "notes", Merge())
