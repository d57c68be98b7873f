"""From a batch to a pure function of `objectives`: thin adapters that pick columns and denominators.

P target positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast

from torch import Tensor

from posttrain import objectives
from posttrain.core import ConfigError, TrainError
from posttrain.models import TokenStats
from posttrain.objectives import Bound, KlEstimator, Metric, RatioLevel, WeightLevel
from posttrain.train.batch import Batch

Objective = Callable[[Any, Batch], tuple[Tensor, dict[str, Metric]]]
"""From a forward pass (`TokenStats`, or what the trainer's own `Forward` gives) and a micro-batch to (loss, metrics).

The loss is this micro-batch's share of the step's: a sum over its tokens (sequences, pairs), divided by a count from
`batch.denominators`, which speaks of the whole step. The trainer adds the shares. Metrics are `objectives.Metric`s,
made by `objectives.mean`, `total`, `minimum` or `maximum`; the trainer combines them over the micro-batches exactly.
"""

Normalise = Literal["token", "sequence", "constant", "group", "sequence_sum"]
"""What a loss is a mean over. "token": all target tokens count the same. "sequence": all sequences. "group": all
prompts. "constant": sum over tokens / (sequences × maximal length). "sequence_sum": sum over tokens / sequences, so
that a long answer counts more (REINFORCE, LUSPO)."""


class Surrogate(Protocol):
    """What takes the place of the clipped surrogate: `objectives.cispo_surrogate`, `sapo_surrogate` …"""

    def __call__(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        advantages_N: Tensor,
        /,
        *,
        denominator: float,
        weights_N: Tensor | None,
        sequence_N: Tensor,
        num_sequences: int,
        level: RatioLevel,
        importance_weights_N: Tensor | None,
    ) -> tuple[Tensor, dict[str, Metric]]:
        """The loss and its metrics."""
        ...


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
    ratio: RatioLevel = "token",
    surrogate: Surrogate | None = None,
    normalise: Normalise = "token",
    max_length: int | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
    importance_low: float | None = None,
    importance_bound: Bound = "truncate",
    importance_level: WeightLevel = "token",
    stale_threshold: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_unbiased: bool = False,
    entropy_coef: float = 0.0,
) -> Objective:
    """A policy gradient: a surrogate, weighted for samples of another policy, with KL penalty and entropy bonus.

    Columns read: `advantages`; `old_logprobs` (absent: the first update after sampling, ratio 1); `sampler_logprobs`
    (for importance weights, masks and sampling metrics); `ref_logprobs` (for the KL); `policy_weights` (optional:
    multiplies each token's part of the surrogate, not its KL, and no denominator).

    Args:
        ratio: whose ratio; see `objectives.RatioLevel`.
        surrogate: None: the clipped one, with the clips given here; another has its own (`functools.partial`).
        normalise: what the loss is a mean over; see `Normalise`.
        max_length: the constant of "constant": the maximal number of completion tokens.
        clip_low, clip_high, dual_clip, kl_coef, kl_estimator: see `objectives.policy_surrogate`.
        importance_cap: correct for the sampler's mismatch with importance weights of at most this,
        importance_low: and of at least this.
        importance_bound, importance_level: see `objectives.bounded_importance_weights`.
        stale_threshold: see `objectives.stale_sequence_mask`.
        kl_unbiased: weigh the KL by the ratio, so that its gradient is that of the reverse KL.
        entropy_coef: weight of the mean entropy per target token; needs `TrainConfig.entropy`.

    Raises:
        ConfigError: "constant" without max_length.
        TrainError: (when called) a column that the settings need is missing, or the entropy was not measured.
    """
    if normalise == "constant" and not max_length:
        raise ConfigError("policy_objective: normalise 'constant' needs max_length, the maximal completion tokens")
    trust = _Trust(importance_low, importance_cap, importance_bound, importance_level, stale_threshold)
    own_kl = surrogate is None and not kl_unbiased
    clips: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    kl: dict[str, Any] = {"kl_coef": kl_coef, "kl_estimator": kl_estimator}

    def objective(stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        logprobs_P = stats.logprobs_N
        old_P = batch.columns.get("old_logprobs", logprobs_P.detach())
        reference_P = column(batch, "ref_logprobs") if kl_coef else batch.columns.get("ref_logprobs")
        trust_P, metrics = _trusted(trust, logprobs_P, old_P, batch)
        weights_P, denominator = normalisation(batch, normalise, max_length)
        clipped = partial(
            objectives.policy_surrogate, **clips, **({**kl, "ref_logprobs_N": reference_P} if own_kl else {})
        )
        loss, found = (surrogate or cast(Surrogate, clipped))(
            logprobs_P,
            old_P,
            column(batch, "advantages"),
            denominator=denominator,
            weights_N=weights_P,
            sequence_N=batch.sequence_P,
            num_sequences=batch.num_sequences,
            level=ratio,
            importance_weights_N=trust_P,
        )
        metrics = _entropy(stats) | metrics | found
        if reference_P is not None and not own_kl:
            ratio_P = _ratio(logprobs_P, old_P, batch, ratio) if kl_unbiased else None
            penalty_of = partial(objectives.kl_penalty, logprobs_P, reference_P, coef=kl_coef, estimator=kl_estimator)
            penalty, found = penalty_of(denominator=denominator, weights_N=weights_P, ratio_N=ratio_P)
            loss, metrics = loss + penalty, metrics | found
        return (loss + _bonus(stats, batch, entropy_coef) if entropy_coef else loss), metrics

    return objective


class _Trust(NamedTuple):
    """How far to trust samples of another policy."""

    low: float | None
    cap: float | None
    bound: Bound
    level: WeightLevel
    stale_threshold: float | None


def _trusted(trust: _Trust, logprobs_P: Tensor, old_P: Tensor, batch: Batch) -> tuple[Tensor | None, dict[str, Metric]]:
    """The weight of each token's part of the surrogate: importance weights times masks. None: all 1."""
    weights_P = None
    if trust.cap is not None or trust.low is not None:
        weights_P = objectives.bounded_importance_weights(
            old_P,
            column(batch, "sampler_logprobs"),
            low=trust.low,
            high=trust.cap,
            bound=trust.bound,
            level=trust.level,
            sequence_N=batch.sequence_P,
            num_sequences=batch.num_sequences,
        )
    metrics = {}
    if "sampler_logprobs" in batch.columns:
        metrics = objectives.sampling_metrics(old_P, batch.columns["sampler_logprobs"], weights_P)
    masks = [batch.columns["policy_weights"]] if "policy_weights" in batch.columns else []
    if trust.stale_threshold is not None:
        masks.append(
            objectives.stale_sequence_mask(
                column(batch, "advantages"),
                logprobs_P,
                batch.columns.get("sampler_logprobs", old_P),
                batch.sequence_P,
                batch.num_sequences,
                threshold=trust.stale_threshold,
            )
        )
    for mask_P in masks:
        weights_P = mask_P if weights_P is None else weights_P * mask_P
    if weights_P is not None and (masks or trust.bound == "mask"):
        metrics["sampling/kept"] = objectives.mean(weights_P != 0)
    return weights_P, metrics


def _ratio(logprobs_P: Tensor, old_P: Tensor, batch: Batch, level: RatioLevel) -> Tensor:
    return objectives.policy_ratio(logprobs_P, old_P, batch.sequence_P, batch.num_sequences, level)


def _bonus(stats: TokenStats, batch: Batch, coef: float) -> Tensor:
    if stats.entropy_N is None:
        raise TrainError("an entropy bonus needs the entropy at each target: set TrainConfig.entropy")
    return objectives.entropy_bonus(stats.entropy_N, coef=coef, denominator=batch.denominators.tokens)[0]


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
    if normalise == "sequence_sum":
        return None, counts.sequences
    if normalise == "constant":
        if not max_length:
            raise ConfigError("normalise 'constant' needs max_length")
        return None, float(counts.sequences * max_length)
    raise ConfigError(f"unknown normalisation {normalise!r}: choose token, sequence, sequence_sum, group or constant")


def column(batch: Batch, name: str) -> Tensor:
    """A column of the batch, or an error that says which examples lack it."""
    if name not in batch.columns:
        have = ", ".join(sorted(batch.columns)) or "none"
        raise TrainError(f"the objective needs the column {name!r}; example {batch.ids[0]!r} has: {have}")
    return batch.columns[name]


def _entropy(stats: TokenStats) -> dict[str, Metric]:
    return {} if stats.entropy_N is None else {"entropy": objectives.mean(stats.entropy_N)}
