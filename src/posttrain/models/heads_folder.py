"""Folders of scored decoders: Hugging Face's `…ForSequenceClassification` with one label, read and written.

`transformers`' AutoModelForSequenceClassification loads what is written here with the same scores, and what TRL's
RewardTrainer writes is read here. The head's weight is `score.weight`; there is no output head for the vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.core import ModelError
from posttrain.models.adapters import PlainWeights
from posttrain.models.config import DecoderConfig
from posttrain.models.decoder import Decoder
from posttrain.models.folder import (
    INDEX,
    WEIGHTS,
    SavesFiles,
    all_eos_ids,
    as_dtype,
    copy_part,
    copy_tokenizer,
    load,
    read_json,
    some_of,
    take_place,
    weight_files,
)
from posttrain.models.heads import ScoredDecoder
from posttrain.models.hf_config import ARCHITECTURES
from posttrain.models.hub import resolve
from posttrain.models.weights import Entry, canonical_name, weight_table

SCORE = "score.weight"
CLASSIFIERS = {
    family: name.replace("LMHeadModel", "ForSequenceClassification").replace("ForCausalLM", "ForSequenceClassification")
    for family, name in ARCHITECTURES.items()
}
"""`transformers`' class for each family; it has one for every family that the decoder knows."""


def save_scored(
    model: ScoredDecoder,
    path: Path | str,
    *,
    tokenizer: SavesFiles | None = None,
    tokenizer_files: Path | str | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Write a scored decoder as a folder of `…ForSequenceClassification` with one label, all or nothing.

    `transformers` reads the score of a row at its last token that is not `pad_token_id`. Where the padding token is
    also the only token that ends a sequence, it would read one token too early, so the folder then names no padding
    token: `transformers` scores single rows rightly and refuses batches until `config.pad_token_id` is set to another
    token. The dropped output head of an untied decoder is not written: nothing reads it.

    Args:
        model: the trunk and its head.
        path: the folder; a model folder that was there is replaced as a whole.
        tokenizer: writes its files into the folder; its `pad_id`, if it has one, is used where the model has none.
        tokenizer_files: a folder whose tokenizer, chat template and generation_config.json are copied.
        max_shard_size: bytes per safetensors file; a model of one file has no index.

    Raises:
        ModelError: `path` is something else than a model folder, or the family cannot express the configuration.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / "config.json").exists() or not any(path.iterdir()))):
        raise ModelError(f"{path}: exists and is no model folder; choose another path or remove it")
    values = _config_values(model, getattr(tokenizer, "pad_id", None))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if tokenizer_files is not None:
            copy_tokenizer(Path(tokenizer_files), partial)
        if tokenizer is not None:
            tokenizer.save(partial)
        (partial / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_shards(model, partial, max_shard_size)
        take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def load_scored(
    path: Path | str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    zero: bool = False,
) -> ScoredDecoder:
    """A scored decoder from a folder: a reward model as it was trained, or a language model with a fresh head.

    Args:
        path: a folder of `…ForSequenceClassification` with one label, or of a language model, or a name on the Hub.
        dtype: of the trunk's matrices, or "auto" for that of the folder; norms and the head are kept in float32.
        device: where the weights go.
        seed: of a fresh head (see `ScoredDecoder`).
        zero: a fresh head that says 0 everywhere.

    Returns:
        The model, in training mode off. One from a reward model's folder has no output head (`decoder.head` is None).

    Raises:
        ModelError: as `models.load`; or the folder is a classifier of several labels.
    """
    folder = resolve(path)
    values = read_json(folder / "config.json")
    if not is_scored(values):
        return ScoredDecoder(load(folder, dtype=dtype, device=device), seed=seed, zero=zero).eval()
    if values.get("quantization_config"):
        raise ModelError(f"{folder}: quantised weights are not supported; use the unquantised model")
    num_labels = _num_labels(values)
    if num_labels != 1:
        raise ModelError(f"{folder}: a classifier of {num_labels} labels; a reward model has one (num_labels: 1)")
    config = DecoderConfig.from_hf(values, where=str(folder / "config.json"))
    config = config.replace(eos_ids=all_eos_ids(config, folder))
    if dtype == "auto":
        dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    with torch.device("meta"):
        trunk = Decoder(config)
    trunk.head = None
    trunk.cast(as_dtype(dtype)).to_empty(device=device)
    model = ScoredDecoder(trunk)
    _fill_scored(model, folder)
    return model.eval()


def is_scored(values: dict[str, Any]) -> bool:
    """Whether the contents of a config.json are of a sequence classifier."""
    return any(str(name).endswith("ForSequenceClassification") for name in values.get("architectures") or ())


def _num_labels(values: dict[str, Any]) -> int:
    labels = values.get("id2label")
    return len(labels) if labels else int(values.get("num_labels", 2))  # transformers' own default is 2


def _config_values(model: ScoredDecoder, tokenizer_pad: int | None) -> dict[str, Any]:
    config = model.config
    dtype = str(model.decoder.embed.weight.dtype).removeprefix("torch.")
    pad = tokenizer_pad if config.pad_id is None else config.pad_id
    return {
        **config.to_hf(),
        "architectures": [CLASSIFIERS[config.family]],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": None if config.eos_ids == (pad,) else pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _trunk_table(config: DecoderConfig) -> list[Entry]:
    return [entry for entry in weight_table(config) if entry.ours != "head.weight"]


def _scored_tensors(model: ScoredDecoder) -> Iterator[tuple[str, Tensor]]:
    """All weights under their Hugging Face names, in the embedding's type, one at a time."""
    state, dtype = PlainWeights(model.decoder), model.decoder.embed.weight.dtype
    for entry in _trunk_table(model.config):
        ours = state[entry.ours].detach()
        parts: Sequence[Tensor] = torch.split(ours, list(entry.rows)) if entry.rows else (ours,)
        for name, part in zip(entry.theirs, parts, strict=True):
            yield name, (part.T if entry.transposed else part).to(dtype)
    yield SCORE, model.score.weight.detach().to(dtype)


def _write_shards(model: ScoredDecoder, folder: Path, max_shard_size: int) -> None:
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in _scored_tensors(model)}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stream = _scored_tensors(model)
    for file, names in zip(files, shards, strict=True):
        tensors = {name: tensor.cpu().contiguous() for name, tensor in (next(stream) for _ in names)}
        save_file(tensors, folder / file, metadata={"format": "pt"})


def _fill_scored(model: ScoredDecoder, folder: Path) -> None:
    """Copy every tensor of the folder into its place; an output head that lies there is passed over."""
    state = model.decoder.state_dict()
    table = _trunk_table(model.config)
    places = {name: (entry, index) for entry in table for index, name in enumerate(entry.theirs)}
    seen: set[str] = set()
    unexpected: list[str] = []
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    canonical = SCORE if name == SCORE else canonical_name(name, model.config)
                    if canonical == SCORE:
                        theirs = tensors.get_tensor(name)
                        if theirs.shape != model.score.weight.shape:
                            shape = list(model.score.weight.shape)
                            raise ModelError(f"{file}: {name}: shape {list(theirs.shape)}, a reward model has {shape}")
                        model.score.weight.data.copy_(theirs)
                        seen.add(SCORE)
                    elif canonical in places:
                        copy_part(state, *places[canonical], tensors.get_tensor(name), f"{file}: {name}")
                        seen.add(canonical)
                    elif canonical not in (None, "lm_head.weight"):
                        unexpected.append(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not readable as safetensors: {error}") from error
    missing = [name for name in [*places, SCORE] if name not in seen]
    if missing or unexpected:
        raise ModelError(
            f"{folder}: the weights do not fit config.json (family {model.config.family}): "
            f"missing {some_of(missing)}; unexpected {some_of(unexpected)}"
        )
