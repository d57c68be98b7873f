"""A scalar head on any decoder: reward models, process reward models and critics.

Shapes: B batch, T tokens, D width, S sequences, N tokens of all sequences in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core import derive_seed
from posttrain.models.attend import CausalAttend, packed_positions
from posttrain.models.config import DecoderConfig
from posttrain.models.decoder import Decoder


class ScoredDecoder(nn.Module):
    """A decoder whose states are read by one linear unit instead of the output head.

    The same module is a reward model (its number at a sequence's last token), a process reward model (at the last token
    of each step) and PPO's value model (at every token), so that a trained reward model is the value model's start.
    The output head of the decoder, where it is a weight of its own, is frozen: nothing reads it. The head itself is
    kept and multiplied in float32.
    """

    def __init__(self, decoder: Decoder, *, seed: int = 0, zero: bool = False) -> None:
        """Put a fresh head on a decoder, which is used as it is and trained in place.

        Args:
            decoder: the trunk.
            seed: of the head's weights, normal with standard deviation 1 / sqrt(D + 1) (Stiennon et al.,
                https://arxiv.org/abs/2009.01325, and Huang et al., https://arxiv.org/abs/2403.17031, section 4).
            zero: a head that says 0 everywhere: for a critic that starts without an opinion.
        """
        super().__init__()
        self.decoder = decoder
        width = decoder.config.width
        self.score = nn.Linear(width, 1, bias=False, device=decoder.embed.weight.device, dtype=torch.float32)
        generator = torch.Generator().manual_seed(derive_seed(seed, "score"))
        start = torch.zeros(1, width) if zero else torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
        self.score.weight.data.copy_(start)
        if decoder.head is not None:
            decoder.head.requires_grad_(False)

    @property
    def config(self) -> DecoderConfig:
        """The trunk's."""
        return self.decoder.config

    def hidden(self, tokens_BT: Tensor, **options: Any) -> Tensor:
        """`Decoder.hidden`."""
        return self.decoder.hidden(tokens_BT, **options)

    def scores(self, hidden_ND: Tensor) -> Tensor:
        """One number for each hidden state, fp32 (fp64 where the weights are); any leading shape."""
        dtype = torch.promote_types(self.score.weight.dtype, torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            scores_N: Tensor = nn.functional.linear(hidden_ND.to(dtype), self.score.weight.to(dtype))[..., 0]
        return scores_N

    def forward(self, tokens_BT: Tensor, **options: Any) -> Tensor:
        """A number at every token, BT."""
        return self.scores(self.hidden(tokens_BT, **options))

    def score_packed(self, tokens_N: Tensor, lengths: Sequence[int]) -> Tensor:
        """A number at every token of sequences that lie end to end, N; no sequence sees another.

        Args:
            tokens_N: token ids of all sequences.
            lengths: S of them, tokens of each sequence; they sum to N.
        """
        positions_1N = packed_positions(lengths, tokens_N.device)
        return self.scores(self.hidden(tokens_N[None], positions_BT=positions_1N, attend=CausalAttend(lengths)))[0]
