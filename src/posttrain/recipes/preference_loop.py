"""The loop that learning from pairs and from labelled answers share, and what it measures on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from posttrain.core import Config, Example, TokenSequence, doc
from posttrain.evaluate import mcnemar, wilson
from posttrain.recipes.reference_cache import REF_LOGPROBS
from posttrain.recipes.supervised import batch_at
from posttrain.recipes.workbench import Workbench
from posttrain.train import Trainer, load_latest, save_checkpoint
from posttrain.train.preference import MARGIN_WEIGHTS

Floats = npt.NDArray[np.float64]
Prepare = Callable[[Sequence[Example]], list[Example]]
"""From a step's examples to what the trainer gets: the place where what speaks of the whole step is worked out."""


class PreferenceLoop(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    batch_size: Annotated[int, doc("examples per step", ge=1)]
    steps: Annotated[int, doc("optimiser steps", ge=1)]
    evaluate_every: Annotated[int, doc("steps between measurements on held-out examples; 0: first and last", ge=0)] = 0
    checkpoint_every: Annotated[int, doc("steps between checkpoints", ge=1)] = 100
    seed: Annotated[int, doc("decides the order of examples")] = 0


class Measured(NamedTuple):
    """What a measurement on held-out examples gives."""

    metrics: dict[str, float]
    right: list[bool]  # of each example, for a paired comparison of before and after; may be empty


def preference_loop(
    bench: Workbench,
    trainer: Trainer,
    examples: Sequence[Example],
    config: PreferenceLoop,
    *,
    prepare: Prepare,
    measure: Callable[[], Measured] | None = None,
    memory: MutableMapping[str, float] | None = None,
    title: str,
) -> dict[str, Any]:
    """Step through the examples, each once an epoch; go on from the run's newest checkpoint.

    Args:
        bench: the run.
        trainer: with the objective, at the weights that training starts from.
        examples: with reference logprobs, if they are cached.
        config: how many steps of how many.
        prepare: called with every step's examples before the step.
        measure: on held-out examples; called before the first step, every so often, and after the last.
        memory: what `prepare` remembers from step to step; kept in checkpoints, and put back when a run goes on.
        title: of the progress bar.

    Returns:
        `before` and `after`, the measurements' metrics; `right_before` and `right_after`; `num_tokens`.
    """
    resumed = load_latest(bench.run.checkpoints, trainer, report=lambda line: bench.run.event("warning", text=line))
    summary: dict[str, Any] = dict(resumed.extra) if resumed else {}
    remembered = memory if memory is not None else {}
    remembered.update(summary.pop("memory", {}))
    bench.run.truncate_after(trainer.num_steps if resumed else -1)
    if measure and not resumed:
        summary["before"], summary["right_before"] = measure()
        bench.run.tracker.log(summary["before"], step=0)
    with bench.progress(title, config.steps, start=trainer.num_steps) as progress:
        for step in range(trainer.num_steps, config.steps):
            chosen = batch_at(len(examples), config.batch_size, step, config.seed)
            metrics = trainer.step(prepare([examples[index] for index in chosen]))
            if "rewards/margins" not in metrics and {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
                metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
            done = step + 1
            last = done == config.steps
            if measure and (last or (config.evaluate_every and done % config.evaluate_every == 0)):
                summary["after"], summary["right_after"] = measure()
                metrics |= summary["after"]
            bench.run.tracker.log(metrics, step=done)
            progress.advance({"loss": metrics["loss"], "margin": metrics.get("rewards/margins", 0.0)})
            if last or done % config.checkpoint_every == 0:
                save_checkpoint(bench.run.checkpoints, trainer, extra={**summary, "memory": dict(remembered)})
    return {**summary, "num_tokens": float(trainer.num_tokens)}


def measure_pairs(trainer: Trainer, pairs: Sequence[Example], *, beta: float, per_token: bool) -> Measured:
    """How the policy, as it is, tells the better answer of held-out pairs.

    Returns:
        Metrics `eval/rewards/{chosen,rejected,margins,accuracies}` of the implicit rewards (β times the log-ratio to
        the reference, or the logprob where there is none), and `eval/ranking_accuracy`: the share of pairs whose
        chosen answer the policy finds likelier (Chen et al., https://arxiv.org/abs/2405.19534), which it is that
        `right` says of each pair.
    """
    logprobs_ES, ratios_ES = _compared(trainer, pairs, per_token)
    rewards_ES = beta * ratios_ES
    margins_E = rewards_ES[:, 0] - rewards_ES[:, 1]
    right_E = logprobs_ES[:, 0] > logprobs_ES[:, 1]
    metrics = {
        "eval/rewards/chosen": float(rewards_ES[:, 0].mean()),
        "eval/rewards/rejected": float(rewards_ES[:, 1].mean()),
        "eval/rewards/margins": float(margins_E.mean()),
        "eval/rewards/accuracies": float((margins_E > 0).mean()),
        "eval/ranking_accuracy": float(right_E.mean()),
    }
    return Measured(metrics, right_E.tolist())


def measure_labels(trainer: Trainer, answers: Sequence[Example], *, beta: float) -> Measured:
    """How the policy's implicit rewards tell good from bad held-out answers.

    Returns:
        Metrics `eval/rewards/{chosen,rejected,margins}` and `eval/rewards/auc`: the chance that a good answer has a
        larger reward than a bad one, ties counted half (0.5 before training; left out where a side is empty).
    """
    rewards_E = beta * np.array(log_ratios_of(trainer, answers))
    good_E = np.array([example.scalars["label"] > 0.5 for example in answers])
    if not (good_E.any() and (~good_E).any()):
        return Measured({}, [])
    good, bad = rewards_E[good_E], rewards_E[~good_E]
    difference = good[:, None] - bad[None, :]
    metrics = {
        "eval/rewards/chosen": float(good.mean()),
        "eval/rewards/rejected": float(bad.mean()),
        "eval/rewards/margins": float(good.mean() - bad.mean()),
        "eval/rewards/auc": float(((difference > 0) + 0.5 * (difference == 0)).mean()),
    }
    return Measured(metrics, [])


def say_ranking(bench: Workbench, summary: dict[str, Any]) -> None:
    """What became of the held-out pairs, with intervals and a paired test."""
    before, after = summary.get("right_before"), summary.get("right_after")
    if not before or not after:
        return
    interval = wilson(sum(after), len(after))
    wins = sum(now and not then for then, now in zip(before, after, strict=True))
    losses = sum(then and not now for then, now in zip(before, after, strict=True))
    bench.say(
        f"held-out pairs ranked rightly {sum(before) / len(before):.1%} → {sum(after) / len(after):.1%} "
        f"(95 %: {interval.low:.1%} to {interval.high:.1%}; {wins} gained, {losses} lost, McNemar p = "
        f"{mcnemar(wins, losses):.2g}); reward accuracy {summary['after']['eval/rewards/accuracies']:.1%} "
        f"on {len(after)} pairs"
    )


def log_ratios_of(trainer: Trainer, answers: Sequence[Example]) -> list[float]:
    """The log-ratio to the reference of each answer, an example of one sequence, under the policy as it is."""
    _, ratios_ES = _compared(trainer, answers, False)
    return [float(value) for value in ratios_ES[:, 0]]


def _compared(trainer: Trainer, examples: Sequence[Example], per_token: bool) -> tuple[Floats, Floats]:
    """Logprobs, and log-ratios to the reference (where there is one), of each sequence of each example; ES."""
    references = [
        [sequence.columns.get(REF_LOGPROBS, (0.0,) * len(sequence.tokens)) for sequence in example.sequences]
        for example in examples
    ]
    logprobs_ES = _reduced(examples, trainer.logprobs(examples), per_token)
    return logprobs_ES, logprobs_ES - _reduced(examples, references, per_token)


def _reduced(examples: Sequence[Example], columns: Sequence[Sequence[Sequence[float]]], per_token: bool) -> Floats:
    """Weighted sums (or means) of a column over each sequence's targets, ES."""

    def of_sequence(sequence: TokenSequence, column_T: Sequence[float]) -> float:
        weights_T = np.asarray(sequence.columns.get(MARGIN_WEIGHTS, sequence.mask), dtype=np.float64)
        total = float(np.asarray(column_T) @ weights_T)
        return total / float(weights_T.sum()) if per_token else total

    return np.array(
        [
            [of_sequence(sequence, column_T) for sequence, column_T in zip(example.sequences, own, strict=True)]
            for example, own in zip(examples, columns, strict=True)
        ]
    )
