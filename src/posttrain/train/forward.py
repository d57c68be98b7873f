"""The forward passes of the trainer: from a packed row of tokens to one number for every target position.

A forward pass is an argument of the trainer, as the objective is: the trainer knows neither. `token_forward` gives the
targets' logprobs (language models); `value_forward` and `score_forward` give a scalar head's numbers (critics, reward
models). Another one, which reads a teacher beside the student, is a function of the same shape.

N tokens of the row, P target positions among them, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from posttrain.models import (
    CausalAttend,
    Decoder,
    ScoredDecoder,
    SharedRow,
    TokenStats,
    packed_positions,
    packed_states,
    share,
    shares_prefixes,
    token_stats,
)
from posttrain.train.batch import Batch


class Pass(NamedTuple):
    """What one forward pass is about."""

    tokens_N: Tensor  # int64; the batch's tokens, perhaps with sequences of no consequence behind them
    lengths: Sequence[int]  # of the sequences in `tokens_N`
    temperature: float
    entropy: bool
    shared: SharedRow | None = None  # which tokens are computed once for several sequences; None: none

    def apart(self) -> Pass:
        """The same with every sequence computed by itself."""
        return self if self.shared is None else self._replace(shared=share(self.lengths))


class Forward(Protocol):
    """From a model and a packed row to the statistics that the objective takes: a tuple whose first is P numbers."""

    def __call__(self, model: Any, batch: Batch, row: Pass) -> Any:
        """Runs under the trainer's autocast."""
        ...


class Scores(NamedTuple):
    """What a scalar head says at each target, fp32."""

    values_N: Tensor


def hidden_states(model: Decoder | ScoredDecoder, row: Pass) -> Tensor:
    """The hidden states of the packed row, ND; no sequence sees another."""
    positions_1N = packed_positions(row.lengths, row.tokens_N.device)
    return model.hidden(row.tokens_N[None], positions_BT=positions_1N, attend=CausalAttend(row.lengths))[0]


def states_at(model: Decoder | ScoredDecoder, row: Pass, places_P: Tensor) -> Tensor:
    """The hidden states at some places of the packed row, PD, fp32. What sequences share is computed once.

    Args:
        model: the decoder, or one with a scalar head.
        row: the row.
        places_P: indices into `row.tokens_N`.
    """
    decoder = model.decoder if isinstance(model, ScoredDecoder) else model
    if row.shared is not None and shares_prefixes(decoder, row.tokens_N.device, _product_dtype(row.tokens_N.device)):
        return packed_states(decoder, row.tokens_N, row.shared, places_P)
    return hidden_states(model, row).index_select(0, places_P)


def _product_dtype(device: torch.device) -> torch.dtype:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def token_forward(model: Decoder, batch: Batch, row: Pass) -> TokenStats:
    """Logprob (and entropy) of every target, from the state before it."""
    before_PD = states_at(model, row, batch.target_P - 1)
    return token_stats(model, before_PD, batch.targets_P, temperature=row.temperature, entropy=row.entropy)


def value_forward(model: ScoredDecoder, batch: Batch, row: Pass) -> Scores:
    """The head's number in the state before every target: V(s_t), where token t is the action."""
    return _scores(model, states_at(model, row, batch.target_P - 1))


def score_forward(model: ScoredDecoder, batch: Batch, row: Pass) -> Scores:
    """The head's number at every target itself: a reward model marks the token at which it is to judge."""
    return _scores(model, states_at(model, row, batch.target_P))


def _scores(model: ScoredDecoder, hidden_PD: Tensor) -> Scores:
    with torch.autocast(hidden_PD.device.type, enabled=False):
        return Scores(model.scores(hidden_PD))
