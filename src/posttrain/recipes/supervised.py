"""The supervised loop: the same for text to continue (pre-training) and for answers to imitate (fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

from posttrain.core import Config, DataError, Example, TokenSequence, derive_seed, doc, generator
from posttrain.models import Decoder
from posttrain.recipes.workbench import Workbench
from posttrain.train import (
    SupervisedNormalise,
    TrainConfig,
    Trainer,
    load_latest,
    noisy_embeddings,
    save_checkpoint,
    supervised_objective,
    token_forward,
)


class Supervised(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the supervised loop."""

    train: Annotated[TrainConfig, doc("how to step")]
    batch_size: Annotated[int, doc("examples per step", ge=1)]
    steps: Annotated[int, doc("optimiser steps", ge=1)]
    evaluate_every: Annotated[int, doc("steps between measurements of the held-out loss; 0: only first and last")] = 0
    checkpoint_every: Annotated[int, doc("steps between checkpoints; 0: only at the end", ge=0)] = 100
    seed: Annotated[int, doc("decides the order of examples")] = 0
    normalise: Annotated[SupervisedNormalise, doc("what the loss is a mean over, or its sum")] = "token"
    neftune_alpha: Annotated[float, doc("noise on the embeddings in training; 0: none", ge=0)] = 0.0


def steps_of(num_examples: int, batch_size: int, epochs: float) -> int:
    """Steps that see every example `epochs` times; the last batch of an epoch may be smaller."""
    return max(1, round(epochs * -(-num_examples // batch_size)))


def batch_at(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which examples a step trains on, as a function of the step alone: every example once per epoch."""
    per_epoch = -(-num_examples // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = _epoch_order(num_examples, seed, epoch)
    return list(order[place * batch_size : (place + 1) * batch_size])


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_examples))
    generator(seed, "order", epoch).shuffle(order)
    return tuple(order)


def supervised_loop(
    bench: Workbench,
    model: Decoder,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: Supervised,
    *,
    title: str,
    trainer: Trainer | None = None,
) -> dict[str, float]:
    """Minimise the negative log-likelihood of the examples' targets; go on from the run's newest checkpoint.

    Args:
        bench: the run.
        model: is trained in place.
        examples: each seen once an epoch.
        held_out: their loss is measured.
        config: how to step, and how often.
        title: of the progress bar.
        trainer: of the model, with a loss of its own (a teacher's); None: the likelihood, as `config` says.

    Returns:
        `nll_before` and `nll_after` on the held-out examples (if there are any), `num_tokens`.
    """
    if trainer is None:
        forward = noisy_embeddings(token_forward, config.neftune_alpha) if config.neftune_alpha else token_forward
        trainer = Trainer(model, config.train, supervised_objective(config.normalise), forward=forward)
    resumed = load_latest(bench.run.checkpoints, trainer, report=lambda line: bench.run.event("warning", text=line))
    summary: dict[str, float] = dict(resumed.extra) if resumed else {}
    bench.run.truncate_after(trainer.num_steps if resumed else -1)
    if held_out and not resumed:
        summary["nll_before"] = trainer.evaluate(held_out)["nll"]
        bench.run.tracker.log({"eval/nll": summary["nll_before"]}, step=0)
    with bench.progress(title, config.steps, start=trainer.num_steps) as progress:
        for step in range(trainer.num_steps, config.steps):
            chosen = batch_at(len(examples), config.batch_size, step, config.seed)
            metrics = trainer.step([examples[index] for index in chosen])
            done = step + 1
            last = done == config.steps
            if held_out and (last or (config.evaluate_every and done % config.evaluate_every == 0)):
                summary["nll_after"] = metrics["eval/nll"] = trainer.evaluate(held_out)["nll"]
            bench.run.tracker.log(metrics, step=done)
            progress.advance({"loss": metrics["loss"], "tokens/s": metrics["tokens_per_second"]})
            if last or (config.checkpoint_every and done % config.checkpoint_every == 0):
                save_checkpoint(bench.run.checkpoints, trainer, extra=summary)
    return {**summary, "num_tokens": float(trainer.num_tokens)}


def text_example(example_id: str, tokens: Sequence[int]) -> Example:
    """A document to continue: every token but the first is a target."""
    mask = (False,) + (True,) * (len(tokens) - 1)
    return Example(id=example_id, sequences=(TokenSequence(tokens=tuple(tokens), mask=mask),))


def split_held_out(examples: Sequence[Example], num: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; which ones are held out depends on the seed only.

    Raises:
        DataError: nothing would be left to train on.
    """
    if num >= len(examples):
        raise DataError(f"{num} examples to hold out of {len(examples)}: nothing is left to train on")
    order = list(range(len(examples)))
    generator(derive_seed(seed, "held out")).shuffle(order)
    held = set(order[:num])
    kept = [example for index, example in enumerate(examples) if index not in held]
    return kept, [examples[index] for index in sorted(held)]
