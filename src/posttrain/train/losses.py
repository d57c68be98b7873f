"""From a batch to a pure function of `objectives`: thin adapters that pick columns and denominators.

P target positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from posttrain import objectives
from posttrain.core import ConfigError, TrainError
from posttrain.models import TokenStats
from posttrain.objectives import KlEstimator, Metric
from posttrain.train.batch import Batch

Objective = Callable[[Any, Batch], tuple[Tensor, dict[str, Metric]]]
"""From a forward pass (`TokenStats`, or what the trainer's own `Forward` gives) and a micro-batch to (loss, metrics).

The loss is this micro-batch's share of the step's: a sum over its tokens (sequences, pairs), divided by a count from
`batch.denominators`, which speaks of the whole step. The trainer adds the shares. Metrics are `objectives.Metric`s,
made by `objectives.mean`, `total`, `minimum` or `maximum`; the trainer combines them over the micro-batches exactly.
"""

Normalise = Literal["token", "sequence", "constant", "group"]


def nll_objective(stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
    """Supervised fine-tuning: mean negative log-likelihood over the target tokens of the step.

    An example's scalar `weight`, if given, multiplies its tokens' losses (the denominator stays the token count).
    """
    weights_E = batch.scalars.get("weight")
    loss, metrics = objectives.nll(
        stats.logprobs_N,
        denominator=batch.denominators.tokens,
        weights_N=None if weights_E is None else weights_E[batch.example_P],
    )
    return loss, metrics | _entropy(stats)


def policy_objective(
    *,
    ratio: Literal["token", "sequence"] = "token",
    normalise: Normalise = "token",
    max_length: int | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
) -> Objective:
    """A policy gradient with the clipped surrogate.

    Columns read: `advantages`; `old_logprobs` (absent: this is the first update after sampling, the ratio is 1);
    `sampler_logprobs` (for `importance_cap` and the sampling metrics; optional without); `ref_logprobs` (for the KL;
    optional when `kl_coef` is 0).

    Args:
        ratio: per token (PPO, GRPO) or per sequence (GSPO).
        normalise: what the loss is a mean over: "token" (all target tokens count the same), "sequence" (all sequences),
            "group" (all prompts), "constant" (sum over tokens / (sequences × max_length)).
        max_length: the constant of "constant": the maximal number of completion tokens.
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator: see `objectives.policy_surrogate`.
        importance_cap: correct for the sampler's mismatch with truncated importance weights of at most this.

    Raises:
        ConfigError: "constant" without max_length.
        TrainError: (when called) a column that the settings need is missing.
    """
    if normalise == "constant" and not max_length:
        raise ConfigError("policy_objective: normalise 'constant' needs max_length, the maximal completion tokens")

    def objective(stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        logprobs_P = stats.logprobs_N
        old_P = batch.columns.get("old_logprobs", logprobs_P.detach())
        metrics = _entropy(stats)
        importance_P = None
        if importance_cap is not None:
            importance_P = objectives.importance_weights(old_P, column(batch, "sampler_logprobs"), cap=importance_cap)
        if "sampler_logprobs" in batch.columns:
            metrics |= objectives.sampling_metrics(old_P, batch.columns["sampler_logprobs"], importance_P)
        weights_P, denominator = normalisation(batch, normalise, max_length)
        loss, surrogate_metrics = objectives.policy_surrogate(
            logprobs_P,
            old_P,
            column(batch, "advantages"),
            denominator=denominator,
            weights_N=weights_P,
            sequence_N=batch.sequence_P if ratio == "sequence" else None,
            num_sequences=batch.num_sequences,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            importance_weights_N=importance_P,
            ref_logprobs_N=column(batch, "ref_logprobs") if kl_coef else batch.columns.get("ref_logprobs"),
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
        )
        return loss, metrics | surrogate_metrics

    return objective


def normalisation(batch: Batch, normalise: Normalise, max_length: int | None = None) -> tuple[Tensor | None, float]:
    """Weights of the tokens and the denominator that make a sum the mean over tokens, sequences, groups or a constant.

    Returns:
        weights_P (None: all 1) and the denominator, for any objective of `objectives` that takes them.
    """
    counts = batch.denominators
    if normalise == "token":
        return None, counts.tokens
    if normalise == "sequence":
        like = batch.group_tokens_E
        return objectives.sequence_weights(batch.sequence_P, batch.num_sequences, like), counts.sequences
    if normalise == "group":
        return (1.0 / batch.group_tokens_E.clamp(min=1))[batch.example_P], counts.groups
    if normalise == "constant":
        if not max_length:
            raise ConfigError("normalise 'constant' needs max_length")
        return None, float(counts.sequences * max_length)
    raise ConfigError(f"unknown normalisation {normalise!r}: choose token, sequence, group or constant")


def column(batch: Batch, name: str) -> Tensor:
    """A column of the batch, or an error that says which examples lack it."""
    if name not in batch.columns:
        have = ", ".join(sorted(batch.columns)) or "none"
        raise TrainError(f"the objective needs the column {name!r}; example {batch.ids[0]!r} has: {have}")
    return batch.columns[name]


def _entropy(stats: TokenStats) -> dict[str, Metric]:
    return {} if stats.entropy_N is None else {"entropy": objectives.mean(stats.entropy_N)}
