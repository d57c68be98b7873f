"""Merging models into one: averages, interpolations and sums of task vectors; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from posttrain import models as model_room
from posttrain.core import recipe
from posttrain.recipes.workbench import RUNS, open_workbench


@recipe
def merge(
    *,
    models: tuple[str, ...],
    method: Literal["average", "ema", "slerp", "task", "ties", "dare", "dare_ties"] = "average",
    base: str | None = None,
    weights: tuple[float, ...] = (),
    decay: float = 0.5,
    t: float = 0.5,
    scale: float = 1.0,
    density: float = 0.2,
    seed: int = 0,
    name: str = "merged",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Merge models of one architecture and vocabulary into one.

    Memory is that of one tensor of every model. The new model takes tokenizer and chat template of the first.

    Args:
        models: folders of the models, or Hugging Face names, with commas between.
        method: average (model soups), ema (checkpoints, oldest first), slerp (two models), task (task arithmetic),
            ties, dare (random drops, then task arithmetic), dare_ties.
        base: the model that all were tuned from; for task, ties, dare and dare_ties.
        weights: of the models, with commas between; none given: all 1.
        decay: of ema, what is kept of the earlier models at every later one.
        t: of slerp, how far from the first model to the second, 0 to 1.
        scale: of task, ties and dare: what the merged task vector is multiplied by.
        density: of ties and dare: the share of every task vector that is kept.
        seed: of what dare drops.
        name: of the merged model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    config = model_room.Merge.from_dict({key: options[key] for key in model_room.Merge.__struct_fields__})
    with open_workbench("merge", options, runs=runs, resume=resume) as bench:
        folders = {given: model_room.resolve(given) for given in [*models, *([base] if base else [])]}
        merged = model_room.merge_folders(
            [folders[given] for given in models],
            bench.run.path / "model",
            config,
            base=folders[base] if base else None,
        )
        bench.registry.add_run(bench.run)
        parents = [
            bench.registry.add_artifact(folder, kind="model", name=given, storage="reference").id
            for given, folder in folders.items()
        ]
        card = bench.registry.add_artifact(
            merged,
            kind="model",
            name=name,
            parents=parents,
            run=bench.run.id,
            meta={"merge": config.to_dict()},
            storage="reference",
        )
        bench.say(f"{method} of {len(models)} models: {card.short()} in {merged}")
        return bench.run.path
