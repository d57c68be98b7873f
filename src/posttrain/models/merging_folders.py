"""Merging Hugging Face folders of any architecture, tensor by tensor: memory is that of one tensor of every model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from posttrain.core import ModelError
from posttrain.models.adapter_folder import is_adapter_folder
from posttrain.models.config import DecoderConfig
from posttrain.models.folder import INDEX, WEIGHTS, copy_tokenizer, read_json, take_place, weight_files
from posttrain.models.hf_config import FAMILIES
from posttrain.models.merging import Merge, merge_tensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# fields of a decoder that say nothing of what its weights mean
_FREE_FIELDS = {"eos_ids", "bos_id", "pad_id", "init_std", "max_positions"}


class TensorShape(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str  # "F32" …
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size on disk."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * _DTYPES[self.dtype].itemsize


class FolderReader:
    """A model folder's tensors, one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Open a folder; its files are closed with `stack`.

        Raises:
            ModelError: it holds no model, adapters alone, or files that cannot be read.
        """
        if is_adapter_folder(folder):
            raise ModelError(f"{folder}: holds adapters; give the folder with the adapters merged into their base")
        self.folder = folder
        self.config = read_json(folder / "config.json")
        if self.config.get("quantization_config"):
            raise ModelError(f"{folder}: quantised weights cannot be merged; use the unquantised model")
        self.shapes: dict[str, TensorShape] = {}
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    self.shapes[name] = TensorShape(part.get_dtype(), tuple(part.get_shape()))
                    self._files[name] = file
                    if part.get_dtype() not in _DTYPES:
                        raise ModelError(f"{path}: {name} is of type {part.get_dtype()}, which cannot be merged")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not readable as safetensors: {error}") from error
        if self.config.get("tie_word_embeddings"):
            self.shapes.pop("lm_head.weight", None)  # the embedding, saved twice

    def tensor(self, name: str) -> Tensor:
        """Read one."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def merge_folders(
    folders: Sequence[Path],
    path: Path,
    config: Merge,
    *,
    base: Path | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Merge models of one architecture and vocabulary into a new folder that `transformers` loads, all or nothing.

    config.json, tokenizer and chat template are those of the first model, and so are the weights' types. Tensors that
    are no floating-point numbers must be equal in all models.

    Args:
        folders: of the models.
        path: of the new model; a model folder that was there is replaced.
        config: method and numbers.
        base: the model that all were tuned from, for the methods that need it.
        max_shard_size: bytes per safetensors file.

    Raises:
        ConfigError: the method does not take so many models, or needs a base.
        ModelError: the models differ in architecture, shapes or vocabulary; says where.
    """
    config.check(len(folders), has_base=base is not None)
    if path.exists() and not (path.is_dir() and ((path / "config.json").exists() or not any(path.iterdir()))):
        raise ModelError(f"{path}: exists and is no model folder; choose another path or remove it")
    if any(path.exists() and path.samefile(parent) for parent in [*folders, *([base] if base else [])]):
        raise ModelError(f"{path}: is one of the models to merge; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with ExitStack() as stack:
            readers = [FolderReader(folder, stack) for folder in folders]
            base_reader = None if base is None else FolderReader(base, stack)
            for other in [*readers[1:], *([base_reader] if base_reader else [])]:
                _check_alike(readers[0], other)
            _write(readers, base_reader, config, partial, max_shard_size)
        shutil.copyfile(folders[0] / "config.json", partial / "config.json")
        copy_tokenizer(folders[0], partial)
        take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _check_alike(first: FolderReader, other: FolderReader) -> None:
    """Refuse models whose numbers do not mean the same."""
    pair = f"{first.folder} and {other.folder} cannot be merged"
    kinds = [reader.config.get("model_type") for reader in (first, other)]
    if kinds[0] != kinds[1]:
        raise ModelError(f"{pair}: model_type {kinds[0]!r} and {kinds[1]!r}")
    if kinds[0] in FAMILIES:
        mine, theirs = (DecoderConfig.from_hf(reader.config).to_dict() for reader in (first, other))
        different = [key for key in mine if key not in _FREE_FIELDS and mine[key] != theirs[key]]
        if different:
            said = "; ".join(f"{key} {mine[key]!r} and {theirs[key]!r}" for key in different)
            raise ModelError(f"{pair}: {said}")
    alone = sorted(first.shapes.keys() ^ other.shapes.keys())
    if alone:
        raise ModelError(f"{pair}: only one of them has {', '.join(alone[:3])} ({len(alone)} such tensors)")
    for name, shape in first.shapes.items():
        if shape.shape != other.shapes[name].shape:
            raise ModelError(f"{pair}: {name} has shape {list(shape.shape)} and {list(other.shapes[name].shape)}")
    vocabularies = [_vocabulary(reader.folder) for reader in (first, other)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        pairs = [set((vocabulary or {}).items()) for vocabulary in vocabularies]
        token, number = min(pairs[0] ^ pairs[1], key=lambda item: (item[1], item[0]))
        raise ModelError(f"{pair}: their vocabularies differ, first in token {number} ({token!r})")


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token → id, added tokens too; None where the folder has no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    values = read_json(path)
    vocabulary = (values.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # a unigram model: [token, score] in the order of ids
        vocabulary = {item[0]: number for number, item in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in values.get("added_tokens") or []}}


def _write(
    readers: Sequence[FolderReader], base: FolderReader | None, config: Merge, folder: Path, max_shard_size: int
) -> None:
    shapes = readers[0].shapes
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + shape.num_bytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += shape.num_bytes
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        total = sum(shape.num_bytes for shape in shapes.values())
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        _write_shard(readers, base, config, folder / file, names)


def _write_shard(
    readers: Sequence[FolderReader], base: FolderReader | None, config: Merge, path: Path, names: Sequence[str]
) -> None:
    """Write a safetensors file as its tensors come: the header's length, the header, then the numbers."""
    shapes = readers[0].shapes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        end = at + shapes[name].num_bytes
        header[name] = {"dtype": shapes[name].dtype, "shape": list(shapes[name].shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # numbers begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            merged = _merged(readers, base, config, name)
            file.write(merged.contiguous().flatten().view(torch.uint8).numpy().data)


@torch.no_grad()
def _merged(readers: Sequence[FolderReader], base: FolderReader | None, config: Merge, name: str) -> Tensor:
    tensors = [reader.tensor(name) for reader in readers]
    if not tensors[0].is_floating_point():
        if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ModelError(f"{name}: is {tensors[0].dtype} and differs between the models")
        return tensors[0]
    origin = None if base is None else base.tensor(name)
    return merge_tensors(tensors, config, base=origin, name=name).to(tensors[0].dtype)
