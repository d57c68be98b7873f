"""Adapters on a whole decoder: put on, taken for weights, merged into the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from posttrain.core import ConfigError, ModelError
from posttrain.models.decoder import Decoder
from posttrain.models.lora import LoraConfig, LoraLinear, Part, adapters_off, lora_layers
from posttrain.models.quantised import FourBitLinear
from posttrain.models.weights import weight_table


def add_adapters(model: Decoder, config: LoraConfig, *, seed: int = 0) -> Decoder:
    """Put fresh adapters on a decoder, in place, and freeze all else. It still computes what it did.

    What is trained, sampled and saved afterwards has the adapters in it: `Trainer` learns what requires a gradient, an
    engine on the same module shares them, `models.save` merges them into what it writes.

    Args:
        model: the decoder; its matrices may be packed (`quantise`). A head around it (`ScoredDecoder`) still learns.
        config: shape and targets of the adapters.
        seed: of the random half of their start.

    Returns:
        The same decoder.

    Raises:
        ConfigError: a target that the family does not have; names those that it has.
        ModelError: it has adapters already.
    """
    known = adaptable(model)
    names = sorted({part.short for parts in known.values() for part in parts})
    unknown = sorted(set(config.targets) - set(names))
    if unknown:
        raise ConfigError(
            f"lora: no target {', '.join(unknown)} in a {model.config.family}; there are {', '.join(names)}"
        )
    return place_adapters(model, config, lambda part: not config.targets or part.short in config.targets, seed=seed)


def place_adapters(model: Decoder, config: LoraConfig, chosen: Callable[[Part], bool], *, seed: int = 0) -> Decoder:
    """`add_adapters` on the parts that a function chooses, whatever `config.targets` says."""
    if has_adapters(model):
        raise ModelError("the model has adapters already: merge them (merge_adapters) or go on with them")
    model.requires_grad_(False)
    for name, parts in adaptable(model).items():
        here = [part for part in parts if chosen(part)]
        if here:
            layer = LoraLinear(_linear(model, name), here, config, seed)
            _put(model, name, layer)
    return model


def adaptable(model: Decoder) -> dict[str, list[Part]]:
    """The linear layers inside the decoder, by our name, and the Hugging Face modules that each is made of."""
    found: dict[str, list[Part]] = {}
    for entry in weight_table(model.config):
        name, _, leaf = entry.ours.rpartition(".")
        if leaf != "weight" or not name.startswith("layers."):
            continue
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | FourBitLinear):
            continue
        rows = entry.rows or (module.out_features,)
        starts = [sum(rows[:place]) for place in range(len(rows))]
        found[name] = [
            Part(theirs.removesuffix(".weight"), start, size)
            for theirs, start, size in zip(entry.theirs, starts, rows, strict=True)
        ]
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer is adapted."""
    return bool(lora_layers(model))


def adapter_config(model: nn.Module) -> LoraConfig | None:
    """What the model's adapters were made with; None without any."""
    return next((layer.config for layer in lora_layers(model).values()), None)


@torch.no_grad()
def merge_adapters(model: Decoder) -> Decoder:
    """Make the adapters part of the base, in place and for good; packed matrices are unpacked.

    Returns:
        The same decoder, as `load` would give it: plain layers, all of whose weights learn.
    """
    for name in adaptable(model):
        module = _linear(model, name)
        if not isinstance(module, LoraLinear | FourBitLinear):
            continue
        weight = module.merged_weight() if isinstance(module, LoraLinear) else module.weight
        source = module.packed if isinstance(module, LoraLinear) and module.packed is not None else module
        plain = nn.Linear(module.in_features, module.out_features, bias=source.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight)
        if source.bias is not None:
            plain.bias = source.bias
        _put(model, name, plain.train(module.training))
    return model.requires_grad_(True)


@contextmanager
def merged_adapters(model: Decoder) -> Iterator[None]:
    """Within it the adapters are part of the base, so that a forward pass costs what the base's costs.

    Afterwards every weight is bit for bit what it was before. Nothing may learn within it, nor run in another thread.

    Raises:
        ModelError: the base is packed into 4 bits, and could not be put back.
    """
    layers = lora_layers(model)
    if any(layer.packed is not None for layer in layers.values()):
        raise ModelError(
            "a base in 4 bits cannot take its adapters in and give them back: use merge_adapters on a copy"
        )
    before = {name: layer.weight.data for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.data = layer.merged_weight()
    try:
        with adapters_off(model):
            yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = before[name]


class PlainWeights(Mapping[str, Tensor]):
    """A decoder's weights under the names that it has without adapters, each merged when it is asked for.

    Whatever reads weights from outside (export, transfer to another sampler) reads them here, so that adapters are
    never left out without a word.
    """

    def __init__(self, model: Decoder) -> None:
        self._state: dict[str, Tensor] = model.state_dict()
        self._layers: dict[str, LoraLinear | FourBitLinear] = {
            f"{name}.weight": layer
            for name in adaptable(model)
            if isinstance(layer := _linear(model, name), LoraLinear | FourBitLinear)
        }
        self._names = [entry.ours for entry in weight_table(model.config)]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._layers:
            layer = self._layers[name]
            return layer.merged_weight() if isinstance(layer, LoraLinear) else layer.weight
        if name not in self._state:  # the bias of a packed layer that has adapters
            module, _, leaf = name.rpartition(".")
            name = f"{module}.packed.{leaf}"
        return self._state[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _linear(model: Decoder, name: str) -> nn.Linear | FourBitLinear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | FourBitLinear)
    return module


def _put(model: Decoder, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
