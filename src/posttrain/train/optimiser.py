"""AdamW over the weights that learn, and its state by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from posttrain.core import CheckpointError
from posttrain.train.config import TrainConfig

STATE = ("step", "exp_avg", "exp_avg_sq")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by name; tied weights once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def make_adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one fused kernel for all weights.

    Weight decay touches matrices only: not norms and biases (rank 1), nor embedding tables (tied output heads are the
    same weights), whose rows would shrink with every step on which their token does not occur.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = list(trainable(model).values())
    decayed = [weight for weight in weights if weight.ndim >= 2 and id(weight) not in embeddings]
    plain = [weight for weight in weights if weight.ndim < 2 or id(weight) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def optimiser_state(optimiser: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as `step/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`; nothing for weights not yet stepped."""
    return {
        f"{kind}/{name}": optimiser.state[weight][kind]
        for name, weight in weights.items()
        if weight in optimiser.state
        for kind in STATE
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimiser_state`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than its weight; nothing is changed.
    """
    names = {key.partition("/")[2] for key in state}
    keys = {f"{kind}/{name}" for kind in STATE for name in names}
    wrong = sorted((names - weights.keys()) | (keys ^ state.keys()))
    wrong += [key for key in keys & state.keys() if not _fits(key, state[key], weights)]
    if wrong:
        raise CheckpointError(f"the optimiser's state does not fit the model: {', '.join(wrong[:5])}")
    optimiser.state.clear()
    for name in names:
        weight = weights[name]
        optimiser.state[weight] = {kind: state[f"{kind}/{name}"].to(device=weight.device, copy=True) for kind in STATE}


def _fits(key: str, tensor: Tensor, weights: Mapping[str, nn.Parameter]) -> bool:
    kind, _, name = key.partition("/")
    return kind == "step" or name not in weights or tensor.shape == weights[name].shape
