"""LoRA: a frozen matrix W learns as W + s B A, with thin A and B (Hu et al., https://arxiv.org/abs/2106.09685).

The decoder fuses q, k, v into one matrix and gate, up into another; other tools adapt each on its own. So a fused
matrix has `Part`s, one for each tensor of the Hugging Face folder, with an A and a B of their own: what is learned here
is exactly what PEFT would learn there. The As of a matrix lie in one parameter, for they read the same input.

N tokens (any leading shape), D inputs, F outputs of a part, R rank, S the sum of the parts' ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.core import Config, derive_seed, doc
from posttrain.models.dora import gains, row_norms
from posttrain.models.quantised import FourBitLinear

_OFF: ContextVar[frozenset[int]] = ContextVar("adapters_off", default=frozenset())


class LoraConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of adapters.

    The defaults are those of "LoRA Without Regret" (Thinking Machines, 2025): every linear layer, the MLP's above all,
    alpha 32, and a learning rate about ten times that of full fine-tuning; ranks far below 32 suffice for reinforcement
    learning.
    """

    rank: Annotated[int, doc("R, columns of B and rows of A", ge=1)] = 32
    alpha: Annotated[float, doc("s = alpha / rank, or alpha / sqrt(rank) with rslora", gt=0)] = 32.0
    targets: Annotated[
        tuple[str, ...], doc("which projections by their name in the Hugging Face folder, as q_proj; none named: all")
    ] = ()
    dropout: Annotated[float, doc("of the adapters' input, while training", ge=0, lt=1)] = 0.0
    rslora: Annotated[bool, doc("divide alpha by sqrt(rank) (https://arxiv.org/abs/2312.03732)")] = False
    dora: Annotated[bool, doc("learn each output's norm apart (https://arxiv.org/abs/2402.09353)")] = False

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Part(NamedTuple):
    """A tensor of the Hugging Face folder within one of our matrices."""

    name: str  # of its module there: "model.layers.0.self_attn.q_proj"
    start: int  # its first row in our matrix
    rows: int

    @property
    def short(self) -> str:
        """The last word of the name: "q_proj"."""
        return self.name.rpartition(".")[2]


class LoraLinear(nn.Linear):
    """A linear layer whose matrix stays as it is and learns by adapters of some of its parts.

    Its `weight` and `bias` are those of the layer it takes the place of, under their names; a 4-bit layer is kept whole
    as `packed`.
    """

    def __init__(self, base: nn.Linear | FourBitLinear, parts: Sequence[Part], config: LoraConfig, seed: int) -> None:
        """Put fresh adapters on a layer: A uniform as `nn.Linear` starts, B zero, so that nothing changes yet.

        Args:
            base: the layer; its tensors are used as they are, and frozen.
            parts: those that are adapted, in the order of their rows.
            config: rank and all that.
            seed: of A; each part draws from a seed of its own name, so that it does not matter what else is adapted.
        """
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.config, self.parts = config, tuple(parts)
        self.training = base.training
        self.packed = base if isinstance(base, FourBitLinear) else None
        if self.packed is None:
            self.weight = base.weight
            self.register_parameter("bias", base.bias)
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        device, rank = base.weight.device, config.rank
        bound = base.in_features**-0.5  # Kaiming's uniform with a = sqrt(5), as in the paper's code
        starts = []
        for part in self.parts:
            generator = torch.Generator().manual_seed(derive_seed(seed, "lora", part.name))
            starts.append(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.lora_A = nn.Parameter(torch.cat(starts).to(device))
        self.lora_B = nn.ParameterDict(
            {part.short: nn.Parameter(torch.zeros(part.rows, rank, device=device)) for part in self.parts}
        )
        if config.dora:
            with torch.no_grad():
                norms = row_norms(self.base_weight())
            self.magnitude = nn.ParameterDict(
                {part.short: nn.Parameter(norms[self._rows(part)].clone()) for part in self.parts}
            )

    @property
    def active(self) -> bool:
        """Whether the adapters take part, here and now; see `adapters_off`."""
        return id(self) not in _OFF.get()

    def base_weight(self) -> Tensor:
        """W as it was, without adapters; a 4-bit one unpacked."""
        return self.weight if self.packed is None else self.packed.weight

    def forward(self, x_ND: Tensor) -> Tensor:
        """x Wᵀ + bias with the adapted W."""
        if not self.active:
            return self._product(x_ND, self._bias())
        if not self.config.dora:
            return self._product(x_ND, self._bias()) + self._learned(x_ND)
        out = ((self._product(x_ND, None) + self._learned(x_ND)).float() * self._gains()).to(x_ND.dtype)
        bias = self._bias()
        return out if bias is None else out + bias.to(out.dtype)

    def delta(self) -> Tensor:
        """s B A, of the shape of W, fp32; zero rows where a part is not adapted. Says nothing of DoRA's norms."""
        delta = self.lora_A.new_zeros(self.out_features, self.in_features, dtype=torch.float32)
        with torch.autocast(delta.device.type, enabled=False):
            for part, a_RD in zip(self.parts, torch.split(self.lora_A, self.config.rank), strict=True):
                delta[self._rows(part)] = (self.lora_B[part.short].float() @ a_RD.float()) * self.config.scale
        return delta

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix that does what this layer does, in the type of W; a new tensor."""
        weight = self.base_weight()
        adapted = weight.float() + self.delta()
        if self.config.dora:
            adapted *= self._gains()[:, None]
        return adapted.to(weight.dtype)

    def _bias(self) -> Tensor | None:
        return self.bias if self.packed is None else self.packed.bias

    def _product(self, x_ND: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_ND, self.weight, bias) if self.packed is None else self.packed.product(x_ND, bias)

    def _rows(self, part: Part) -> slice:
        return slice(part.start, part.start + part.rows)

    def _learned(self, x_ND: Tensor) -> Tensor:
        """s B A x of all parts, side by side; zeros for those that are not adapted."""
        if self.config.dropout:
            x_ND = F.dropout(x_ND, self.config.dropout, self.training)
        inner_NS = F.linear(x_ND, _as(self.lora_A, x_ND)) * self.config.scale
        outs, at = [], 0
        for part, inner_NR in zip(self.parts, torch.split(inner_NS, self.config.rank, -1), strict=True):
            if part.start > at:
                outs.append(inner_NR.new_zeros(*inner_NR.shape[:-1], part.start - at))
            outs.append(F.linear(inner_NR, _as(self.lora_B[part.short], inner_NR)))
            at = part.start + part.rows
        if at < self.out_features:
            outs.append(inner_NS.new_zeros(*inner_NS.shape[:-1], self.out_features - at))
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def _gains(self) -> Tensor:
        """DoRA's factor of every output, fp32: 1 where a part is not adapted."""
        with torch.no_grad():
            norms = row_norms(self.base_weight().float() + self.delta())
        return gains(norms, [(self._rows(part), self.magnitude[part.short]) for part in self.parts])


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it, and in this thread (or asyncio task) alone, the model is its base: the reference of KL and DPO.

    A sampler that shares the model and runs in a thread of its own goes on with the adapters. Backward passes belong
    inside, where layers are recomputed.
    """
    layers = {id(layer) for layer in lora_layers(model).values()}
    token = _OFF.set(_OFF.get() | layers)
    try:
        yield
    finally:
        _OFF.reset(token)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _as(weight: Tensor, x: Tensor) -> Tensor:
    """The adapter in the type of its input, unless autocast sees to that."""
    if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return weight
    return weight.to(x.dtype)
