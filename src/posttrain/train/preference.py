"""From a batch of preferences to a pure function of `objectives`.

A pair is an example of two sequences, the chosen one first; an answer with a label is an example of one sequence and
the scalar `label`. What speaks of the whole step (how many chosen tokens, the KL baseline, the reward shift) is a
scalar of every example, put there before the step by `with_step_scalars`: so accumulation and packing change nothing.

E examples, S sequences, P target positions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain import objectives
from posttrain.core import ConfigError, Example, TrainError
from posttrain.models import TokenStats
from posttrain.objectives import Metric, Pairs
from posttrain.train.batch import Batch
from posttrain.train.losses import Objective, column
from posttrain.train.preference_forward import CollisionStats

PairLoss = Callable[[Pairs], Tensor]
"""From the pairs of a micro-batch to one number for each; any sum of functions of `objectives.preference_losses`."""

AnswerLoss = Callable[..., tuple[Tensor, dict[str, Metric]]]
"""`(log_ratio_E, label_E, *, denominator, weights_E, **step) → (loss, metrics)`: `objectives.kto` and its kin."""

NllNormalise = Literal["answer", "token", "sum"]
PairWeights = Literal["wpo", "wpo_plain"]

MARGIN_WEIGHTS = "margin_weights"
NLL_TOKENS = "step_nll_tokens"


def preference_objective(
    pair_loss: PairLoss,
    *,
    beta: float,
    reference: bool = True,
    per_token_rewards: bool = False,
    nll_coef: float = 0.0,
    nll_normalise: NllNormalise = "answer",
    pair_weights: PairWeights | None = None,
    whole_step: bool = False,
) -> Objective:
    """Learn from pairs.

    Columns read: `ref_logprobs`, unless `reference` is False; `margin_weights` (optional), the weight of each target in
    its answer's logprob: 0 leaves a token out of the preference term (Llama 3's headers and terminators, the prompt of
    ORPO's full-text NLL), numbers below 1 soften it (LD-DPO's tail). The NLL term takes all targets of the chosen
    sequence. Scalars read: `weight` (optional) multiplies a pair's loss; `step_nll_tokens` for `nll_normalise="token"`.

    Args:
        pair_loss: one number for each pair; may be a weighted sum of several losses.
        beta: scale of the implicit rewards in the metrics.
        reference: whether there are reference logprobs.
        per_token_rewards: rewards and logps in the metrics are means over tokens (SimPO, ORPO).
        nll_coef: weight of the NLL of the chosen answer.
        nll_normalise: "answer": mean over its tokens, then over pairs (RPO); "token": mean over the step's chosen
            tokens (TRL); "sum": log-likelihood of the whole answer (CPO's paper).
        pair_weights: "wpo": WPO with sampled alignment, which needs `collision_forward` as the trainer's forward pass;
            "wpo_plain": WPO's equation 2 without it.
        whole_step: the loss ties the pairs of a step together (AOT), so they must be in one micro-batch.

    Raises:
        ConfigError: pair weights with a loss that ties pairs together.
        TrainError: (when called) an example is no pair; a side of it has no target; a logprob is not finite; a column
            or scalar is missing; the step does not lie in one micro-batch though it must. Names the example.
    """
    if whole_step and pair_weights is not None:
        raise ConfigError("a loss that sorts the pairs of a step cannot weight each pair: leave pair_weights out")

    def objective(stats: TokenStats | CollisionStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        pairs = pairs_of(stats.logprobs_N, batch, reference=reference)
        if whole_step and batch.num_examples != batch.denominators.examples:
            raise TrainError(
                f"the loss sorts all {batch.denominators.examples} pairs of a step, but a micro-batch has only "
                f"{batch.num_examples} of them: raise micro_tokens, or make the step smaller"
            )
        weights_E = _pair_weights(stats, batch, pair_weights)
        if whole_step and weights_E is not None:
            raise TrainError("a loss that sorts the pairs of a step cannot use the scalar 'weight'")
        shown = pairs.per_token() if per_token_rewards else pairs
        loss, metrics = objectives.preference_loss(
            shown, pair_loss(pairs), denominator=batch.denominators.examples, beta=beta, weights_E=weights_E
        )
        if nll_coef:
            nll_E, nll_metric = _nll(stats.logprobs_N, batch, nll_normalise)
            loss = loss + nll_coef * nll_E.sum() / batch.denominators.examples
            metrics["nll_loss"] = nll_metric
        if stats.entropy_N is not None:
            metrics["entropy"] = objectives.mean(stats.entropy_N)
        return loss, metrics

    return objective


def label_objective(answer_loss: AnswerLoss, *, step: Mapping[str, str] | None = None, **settings: float) -> Objective:
    """Learn from answers that are good or bad, each by itself.

    Columns read: `ref_logprobs`, `margin_weights` (optional). Scalars read: `label` (1 good, 0 bad), `weight`
    (optional), and those that `step` names.

    Args:
        answer_loss: `objectives.kto`, `objectives.bco`, `objectives.apo_zero_unpaired`.
        step: arguments of it that are constants of the whole step, and the scalars that hold them:
            `{"kl": "kl"}` for KTO, `{"reward_shift": "reward_shift"}` for BCO.
        settings: its other arguments, such as beta.

    Raises:
        TrainError: (when called) as `preference_objective`.
    """

    def objective(stats: TokenStats, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        if batch.num_sequences != batch.num_examples:
            raise TrainError(f"a labelled answer is an example of one sequence; {_first_with_other(batch, 1)}")
        log_ratio_E = answer_ratios(stats.logprobs_N, batch)
        loss, metrics = answer_loss(
            log_ratio_E,
            scalar(batch, "label"),
            denominator=batch.denominators.examples,
            weights_E=batch.scalars.get("weight"),
            **{name: scalar(batch, source)[0] for name, source in (step or {}).items()},
            **settings,
        )
        if stats.entropy_N is not None:
            metrics["entropy"] = objectives.mean(stats.entropy_N)
        return loss, metrics

    return objective


def pairs_of(logprobs_P: Tensor, batch: Batch, *, reference: bool = True) -> Pairs:
    """The sequence logprobs of a batch of pairs, checked.

    Raises:
        TrainError: an example is no pair, a side has no (weighted) target, or a logprob is not finite.
    """
    alternating_S = torch.arange(batch.num_sequences, device=batch.index_S.device) % 2
    if batch.num_sequences != 2 * batch.num_examples or not torch.equal(batch.index_S, alternating_S):
        raise TrainError(
            f"a pair is an example of two sequences, chosen before rejected; {_first_with_other(batch, 2)}"
        )
    sums_S, tokens_S = _sums(logprobs_P, batch)
    ref_S = _sums(column(batch, "ref_logprobs"), batch)[0] if reference else torch.zeros_like(sums_S)
    return Pairs(sums_S[::2], sums_S[1::2], ref_S[::2], ref_S[1::2], tokens_S[::2], tokens_S[1::2])


def answer_ratios(logprobs_P: Tensor, batch: Batch) -> Tensor:
    """log π/π_ref of each sequence, S, checked as by `pairs_of`."""
    return _sums(logprobs_P, batch)[0] - _sums(column(batch, "ref_logprobs"), batch)[0]


def with_step_scalars(examples: Sequence[Example], **scalars: float) -> list[Example]:
    """The examples of one step with constants of the whole step as scalars of each.

    `step_nll_tokens`, the targets of all chosen sequences, is always among them; others (`kl`, `reward_shift`) are
    given.
    """
    nll_tokens = float(sum(sum(example.sequences[0].mask) for example in examples))
    added = {NLL_TOKENS: nll_tokens, **scalars}
    return [example.replace(scalars={**example.scalars, **added}) for example in examples]


def scalar(batch: Batch, name: str) -> Tensor:
    """A scalar of the batch, or an error that says which example lacks it."""
    if name not in batch.scalars:
        have = ", ".join(sorted(batch.scalars)) or "none"
        raise TrainError(f"the objective needs the scalar {name!r}; example {batch.ids[0]!r} has: {have}")
    return batch.scalars[name]


def _sums(values_P: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Σ weights · values of each sequence, and Σ weights."""
    weights_P = batch.columns.get(MARGIN_WEIGHTS, torch.ones_like(values_P))
    sums_S = objectives.sequence_sum(values_P * weights_P, batch.sequence_P, batch.num_sequences)
    tokens_S = objectives.sequence_sum(weights_P, batch.sequence_P, batch.num_sequences)
    if not bool((tokens_S > 0).all()):
        which = int((tokens_S <= 0).nonzero()[0])
        raise TrainError(
            f"{_name(batch, which)} has no token to compare by: its answer is empty or wholly masked. Leave such "
            "examples out before training"
        )
    if not bool(sums_S.detach().isfinite().all()):
        which = int((~sums_S.detach().isfinite()).nonzero()[0])
        raise TrainError(f"{_name(batch, which)} has the logprob {sums_S[which].item()}: look at its tokens")
    return sums_S, tokens_S


def _nll(logprobs_P: Tensor, batch: Batch, normalise: NllNormalise) -> tuple[Tensor, Metric]:
    """NLL of each chosen sequence over all its targets, divided as asked; and its metric, mean over tokens."""
    chosen_P = batch.index_S[batch.sequence_P] == 0
    logprobs_S = objectives.sequence_sum(logprobs_P * chosen_P, batch.sequence_P, batch.num_sequences)
    divisor: Tensor | float = 1.0
    if normalise == "answer":
        divisor = objectives.sequence_lengths(batch.sequence_P, batch.num_sequences, logprobs_P)[::2]
    elif normalise == "token":
        divisor = scalar(batch, NLL_TOKENS) / batch.denominators.examples
    return objectives.nll_losses(logprobs_S[::2], divisor), objectives.mean(-logprobs_P, chosen_P)


def _pair_weights(stats: Any, batch: Batch, how: PairWeights | None) -> Tensor | None:
    weights_E = batch.scalars.get("weight")
    if how is None:
        return weights_E
    collision_N = None
    if how == "wpo":
        if not isinstance(stats, CollisionStats):
            raise TrainError("WPO's sampled alignment needs the trainer's forward pass to be `collision_forward`")
        collision_N = stats.log_collision_N
    answers_S = objectives.wpo_weights(
        stats.logprobs_N, batch.sequence_P, batch.num_sequences, log_collision_N=collision_N
    )
    wpo_E = answers_S[::2] * answers_S[1::2]
    return wpo_E if weights_E is None else wpo_E * weights_E


def _name(batch: Batch, sequence: int) -> str:
    side = ("chosen", "rejected")[int(batch.index_S[sequence])] if batch.num_sequences > batch.num_examples else ""
    return f"example {batch.ids[int(batch.example_S[sequence])]!r}" + (f" ({side})" if side else "")


def _first_with_other(batch: Batch, expected: int) -> str:
    counts = torch.bincount(batch.example_S, minlength=batch.num_examples).tolist()
    wrong = next(index for index, count in enumerate(counts) if count != expected)
    return f"example {batch.ids[wrong]!r} has {counts[wrong]} sequences"
