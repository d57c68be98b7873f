"""Hugging Face folders: config.json and safetensors, read and written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.core import ModelError
from posttrain.models.adapters import PlainWeights
from posttrain.models.config import DecoderConfig
from posttrain.models.decoder import Decoder
from posttrain.models.hub import resolve
from posttrain.models.weights import Entry, canonical_name, weight_table

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class SavesFiles(Protocol):
    """A tokenizer, as far as a model folder is concerned. `posttrain.render.Tokenizer` is one."""

    def save(self, folder: Path) -> Any:
        """Write the tokenizer's files into a folder."""
        ...


def load(path: Path | str, *, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu") -> Decoder:
    """A decoder from a Hugging Face folder or name.

    Args:
        path: a folder with config.json and model.safetensors (or its shards and their index), or a name on the Hub.
        dtype: of the matrices: a torch dtype, its name, or "auto" for that of the folder. Norms are kept in fp32.
        device: where the weights go.

    Returns:
        The decoder, in training mode off. `config.eos_ids` also has those of generation_config.json.

    Raises:
        ModelError: the folder lacks a file; the architecture is not supported; a weight is missing, unexpected or of
            another shape than config.json says.
    """
    folder = resolve(path)
    values = read_json(folder / "config.json")
    if values.get("quantization_config"):
        raise ModelError(f"{folder}: quantised weights are not supported; use the unquantised model")
    config = DecoderConfig.from_hf(values, where=str(folder / "config.json"))
    config = config.replace(eos_ids=all_eos_ids(config, folder))
    if dtype == "auto":
        dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    with torch.device("meta"):
        model = Decoder(config)
    model.cast(as_dtype(dtype)).to_empty(device=device)
    _fill(model, folder)
    return model.eval()


def save(
    model: Decoder,
    path: Path | str,
    *,
    tokenizer: SavesFiles | None = None,
    tokenizer_files: Path | str | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Write a Hugging Face folder that `transformers` loads, all or nothing.

    Everything is written to a folder beside it, synced to disk, and then takes the place of `path`; a model folder
    that was there is replaced as a whole. All weights are written in the type of the embedding.

    Args:
        model: the decoder.
        path: the folder.
        tokenizer: writes its files into the folder.
        tokenizer_files: a folder whose tokenizer, chat template and generation_config.json are copied.
        max_shard_size: bytes per safetensors file; a model of one file has no index.

    Raises:
        ModelError: `path` is something else than a model folder, or the family cannot express the configuration.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / "config.json").exists() or not any(path.iterdir()))):
        raise ModelError(f"{path}: exists and is no model folder; choose another path or remove it")
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    values = {**model.config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
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
        _write_weights(model, partial, max_shard_size)
        take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype, from itself or its name.

    Raises:
        ModelError: no such floating type.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    found: torch.dtype = _DTYPES[dtype]
    return found


def to_hf_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The weights under their Hugging Face names, in the embedding's type, one at a time; views where they can be.

    Adapters are merged into them.
    """
    state, dtype = PlainWeights(model), model.embed.weight.dtype
    for entry in weight_table(model.config):
        ours = state[entry.ours].detach()
        parts = torch.split(ours, list(entry.rows)) if entry.rows else (ours,)
        for name, part in zip(entry.theirs, parts, strict=True):
            yield name, (part.T if entry.transposed else part).to(dtype)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        ModelError: it is absent or no JSON.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a model folder has config.json and {WEIGHTS}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    return values


def all_eos_ids(config: DecoderConfig, folder: Path) -> list[int]:
    """Chat models list their end-of-turn token only in generation_config.json."""
    ids = list(config.eos_ids)
    path = folder / "generation_config.json"
    if path.exists():
        more = read_json(path).get("eos_token_id")
        ids += [] if more is None else more if isinstance(more, list) else [more]
    return list(dict.fromkeys(ids))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        ModelError: there is none, or one that the index names is absent.
    """
    if (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        lost = [name for name in names if not (folder / name).exists()]
        if lost:
            raise ModelError(f"{folder}: {INDEX} names files that are not there: {', '.join(lost)}")
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    pickled = (
        " (weights in pickle files are never read: convert them to safetensors)" if any(folder.glob("*.bin")) else ""
    )
    raise ModelError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there{pickled}")


def _fill(model: Decoder, folder: Path) -> None:
    """Copy every tensor of the folder into its place; one file is open at a time."""
    state = model.state_dict()
    places = {name: (entry, index) for entry in weight_table(model.config) for index, name in enumerate(entry.theirs)}
    seen: set[str] = set()
    unexpected: list[str] = []
    tied_head: Tensor | None = None
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    canonical = canonical_name(name, model.config)
                    if canonical in places:
                        copy_part(state, *places[canonical], tensors.get_tensor(name), f"{file}: {name}")
                        seen.add(canonical)
                    elif canonical == "lm_head.weight":
                        tied_head = tensors.get_tensor(name)
                    elif canonical is not None:
                        unexpected.append(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not readable as safetensors: {error}") from error
    if tied_head is not None:
        _check_tied_head(tied_head, state["embed.weight"], folder)
    missing = [name for name in places if name not in seen]
    if missing or unexpected:
        raise ModelError(
            f"{folder}: the weights do not fit config.json (family {model.config.family}): "
            f"missing {some_of(missing)}; unexpected {some_of(unexpected)}"
            + ("; an output head that is the embedding needs tie_word_embeddings: true" * ("lm_head.weight" in missing))
        )


def copy_part(state: dict[str, Tensor], entry: Entry, index: int, theirs: Tensor, where: str) -> None:
    """Put a tensor of the folder in its place in ours, or in its share of the rows."""
    ours = state[entry.ours]
    target = torch.split(ours, list(entry.rows))[index] if entry.rows else ours
    if entry.transposed:
        target = target.T
    if target.shape != theirs.shape:
        raise ModelError(f"{where}: shape {list(theirs.shape)}, but config.json asks for {list(target.shape)}")
    target.copy_(theirs)


def _check_tied_head(head: Tensor, embed: Tensor, folder: Path) -> None:
    """A head saved although it is tied must be the embedding, or something would be lost."""
    if head.shape != embed.shape or not torch.equal(head.to(embed), embed):
        raise ModelError(
            f"{folder}: lm_head.weight differs from the embedding though config.json ties them; "
            "set tie_word_embeddings: false to keep both"
        )


def some_of(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:5])
    return (shown + f" and {len(names) - 5} more" if len(names) > 5 else shown) or "none"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one folder to another."""
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder to copy the tokenizer from")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _write_weights(model: Decoder, folder: Path, max_shard_size: int) -> None:
    shards: list[list[str]] = [[]]
    room = max_shard_size
    total = 0
    for name, tensor in to_hf_tensors(model):
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
        total += size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stream = to_hf_tensors(model)
    for file, names in zip(files, shards, strict=True):
        tensors = {name: tensor.cpu().contiguous() for name, tensor in (next(stream) for _ in names)}
        save_file(tensors, folder / file, metadata={"format": "pt"})


def take_place(partial: Path, path: Path) -> None:
    """Sync every file and the folder, then rename; a folder that was there is moved aside first and then removed."""
    for item in [*partial.rglob("*"), partial]:
        _sync(item)
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
