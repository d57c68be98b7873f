"""What the recipes of preference optimisation do alike before and after their loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from posttrain import data as rows
from posttrain.core import Example, UsageError
from posttrain.data import LabelRow, PreferenceRow
from posttrain.recipes.adapters import Lora, save_tuned, tuned_part
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.preference_loop import PreferenceLoop
from posttrain.recipes.reference_cache import Reference, ReferenceMode, model_fingerprint
from posttrain.recipes.supervised import split_held_out, steps_of
from posttrain.recipes.workbench import Workbench
from posttrain.registry import Artifact
from posttrain.train import Forward, Objective, TrainConfig, Trainer, token_forward


class Ready(NamedTuple):
    """A policy with its trainer and examples, at the weights that training starts from."""

    policy: Policy
    trainer: Trainer
    reference: Reference
    examples: list[Example]  # without reference
    held_out: list[Example]
    loop: PreferenceLoop
    data_id: str  # of the data in the registry


def check_reference(options: Mapping[str, Any]) -> None:
    """Refuse a reference without adapters where there are none, before anything is loaded.

    Raises:
        UsageError: says what to give.
    """
    if options["reference"] == "adapters-off" and not options["lora_rank"]:
        raise UsageError("--reference adapters-off needs adapters: give --lora-rank, or take --reference cached")


def load_pairs(bench: Workbench, options: Mapping[str, Any]) -> list[PreferenceRow]:
    """The preference rows that the options name."""
    read = rows.load(options["data"], kind="preference", **_reading(bench, options))
    bench.say(read.report.summary())
    return without_evaluation(bench, list(read.rows), options["evaluation"], _source(bench, options))


def load_labels(bench: Workbench, options: Mapping[str, Any]) -> list[LabelRow]:
    """The labelled answers that the options name; pairs are taken apart."""
    read = rows.load(options["data"], kind="unpaired", **_reading(bench, options))
    bench.say(read.report.summary())
    return without_evaluation(bench, list(read.rows), options["evaluation"], _source(bench, options))


def get_ready(
    bench: Workbench,
    options: Mapping[str, Any],
    *,
    objective: Objective,
    lr: float,
    mode: ReferenceMode,
    make: Callable[[Policy, int], list[Example]],
    forward: Forward = token_forward,
) -> Ready:
    """Load the policy, make the examples, and set the trainer up.

    Args:
        bench: the run.
        options: of the recipe.
        objective: for the trainer.
        lr: peak learning rate.
        mode: where the reference is from.
        make: from the policy and the longest sequence, in tokens, to examples.
        forward: of the trainer.
    """
    policy = load_policy(options["model"], device=options["device"], template=options["template"])
    source = _source(bench, options)
    examples = make(policy, min(options["max_length"], policy.model.config.max_positions))
    kept, apart = split_held_out(examples, options["held_out"], options["seed"])
    steps = steps_of(len(kept), options["batch_size"], options["epochs"])
    fingerprint = model_fingerprint(policy.model) if mode == "cached" else None
    policy = tuned_part(policy, Lora.of(options), seed=options["seed"])
    config = TrainConfig(
        lr=lr,
        schedule="linear",
        warmup=options["warmup"],
        total_steps=steps,
        micro_tokens=options["micro_tokens"],
        dtype=options["dtype"],
        seed=options["seed"],
    )
    trainer = Trainer(policy.model, config, objective, forward=forward)
    folder = bench.run.path.parent / "reference"
    reference = Reference(mode, trainer, folder, fingerprint=fingerprint, report=bench.say)
    loop = PreferenceLoop(
        batch_size=options["batch_size"], steps=steps, evaluate_every=max(1, steps // 10), seed=options["seed"]
    )
    return Ready(policy, trainer, reference, kept, apart, loop, source.id)


def keep_tuned(bench: Workbench, options: Mapping[str, Any], policy: Policy, data_id: str) -> None:
    """Write the tuned model (adapters merged, and beside it on their own) and register it with its parents."""
    tuned = save_tuned(policy, bench.run.path / "model")
    bench.registry.add_run(bench.run)
    parent = bench.registry.add_artifact(policy.path, kind="model", name=options["model"], storage="reference")
    card = bench.registry.add_artifact(
        tuned,
        kind="model",
        name=options["name"],
        parents=[data_id, parent.id],
        run=bench.run.id,
        storage="reference",
    )
    bench.say(f"model {card.short()} in {tuned}")


def _source(bench: Workbench, options: Mapping[str, Any]) -> Artifact:
    data: Path = options["data"]
    return bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")


def _reading(bench: Workbench, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "columns": options["columns"],
        "limit": options["limit"],
        "quarantine": bench.run.path / "bad_rows.jsonl",
    }
