"""The loop of reward models: batches in an order that the step alone decides, checkpoints, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from posttrain.core import Config, DataError, Example, derive_seed, doc, generator
from posttrain.recipes.supervised import batch_at
from posttrain.recipes.workbench import Workbench
from posttrain.train import Trainer, load_latest, save_checkpoint

R = TypeVar("R")

SHOWN = ("loss", "accuracy", "margin")


class RewardLoop(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    batch_size: Annotated[int, doc("examples per step", ge=1)]
    steps: Annotated[int, doc("optimiser steps", ge=1)]
    evaluate_every: Annotated[int, doc("steps between measurements on held-out rows; 0: only at the end", ge=0)] = 0
    checkpoint_every: Annotated[int, doc("steps between checkpoints; 0: only at the end", ge=0)] = 100
    seed: Annotated[int, doc("decides the order of examples")] = 0


def reward_loop(
    bench: Workbench,
    trainer: Trainer,
    examples: Sequence[Example],
    config: RewardLoop,
    *,
    measure: Callable[[], dict[str, float]],
    title: str,
) -> dict[str, float]:
    """Train on the examples; go on from the run's newest checkpoint.

    Args:
        measure: numbers on held-out rows, logged under `eval/`.

    Returns:
        The first and the last measurement, as `<name>_before` and `<name>_after`.
    """
    resumed = load_latest(bench.run.checkpoints, trainer, report=lambda line: bench.run.event("warning", text=line))
    summary: dict[str, float] = dict(resumed.extra) if resumed else {}
    bench.run.truncate_after(trainer.num_steps if resumed else -1)
    if not resumed:
        found = measure()
        bench.run.tracker.log({f"eval/{name}": value for name, value in found.items()}, step=0)
        summary |= {f"{name}_before": value for name, value in found.items()}
    with bench.progress(title, config.steps, start=trainer.num_steps) as progress:
        for step in range(trainer.num_steps, config.steps):
            chosen = batch_at(len(examples), config.batch_size, step, config.seed)
            metrics = trainer.step([examples[index] for index in chosen])
            done = step + 1
            last = done == config.steps
            if last or (config.evaluate_every and done % config.evaluate_every == 0):
                found = measure()
                metrics |= {f"eval/{name}": value for name, value in found.items()}
                summary |= {f"{name}_after": value for name, value in found.items()}
            bench.run.tracker.log(metrics, step=done)
            progress.advance({name: metrics[name] for name in SHOWN if name in metrics})
            if last or (config.checkpoint_every and done % config.checkpoint_every == 0):
                save_checkpoint(bench.run.checkpoints, trainer, extra=summary)
    return summary


def split_by_prompt(
    items: Sequence[R], num: int, seed: int, *, example: Callable[[R], Example]
) -> tuple[list[R], list[R]]:
    """Items to train on and at least `num` held out; those of one prompt are on one side, whichever the seed says.

    Raises:
        DataError: nothing would be left to train on.
    """
    groups: dict[str, list[R]] = {}
    for item in items:
        own = example(item)
        groups.setdefault(own.group or own.id, []).append(item)
    order = sorted(groups)
    generator(derive_seed(seed, "held out")).shuffle(order)
    held: set[str] = set()
    count = 0
    for key in order:
        if count >= num:
            break
        held.add(key)
        count += len(groups[key])
    kept = [item for item in items if (example(item).group or example(item).id) not in held]
    if not kept:
        raise DataError(
            f"{num} rows to hold out of {len(items)} with {len(groups)} prompts: nothing is left to train on"
        )
    return kept, [item for item in items if (example(item).group or example(item).id) in held]


def target_scores(trainer: Trainer, examples: Sequence[Example]) -> list[list[tuple[float, ...]]]:
    """What the model's head says at the targets: for each example, for each of its sequences."""
    columns = trainer.logprobs(examples)
    return [
        [
            tuple(value for value, flag in zip(values, sequence.mask, strict=True) if flag)
            for values, sequence in zip(own, example.sequences, strict=True)
        ]
        for own, example in zip(columns, examples, strict=True)
    ]
