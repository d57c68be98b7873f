"""Stages of the recipes that follow a paper: each a run of its own, done once, its model registered with parents."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain import models
from posttrain.core import Grader, Recipe, Task, UsageError
from posttrain.evaluate import Suite
from posttrain.recipes.grpo import Grpo, grpo_loop
from posttrain.recipes.policy import load_policy
from posttrain.recipes.ppo import Ppo, ppo_loop, value_model
from posttrain.recipes.preference_run import keep_tuned
from posttrain.recipes.workbench import Workbench, open_stage
from posttrain.registry import RunFolder


def options_of(recipe: Recipe[..., Any], **given: Any) -> dict[str, Any]:
    """All options of a recipe: those given, the rest as the recipe has them.

    Raises:
        UsageError: the recipe has no such option, or needs one that is not given.
    """
    known = {option.name: option for option in recipe.options}
    odd = [name for name in given if name not in known]
    values = {name: given.get(name, option.default) for name, option in known.items()}
    missing = [name for name, option in known.items() if option.required and name not in given]
    if odd or missing:
        raise UsageError(
            f"recipe {recipe.name!r}: no option {', '.join(odd) or '–'}; needs {', '.join(missing) or '–'}"
        )
    return values


def done_stage(bench: Workbench, name: str, options: Mapping[str, Any], work: Callable[[Workbench], object]) -> Path:
    """Do a stage's work in a run of its own, `<run>-<name>`, unless it has finished before.

    Args:
        bench: the recipe's run.
        name: of the stage.
        options: what the stage's outcome depends on; one that was interrupted goes on only with the same.
        work: takes the stage's workbench, and goes on from its newest checkpoint.

    Returns:
        The stage's folder.
    """
    path = bench.run.path.with_name(f"{bench.run.id}-{name}")
    if (path / "run.json").is_file():
        run = RunFolder.open(path, read_only=True)
        if run.state.status == "finished":
            bench.registry.add_run(run)
            bench.say(f"{name}: finished before")
            return path
    kept = {key: value for key, value in options.items() if key not in ("runs", "resume") and value is not None}
    with open_stage(bench, name, kept) as stage:
        work(stage)
    return path


def trained(
    bench: Workbench,
    name: str,
    recipe: Recipe[..., Any],
    run: Callable[[Workbench, Mapping[str, Any]], object],
    **given: Any,
) -> Path:
    """A stage that is another recipe's work; the model is registered as `<run>/<name>`.

    Args:
        bench: the longer recipe's run.
        name: of the stage.
        recipe: whose options they are.
        run: its work, such as `sft.run_sft`.
        given: options that differ from the recipe's own.

    Returns:
        The model's folder.
    """
    options = options_of(recipe, **given, name=f"{bench.run.id}/{name}")
    return done_stage(bench, name, options, lambda stage: run(stage, options)) / "model"


def reinforced(
    bench: Workbench,
    name: str,
    start: Path,
    tasks: Sequence[Task],
    grader: Grader,
    config: Grpo | Ppo,
    *,
    data: str,
    value: Path | None = None,
    dev: Suite | None = None,
    device: str = "cpu",
) -> Path:
    """A stage of reinforcement learning from a grader: group-relative, or with a value model.

    Args:
        bench: the longer recipe's run.
        name: of the stage.
        start: folder of the model to begin with.
        tasks: what is asked.
        grader: rewards the answers.
        config: of the loop; its kind says which.
        data: artifact that the tasks are from.
        value: PPO's value model begins as this reward model; None: as the policy with a fresh head.
        dev: measured as the run goes.
        device: where.

    Returns:
        The model's folder.
    """

    def work(stage: Workbench) -> None:
        policy = load_policy(str(start), device=device)
        if isinstance(config, Ppo):
            critic = value_model(str(value) if value else "policy", policy.model, seed=config.seed)
            asyncio.run(ppo_loop(stage, policy, critic, tasks, grader, config, held_out=dev))
        else:
            asyncio.run(grpo_loop(stage, policy, tasks, grader, config, held_out=dev))
        made = f"{bench.run.id}/{name}"
        keep_tuned(stage, {"model": str(start), "name": made}, policy, data)
        if value is not None:  # the policy learned from its judgement
            path, judge = stage.run.path / "model", model_id(bench, value)
            stage.registry.add_artifact(path, kind="model", name=made, parents=[judge], storage="reference")

    options = {**config.to_dict(), "start": start.parent.name, "data": data, "grader": grader.name}
    return done_stage(bench, name, options, work) / "model"


def average_of(bench: Workbench, name: str, folders: Sequence[Path]) -> Path:
    """A stage that averages models of one start (Wortsman et al., https://arxiv.org/abs/2203.05482); one stays alone.

    Returns:
        The model's folder.
    """
    if len(folders) == 1:
        return folders[0]

    def work(stage: Workbench) -> None:
        made = models.merge_folders(folders, stage.run.path / "model", models.Merge(method="average"))
        stage.registry.add_run(stage.run)
        stage.registry.add_artifact(
            made,
            kind="model",
            name=f"{bench.run.id}/{name}",
            parents=[model_id(bench, folder) for folder in folders],
            run=stage.run.id,
            meta={"merge": "average"},
            storage="reference",
        )

    return done_stage(bench, name, {"models": [folder.parent.name for folder in folders]}, work) / "model"


def model_id(bench: Workbench, folder: Path) -> str:
    """The artifact of a model: one that a stage has made, or the run's start, which is registered here."""
    stage = folder.parent.name.removeprefix(f"{bench.run.id}-")
    if stage != folder.parent.name:
        return bench.registry.artifact(f"{bench.run.id}/{stage}").id
    return bench.registry.add_artifact(folder, kind="model", name=str(folder), storage="reference").id
