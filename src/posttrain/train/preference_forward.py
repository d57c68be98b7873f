"""A forward pass that also says how concentrated each distribution is, for WPO's weights.

N target positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.models import Decoder, token_stats
from posttrain.models.token_stats import project
from posttrain.train.batch import Batch
from posttrain.train.forward import Pass, states_at

_CHUNK = 1 << 21  # logits at a time


class CollisionStats(NamedTuple):
    """Statistics of each target's distribution, fp32."""

    logprobs_N: Tensor  # natural logarithm of the target's probability
    entropy_N: Tensor | None  # in nats
    log_collision_N: Tensor  # log Σ_v p_v²: of the chance that two draws agree; no gradient


def collision_forward(model: Decoder, batch: Batch, row: Pass) -> CollisionStats:
    """`token_forward`, and log Σ_v p_v² at every target, at the row's temperature.

    The logits are made twice, a chunk of tokens at a time; the second time without gradient.
    """
    before_PD = states_at(model, row, batch.target_P - 1)
    stats = token_stats(model, before_PD, batch.targets_P, temperature=row.temperature, entropy=row.entropy)
    return CollisionStats(stats.logprobs_N, stats.entropy_N, _log_collision(model, before_PD, row.temperature))


@torch.no_grad()
def _log_collision(model: Decoder, hidden_PD: Tensor, temperature: float) -> Tensor:
    weight_VD = model.head_weight()
    chunk = max(64, _CHUNK // weight_VD.shape[0])
    parts = []
    for part_ND in torch.split(hidden_PD.detach(), chunk):
        log_p_NV = (project(part_ND, weight_VD, exact=model.exact_logits) / temperature).log_softmax(-1)
        parts.append((2 * log_p_NV).logsumexp(-1))
    return torch.cat(parts) if parts else hidden_PD.new_zeros(0, dtype=torch.float32)
