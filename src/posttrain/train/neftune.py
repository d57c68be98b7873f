"""NEFTune: noise on the embeddings while training (Jain et al., https://arxiv.org/abs/2310.05914, algorithm 1).

N tokens of a packed row, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core import ConfigError
from posttrain.train.batch import Batch
from posttrain.train.forward import Forward, Pass


def noisy_embeddings(forward: Forward, alpha: float) -> Forward:
    """A forward pass that adds noise to the embeddings while the model is in training mode, and only then.

    Every number of a token's embedding gets an independent draw from ±alpha / sqrt(L D), uniform, where L is the
    length of the token's own sequence, prompt included: packing changes nothing. The draws come from PyTorch's
    generator, which the trainer seeds for every micro-batch.

    Args:
        forward: what to run with noise: `token_forward`.
        alpha: of the paper, 5 to 15.

    Raises:
        ConfigError: alpha is not above 0.
    """
    if not alpha > 0:
        raise ConfigError(f"neftune: alpha must be above 0, not {alpha}")

    def noisy(model: Any, batch: Batch, row: Pass) -> Any:
        decoder = getattr(model, "decoder", model)
        if not decoder.training:
            return forward(model, batch, row)
        row = row.apart()  # sequences with a prefix in common draw each its own noise on it
        lengths = torch.tensor(row.lengths, dtype=torch.float32, device=row.tokens_N.device)
        reach_N = alpha / (lengths * decoder.config.width).sqrt().repeat_interleave(lengths.long())

        def add_noise(module: nn.Module, inputs: Any, embedded_1ND: Tensor) -> Tensor:
            noise_1ND = torch.empty_like(embedded_1ND, dtype=torch.float32).uniform_(-1.0, 1.0)
            noisy_1ND: Tensor = embedded_1ND + noise_1ND * reach_N[None, :, None]
            return noisy_1ND

        hook = decoder.embed.register_forward_hook(add_noise)
        try:
            return forward(model, batch, row)
        finally:
            hook.remove()

    return noisy
