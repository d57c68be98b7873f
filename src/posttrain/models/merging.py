"""Merging: one tensor from the same tensor of several models. Pure functions; `merge_folders` walks whole models.

Everything is computed in fp32, whatever comes in. θ is a model's tensor, τ = θ − θ_base its task vector. All tensors
of a call have one shape, any rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from posttrain.core import Config, ConfigError, derive_seed, doc

Method = Literal["average", "ema", "slerp", "task", "ties", "dare", "dare_ties"]
NEEDS_BASE = ("task", "ties", "dare", "dare_ties")
_ALMOST_PARALLEL = 0.9995


class Merge(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models become one."""

    method: Annotated[Method, doc("average, ema, slerp, task, ties, dare or dare_ties")] = "average"
    weights: Annotated[tuple[float, ...], doc("of the models, in their order; none given: all 1")] = ()
    decay: Annotated[float, doc("ema: what is kept of the earlier models at every later one", ge=0, le=1)] = 0.5
    t: Annotated[float, doc("slerp: how far from the first model to the second", ge=0, le=1)] = 0.5
    scale: Annotated[float, doc("task, ties, dare: λ, what the merged task vector is multiplied by")] = 1.0
    density: Annotated[float, doc("ties, dare: the share of every task vector that is kept", gt=0, le=1)] = 0.2
    seed: Annotated[int, doc("dare: of what is dropped")] = 0

    def check(self, num_models: int, *, has_base: bool) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: too few or too many models, weights that do not fit, a base that is missing or in vain.
        """
        if num_models < (1 if self.method in NEEDS_BASE else 2) or (self.method == "slerp" and num_models != 2):
            raise ConfigError(f"merge: {self.method} of {num_models} models; slerp takes 2, the others more")
        if self.weights and len(self.weights) != num_models:
            raise ConfigError(f"merge: {len(self.weights)} weights for {num_models} models")
        if self.weights and self.method in ("ema", "slerp"):
            raise ConfigError(
                f"merge: {self.method} takes no weights, but {'t' if self.method == 'slerp' else 'decay'}"
            )
        if self.weights and self.method == "average" and math.fsum(self.weights) == 0:
            raise ConfigError("merge: the weights of an average must not sum to 0")
        if has_base != (self.method in NEEDS_BASE):
            verb = "takes no base model" if has_base else "needs the base model that all were tuned from"
            raise ConfigError(f"merge: {self.method} {verb}")


def merge_tensors(tensors: Sequence[Tensor], config: Merge, *, base: Tensor | None = None, name: str = "") -> Tensor:
    """One tensor from several, by the configured method, fp32.

    Args:
        tensors: of the models, in their order; of one shape.
        config: the method and its numbers.
        base: of the model that all were tuned from, for the methods that need it.
        name: of the tensor; what DARE drops depends on it.
    """
    weights = config.weights or (1.0,) * len(tensors)
    if config.method == "average":
        return average(tensors, weights)
    if config.method == "ema":
        return ema(tensors, config.decay)
    if config.method == "slerp":
        return slerp(tensors[0], tensors[1], config.t)
    if base is None:
        raise ConfigError(f"merge: {config.method} needs the base model")
    vectors = [tensor.float() - base.float() for tensor in tensors]
    if config.method in ("dare", "dare_ties"):
        vectors = [
            drop_and_rescale(vector, config.density, derive_seed(config.seed, "dare", index, name))
            for index, vector in enumerate(vectors)
        ]
    if config.method in ("ties", "dare_ties"):
        density = config.density if config.method == "ties" else 1.0
        merged = ties(vectors, weights, density)
    else:
        merged = weighted_sum(vectors, weights)
    return base.float() + config.scale * merged


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i θ_i / Σ w_i: model soups (https://arxiv.org/abs/2203.05482), of which Llama 3 makes one at every stage
    (https://arxiv.org/abs/2407.21783). Taken as θ_0 + Σ w_i (θ_i − θ_0) / Σ w_i, so that equal tensors give just that.
    """
    first, whole = tensors[0].float(), math.fsum(weights)
    merged = first.clone()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged += (tensor.float() - first) * (weight / whole)
    return merged


def ema(tensors: Sequence[Tensor], decay: float) -> Tensor:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ_i, from the first model to the last: checkpoints of one run, oldest first
    (Polyak & Juditsky 1992; https://arxiv.org/abs/2406.16768, section 3.1).
    """
    merged = tensors[0].float().clone()
    for tensor in tensors[1:]:
        merged += (tensor.float() - merged) * (1.0 - decay)
    return merged


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985): sin((1−t)Ω)/sin Ω · θ_0 + sin(tΩ)/sin Ω · θ_1, Ω the angle between
    the two as flat vectors. Where they are all but parallel (or one is 0), the straight line between them.
    """
    a, b = first.float(), second.float()
    norms = torch.linalg.vector_norm(a.double()) * torch.linalg.vector_norm(b.double())
    cosine = float((a.double() * b.double()).sum() / norms) if float(norms) > 0 else 1.0
    if abs(cosine) > _ALMOST_PARALLEL:
        return a + (b - a) * t
    angle = math.acos(cosine)
    return a * (math.sin((1.0 - t) * angle) / math.sin(angle)) + b * (math.sin(t * angle) / math.sin(angle))


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i τ_i: with it, θ_base + λ Σ w_i τ_i is task arithmetic (https://arxiv.org/abs/2212.04089). A negative weight
    takes a skill away.
    """
    merged = torch.zeros_like(vectors[0], dtype=torch.float32)
    for vector, weight in zip(vectors, weights, strict=True):
        merged += weight * vector
    return merged


def trim(vector: Tensor, density: float) -> Tensor:
    """A task vector's largest numbers, the rest 0: ⌈density · n⌉ of n are kept (TIES, section 4, step 1; there over all
    of a model's numbers, here within each tensor, so that no more than one need be in memory).
    """
    num_kept = math.ceil(density * vector.numel())
    if num_kept >= vector.numel():
        return vector
    kept = vector.abs().flatten().topk(num_kept).indices
    trimmed = torch.zeros_like(vector).flatten()
    trimmed[kept] = vector.flatten()[kept]
    return trimmed.view_as(vector)


def ties(vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES (https://arxiv.org/abs/2306.01708): trim every task vector, elect for every number the sign with the greater
    total, and average those that agree with it and are not 0.
    """
    trimmed = [trim(vector.float(), density) for vector in vectors]
    elected = weighted_sum(trimmed, weights).sign()
    total, share = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for vector, weight in zip(trimmed, weights, strict=True):
        agrees = (vector.sign() == elected) & (vector != 0)
        total += torch.where(agrees, weight * vector, 0.0)
        share += torch.where(agrees, weight, 0.0)
    return torch.where(share != 0, total / share.where(share != 0, torch.ones_like(share)), 0.0)


def drop_and_rescale(vector: Tensor, density: float, seed: int) -> Tensor:
    """DARE (https://arxiv.org/abs/2311.03099): keep every number with probability `density`, divided by it; so the mean
    over draws is the vector itself.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(vector.shape, generator=generator) < density
    return torch.where(kept.to(vector.device), vector.float() / density, 0.0)
