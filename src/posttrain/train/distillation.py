"""Learning from a teacher: forward passes that read one beside the student, and the objective for what they give.

The teacher is a frozen decoder whose whole distribution is matched, or an endpoint's most likely tokens, which came
with the examples. N tokens of the row, P target positions among them, K tokens that a teacher told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain import objectives
from posttrain.core import ConfigError, TrainError
from posttrain.models import Decoder, TokenDivergence, chosen_logprobs, token_divergence
from posttrain.objectives import Metric, TopKRest
from posttrain.train.batch import Batch
from posttrain.train.forward import Forward, Pass, states_at
from posttrain.train.losses import Normalise, Objective, column, normalisation

NO_TOKEN = -1.0  # in a column of token ids: the teacher told fewer


class TopK(NamedTuple):
    """What `top_k_forward` gives: like `TokenDivergence`, without what needs the teacher's whole distribution."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    divergence_N: Tensor


def teacher_forward(
    teacher: Decoder, *, beta: float, temperature: float = 1.0, vocab_size: int | None = None
) -> Forward:
    """A forward pass that gives every target's divergence from a teacher, read in the same pass over the same tokens.

    Args:
        teacher: of the student's vocabulary; frozen and put into evaluation mode.
        beta: 0 forward KL, 1 reverse KL, between them generalised Jensen–Shannon (`objectives.generalised_jsd`).
        temperature: divides both models' logits for the divergence.
        vocab_size: compare the first so many entries of the two heads, where padding makes their sizes differ.

    Raises:
        ConfigError: beta or temperature is out of range.
    """
    if not 0 <= beta <= 1 or not temperature > 0:
        raise ConfigError(f"teacher_forward: beta {beta} must lie in [0, 1], temperature {temperature} above 0")
    teacher.requires_grad_(False).eval()

    def forward(model: Decoder, batch: Batch, row: Pass) -> TokenDivergence:
        before_P = batch.target_P - 1
        with torch.no_grad():
            teacher_PE = states_at(teacher, row, before_P)
        student_PD = states_at(model, row, before_P)
        return token_divergence(
            model,
            student_PD,
            teacher,
            teacher_PE,
            batch.targets_P,
            beta=beta,
            temperature=temperature,
            vocab_size=vocab_size,
            entropy=row.entropy,
        )

    return forward


def top_k_columns(top_T: Sequence[Mapping[int, float] | None], k: int) -> dict[str, tuple[float, ...]]:
    """A teacher's most likely tokens at each position as columns of a `TokenSequence`.

    Args:
        top_T: at each position token id → logprob of what may stand there (not: after it), or None where nothing is
            known (prompts). More than k are cut to the most likely.
        k: columns of each kind.

    Returns:
        `teacher_ids/<i>` (−1 where there is none) and `teacher_logprobs/<i>`, i from 0 to k − 1, T numbers each. Token
        ids below 2^24 are exact in float32.
    """
    ids = [[NO_TOKEN] * len(top_T) for _ in range(k)]
    logprobs = [[0.0] * len(top_T) for _ in range(k)]
    for position, told in enumerate(top_T):
        best = sorted((told or {}).items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        for place, (token, logprob) in enumerate(best):
            ids[place][position], logprobs[place][position] = float(token), float(logprob)
    columns = {f"teacher_ids/{place}": tuple(values) for place, values in enumerate(ids)}
    return columns | {f"teacher_logprobs/{place}": tuple(values) for place, values in enumerate(logprobs)}


def top_k_forward(k: int, *, beta: float = 0.0, rest: TopKRest = "tail") -> Forward:
    """A forward pass that gives every target's divergence from the K tokens in the columns of `top_k_columns`.

    At temperature 1: what an endpoint tells are logprobs of its own distribution.

    Args:
        k: how many.
        beta: as for `objectives.generalised_jsd`.
        rest: what becomes of the other tokens, see `objectives.top_k_divergence`.

    Raises:
        ConfigError: k below 1, or beta out of range.
        TrainError: (when called) a column is missing, or the teacher told nothing of a target.
    """
    if k < 1 or not 0 <= beta <= 1:
        raise ConfigError(f"top_k_forward: k {k} must be at least 1, beta {beta} in [0, 1]")

    def forward(model: Decoder, batch: Batch, row: Pass) -> TopK:
        ids_PK = torch.stack([column(batch, f"teacher_ids/{place}") for place in range(k)], 1).long()
        told_PK = torch.stack([column(batch, f"teacher_logprobs/{place}") for place in range(k)], 1)
        known_PK = ids_PK >= 0
        if not bool(known_PK.any(1).all()):
            place = int((~known_PK.any(1)).nonzero()[0, 0])
            owner = batch.ids[int(batch.example_P[place])]
            raise TrainError(f"example {owner!r}: the teacher told no token's probability at a target position")
        before_PD = states_at(model, row, batch.target_P - 1)
        asked_PK = torch.cat((ids_PK.clamp(min=0), batch.targets_P[:, None]), 1)
        logprobs_PK = chosen_logprobs(model, before_PD, asked_PK)
        divergence_P = objectives.top_k_divergence(logprobs_PK[:, :k], told_PK, beta=beta, rest=rest, known_NK=known_PK)
        return TopK(logprobs_PK[:, k], None, divergence_P)

    return forward


def distillation_objective(*, nll_weight: float = 0.0, normalise: Normalise = "token") -> Objective:
    """Follow the teacher, and with `nll_weight` also predict the tokens that are there. See `objectives.distillation`.

    Goes with `teacher_forward` and `top_k_forward`. An example's scalar `weight`, if given, multiplies its losses.

    Args:
        nll_weight: 0 follows the teacher alone, 1 the data alone.
        normalise: what the loss is a mean over, see `train.normalisation`.

    Raises:
        ConfigError: nll_weight is out of range.
    """
    if not 0 <= nll_weight <= 1:
        raise ConfigError(f"distillation_objective: nll_weight must lie between 0 and 1, not {nll_weight}")

    def objective(stats: TokenDivergence | TopK, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        weights_P, denominator = normalisation(batch, normalise)
        if "weight" in batch.scalars:
            own_P = batch.scalars["weight"][batch.example_P]
            weights_P = own_P if weights_P is None else weights_P * own_P
        loss, metrics = objectives.distillation(
            stats.divergence_N, stats.logprobs_N, denominator=denominator, nll_weight=nll_weight, weights_N=weights_P
        )
        if stats.entropy_N is not None:
            metrics["entropy"] = objectives.mean(stats.entropy_N)
        if isinstance(stats, TokenDivergence):
            metrics["teacher_nll"] = objectives.mean(-stats.teacher_logprobs_N)
        return loss, metrics

    return objective
