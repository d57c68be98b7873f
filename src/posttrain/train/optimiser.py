"""AdamW over the weights that learn, with its state by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from posttrain.core import CheckpointError
from posttrain.train.config import TrainConfig

STATE = ("step", "exp_avg", "exp_avg_sq")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by name; tied weights once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class Moments(NamedTuple):
    """AdamW's state of one weight."""

    step: Tensor  # rank 0, float32: how often the weight was updated
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamW:
    """AdamW with one fused kernel for all weights (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101).

    Weight decay touches matrices only: not norms and biases (rank 1), nor embedding tables (tied output heads are the
    same weights), whose rows would shrink with every step on which their token does not occur.

    Calls PyTorch's functional form: its class loads the compiler, seconds of CPU time that every run would pay for.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.weights = trainable(model)
        self.config = config
        self.moments: dict[str, Moments] = {}  # of the weights that have been updated
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self.decayed = {
            name for name, weight in self.weights.items() if weight.ndim >= 2 and id(weight) not in embeddings
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every weight that has a gradient."""
        moved = [name for name, weight in self.weights.items() if weight.grad is not None]
        for names, decay in [
            ([name for name in moved if name in self.decayed], self.config.weight_decay),
            ([name for name in moved if name not in self.decayed], 0.0),
        ]:
            if names:
                self._update(names, lr, decay)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for weight in self.weights.values():
            weight.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients there are."""
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """`step/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`; nothing for weights not yet updated."""
        return {
            f"{kind}/{name}": tensor
            for name, moments in self.moments.items()
            for kind, tensor in zip(STATE, moments, strict=True)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape than its weight; nothing is changed.
        """
        names = [name for name in self.weights if f"step/{name}" in state]
        keys = {f"{kind}/{name}" for kind in STATE for name in names}
        wrong = sorted(keys ^ state.keys())
        wrong += [key for key in sorted(keys & state.keys()) if not self._fits(key, state[key])]
        if wrong:
            raise CheckpointError(f"the optimiser's state does not fit the model: {', '.join(wrong[:5])}")
        self.moments = {
            name: Moments(*(state[f"{kind}/{name}"].to(self.weights[name].device, copy=True) for kind in STATE))
            for name in names
        }

    def _update(self, names: list[str], lr: float, decay: float) -> None:
        weights: list[Tensor] = [self.weights[name] for name in names]
        for name, weight in zip(names, weights, strict=True):
            if name not in self.moments:
                self.moments[name] = Moments(
                    torch.zeros((), device=weight.device), torch.zeros_like(weight), torch.zeros_like(weight)
                )
        moments = [self.moments[name] for name in names]
        adamw(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            [moment.exp_avg for moment in moments],
            [moment.exp_avg_sq for moment in moments],
            [],
            [moment.step for moment in moments],
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=lr,
            weight_decay=decay,
            eps=self.config.eps,
            maximize=False,
        )

    def _fits(self, key: str, tensor: Tensor) -> bool:
        kind, _, name = key.partition("/")
        return tensor.shape == (torch.Size([]) if kind == "step" else self.weights[name].shape)
