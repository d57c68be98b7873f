"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads what is written here onto the `transformers` model, and what PEFT writes is read here, to the same logits.
Keys of the configuration that change what is computed and are not supported are refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.core import ConfigError, ModelError
from posttrain.models.adapters import adaptable, place_adapters
from posttrain.models.decoder import Decoder
from posttrain.models.folder import read_json, take_place
from posttrain.models.lora import LoraConfig, LoraLinear, lora_layers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

# PEFT's options that change what is computed, with the values that mean "off"
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
    "use_qalora": (False, None),
    "megatron_config": (None,),
}


def is_adapter_folder(path: Path | str) -> bool:
    """Whether a folder holds adapters and no model."""
    path = Path(path)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists()


def base_of(path: Path | str) -> str:
    """The folder or name of the model that adapters belong to. A relative folder may be relative to the adapters' own.

    Raises:
        ModelError: the configuration does not name it.
    """
    path = Path(path)
    name = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{path / ADAPTER_CONFIG}: base_model_name_or_path is missing; name the base model yourself")
    beside = path / str(name)
    return str(beside) if not Path(name).exists() and beside.is_dir() else str(name)


def save_adapters(model: Decoder, path: Path | str, *, base: str | Path) -> Path:
    """Write a model's adapters as PEFT does, all or nothing.

    Args:
        model: a decoder with adapters.
        path: the folder; adapters that were there are replaced.
        base: folder or name of the model they belong to, for whoever loads them.

    Raises:
        ModelError: the model has no adapters, or `path` is something else than an adapter folder.
    """
    layers, path = lora_layers(model), Path(path)
    if not layers:
        raise ModelError(f"{path}: the model has no adapters to save")
    if path.exists() and not (path.is_dir() and ((path / ADAPTER_CONFIG).exists() or not any(path.iterdir()))):
        raise ModelError(f"{path}: exists and is no adapter folder; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        values = json.dumps(_peft_config(model, layers, str(base)), indent=2, sort_keys=True)
        (partial / ADAPTER_CONFIG).write_text(values + "\n", encoding="utf-8")
        save_file(to_peft_tensors(model), partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        take_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def load_adapters(model: Decoder, path: Path | str) -> Decoder:
    """Put the adapters of a folder on a model, in place; they learn, all else is frozen.

    Args:
        model: the base, without adapters.
        path: the folder.

    Returns:
        The same decoder.

    Raises:
        ModelError: something is missing, unknown, not supported, or of a shape that this model does not have; the
            message names it. The model is unchanged then.
    """
    path = Path(path)
    config = _read_config(path)
    file = path / ADAPTER_WEIGHTS
    if not file.exists():
        pickled = " (weights in pickle files are never read)" if any(path.glob("*.bin")) else ""
        raise ModelError(f"{file}: no such file{pickled}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not readable as safetensors: {error}") from error
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    _check(model, config, tensors, file)
    place_adapters(model, config, lambda part: part.name + _A in tensors)
    with torch.no_grad():
        for name, place in _places(lora_layers(model)).items():
            place.copy_(tensors[name])
    return model


def to_peft_tensors(model: Decoder) -> dict[str, Tensor]:
    """The adapters under PEFT's names, on the CPU."""
    places = _places(lora_layers(model))
    return {_PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in places.items()}


def _places(layers: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """Every tensor of the adapters, by PEFT's name without its prefix; views of ours."""
    places: dict[str, Tensor] = {}
    for layer in layers.values():
        for part, a_RD in zip(layer.parts, torch.split(layer.lora_A, layer.config.rank), strict=True):
            places[part.name + _A] = a_RD
            places[part.name + _B] = layer.lora_B[part.short]
            if layer.config.dora:
                places[part.name + _MAGNITUDE] = layer.magnitude[part.short]
    return places


def _peft_config(model: Decoder, layers: Mapping[str, LoraLinear], base: str) -> dict[str, Any]:
    config = next(iter(layers.values())).config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": _targets(model, layers),
        "fan_in_fan_out": model.config.family == "gpt2",  # its matrices lie transposed in their folder
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


def _targets(model: Decoder, layers: Mapping[str, LoraLinear]) -> list[str]:
    """The short names of what is adapted; whole names where only some modules of that short name are."""
    adapted = {part.name for layer in layers.values() for part in layer.parts}
    left_out = {part.short for parts in adaptable(model).values() for part in parts if part.name not in adapted}
    return sorted({short if (short := name.rpartition(".")[2]) not in left_out else name for name in adapted})


def _read_config(path: Path) -> LoraConfig:
    values = read_json(path / ADAPTER_CONFIG)
    where = path / ADAPTER_CONFIG
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type {values.get('peft_type')!r} is not supported; only LORA is")
    for key, off in _OFF_VALUES.items():
        if key in values and values[key] not in off:
            raise ModelError(f"{where}: {key}={values[key]!r} is not supported")
    targets = values.get("target_modules")
    try:
        return LoraConfig.from_dict(
            {
                "rank": values["r"],
                "alpha": values["lora_alpha"],
                # a pattern ("all-linear") says no names; which modules there are, the tensors say
                "targets": sorted(targets) if isinstance(targets, list) else [],
                "dropout": values.get("lora_dropout") or 0.0,
                "rslora": bool(values.get("use_rslora")),
                "dora": bool(values.get("use_dora")),
            },
            where=str(where),
        )
    except KeyError as error:
        raise ModelError(f"{where}: the key {error} is missing") from None
    except ConfigError as error:
        raise ModelError(str(error)) from error


def _check(model: Decoder, config: LoraConfig, tensors: dict[str, Tensor], file: Path) -> None:
    """Refuse what does not fit before anything is changed."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parts in adaptable(model).items():
        width = model.get_submodule(name).in_features
        for part in parts:
            if part.name + _A in tensors or part.name + _B in tensors:
                wanted[part.name + _A] = (config.rank, int(width))  # type: ignore[arg-type]
                wanted[part.name + _B] = (part.rows, config.rank)
                if config.dora:
                    wanted[part.name + _MAGNITUDE] = (part.rows,)
    unexpected, missing = sorted(tensors.keys() - wanted.keys()), sorted(wanted.keys() - tensors.keys())
    if unexpected or missing or not wanted:
        raise ModelError(
            f"{file}: the adapters do not fit this {model.config.family}: missing {', '.join(missing[:3]) or 'none'}; "
            f"unexpected {', '.join(unexpected[:3]) or 'none'}"
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"{file}: {name} has shape {list(tensors[name].shape)}, this model asks for {list(shape)}")
