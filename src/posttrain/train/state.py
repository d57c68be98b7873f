"""All that a trainer would have to remember to go on as if nothing had happened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.core import CheckpointError
from posttrain.train.optimiser import trainable


class TrainerState(NamedTuple):
    """Tensors are the trainer's own, not copies: write them or clone them before the next step."""

    weights: dict[str, Tensor]  # that learn, and persistent buffers, by name
    optimiser: dict[str, Tensor]  # "exp_avg/<name>" …
    meta: dict[str, Any]  # num_steps, num_tokens; identity: what a checkpoint must share with the run; plain JSON


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights that learn and persistent buffers, by name; tied weights once."""
    state = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
    return {name: weight.detach() for name, weight in {**trainable(model), **buffers}.items()}


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What makes two models the same but for the values of what learns: shapes by name, and a digest of frozen weights.

    The digest reads every frozen weight once; it is empty where all weights learn.
    """
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    digest = hashlib.sha256()
    for name in sorted(frozen):
        digest.update(name.encode())
        digest.update(frozen[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return {
        "weights": {name: list(tensor.shape) for name, tensor in weights_of(model).items()},
        "frozen": digest.hexdigest() if frozen else "",
    }


def check_identity(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse a state that belongs to another run.

    Raises:
        CheckpointError: names what differs (up to eight places), with both values.
    """
    theirs, ours = dict(_flat(saved, "")), dict(_flat(own, ""))
    absent = "(absent)"
    wrong = [
        f"{key}: checkpoint {theirs.get(key, absent)!r}, this run {ours.get(key, absent)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key, absent) != ours.get(key, absent)
    ]
    if wrong:
        more = f" … and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError("the checkpoint belongs to another run: " + "; ".join(wrong[:8]) + more)


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
