"""Rejection sampling and expert iteration: sample, keep what is right, imitate it, and begin again.

One round: K answers to every prompt (they share its prefill), a grader, a choice among them (`best_of.select`), and
supervised fine-tuning on the chosen tokens. Rounds above one are expert iteration: the tuned model samples next. By
default every round tunes the first model anew, on the chosen answers of all rounds so far (STaR, arXiv 2203.14465, and
ReST-EM, 2312.06585, begin anew against drift; Llama 2, 2307.09288, section 3.2.3, pools earlier rounds).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from posttrain import data as rows
from posttrain.core import (
    Config,
    DataError,
    Grade,
    Grader,
    Record,
    Sampling,
    Task,
    Trajectory,
    derive_seed,
    doc,
    read_jsonl,
    recipe,
)
from posttrain.grade import WatchedGrader, reward_metrics, waits
from posttrain.models import resolve
from posttrain.recipes.best_of import Keep, Kept, example_of, select, selection_metrics, without_repetitions
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.grading import grader_from
from posttrain.recipes.group_stream import graded_groups
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.supervised import Supervised, split_held_out, steps_of, supervised_loop
from posttrain.recipes.workbench import RUNS, Workbench, open_stage, open_workbench
from posttrain.registry.durable import write_atomic
from posttrain.rollout import Group, rollout_metrics
from posttrain.rollout import check_failures as check_rollouts
from posttrain.train import TrainConfig


class RejectionSampling(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    rounds: Annotated[int, doc("R: sample, choose, tune; above 1 it is expert iteration", ge=1)] = 1
    samples: Annotated[int, doc("K, answers per prompt", ge=1)] = 8
    keep: Annotated[Keep, doc("which answers: best, correct or shortest")] = "correct"
    per_prompt: Annotated[int, doc("answers kept of a prompt and round at most; 0: all", ge=0)] = 4
    threshold: Annotated[float, doc("the lowest score that is right")] = 1.0
    max_solved: Annotated[float, doc("leave out prompts of which a larger share of answers is right")] = 1.0
    anew: Annotated[bool, doc("tune the first model each round, not the last round's")] = True
    pool: Annotated[bool, doc("learn from the choices of all rounds so far, not of this one alone")] = True
    max_tokens: Annotated[int, doc("new tokens per answer", ge=1)] = 256
    temperature: Annotated[float, doc("of sampling", gt=0)] = 1.0
    top_p: Annotated[float, doc("of sampling", gt=0, le=1)] = 1.0
    epochs: Annotated[float, doc("of each round's tuning", gt=0)] = 2.0
    batch_size: Annotated[int, doc("answers per optimiser step", ge=1)] = 32
    lr: Annotated[float, doc("peak learning rate")] = 1e-5
    warmup: Annotated[float, doc("fraction of the steps")] = 0.03
    held_out: Annotated[int, doc("chosen answers kept apart to measure the loss on", ge=0)] = 0
    max_failed: Annotated[float, doc("share of failed rollouts or grades that stops the run")] = 0.05
    micro_tokens: Annotated[int, doc("tokens per packed micro-batch", ge=1)] = 8192
    dtype: Annotated[Literal["float32", "bfloat16"], doc("of the trainer's matrix products")] = "bfloat16"
    slots: Annotated[int, doc("answers sampled at the same time", ge=1)] = 256
    seed: Annotated[int, doc("decides samples, choices and the order of examples")] = 0


class ChosenAnswer(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="chosen_answer/1"
):
    """One line of a round's file."""

    trajectory: Trajectory
    score: float


async def sample_round(
    bench: Workbench, policy: Policy, tasks: Sequence[Task], grader: Grader, config: RejectionSampling, number: int
) -> tuple[list[Kept], dict[str, float]]:
    """Sample K answers to every prompt, grade them, and choose.

    Returns:
        The chosen ones, and metrics: `best_of.selection_metrics`, rewards, lengths.

    Raises:
        RolloutError, GradeError: too many failed.
        DataError: nothing was chosen.
    """
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        n=config.samples,
        stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
    )
    watched = WatchedGrader(grader, bench.run, step=number - 1, max_failed=config.max_failed)
    await watched.prove()
    groups: list[Group] = []
    grades: list[Grade] = []
    length = policy.length_for(tasks, config.max_tokens)
    slots = min(config.slots, len(tasks) * config.samples)
    batch = max(1, 2 * slots // config.samples)
    with (
        policy.engine(slots=slots, length=length, seed=config.seed, inline=not waits(grader)) as engine,
        bench.progress(f"round {number}", len(tasks)) as progress,
    ):
        for start in range(0, len(tasks), batch):
            part = tasks[start : start + batch]
            some, theirs = await graded_groups(
                engine, part, sampling, watched, prompt_tokens=policy.renderer.prompt, seed=config.seed, step=number
            )
            groups += some
            grades += theirs
            progress.advance({"right": sum((grade.score or 0) >= config.threshold for grade in grades)}, by=len(part))
    check_rollouts(groups, config.max_failed)
    watched.check(grades)
    chosen = select(
        groups,
        grades,
        keep=config.keep,
        per_prompt=config.per_prompt,
        threshold=config.threshold,
        max_solved=config.max_solved,
        seed=derive_seed(config.seed, "choose", number),
    )
    metrics = selection_metrics(groups, grades, chosen, threshold=config.threshold)
    owners = [trajectory.group for group in groups for trajectory in group.trajectories]
    metrics |= reward_metrics(grades, owners) | rollout_metrics(groups) | await watched.step(number)
    if not chosen:
        raise DataError(
            f"round {number}: none of {len(grades)} answers to {len(tasks)} prompts was chosen (pass@{config.samples} "
            f"{metrics[f'pass@{config.samples}']:.3f}, {metrics['completions/clipped_ratio']:.0%} cut at "
            f"{config.max_tokens} tokens). Sample more, lower --threshold, or start from a stronger model"
        )
    return chosen, metrics


def tune_on(bench: Workbench, policy: Policy, chosen: Sequence[Kept], config: RejectionSampling, number: int) -> None:
    """Supervised fine-tuning on the chosen answers, in place, as a stage of its own that a killed run goes on with."""
    examples = [example_of(kept.trajectory) for kept in chosen]
    kept, apart = split_held_out(examples, config.held_out, config.seed)
    steps = steps_of(len(kept), config.batch_size, config.epochs)
    train = TrainConfig(
        lr=config.lr,
        schedule="linear",
        warmup=config.warmup,
        total_steps=steps,
        micro_tokens=config.micro_tokens,
        dtype=config.dtype,
        seed=config.seed,
    )
    settings = Supervised(
        train=train, batch_size=config.batch_size, steps=steps, seed=derive_seed(config.seed, "tune", number)
    )
    with open_stage(bench, f"round-{number}", {"round": number, "answers": len(examples)}) as stage:
        supervised_loop(stage, policy.model, kept, apart, settings, title=f"tune {number}")


async def rejection_sampling_loop(
    bench: Workbench, start: Path | str, tasks: Sequence[Task], grader: Grader, config: RejectionSampling, **load: Any
) -> Policy:
    """All rounds, from the first that the run has not finished.

    Args:
        start: folder or name of the first model.
        load: further arguments of `load_policy`.

    Returns:
        The last round's policy; each round's is in the run's folder `round-<n>`, with its `chosen.jsonl`.
    """
    pooled: list[Kept] = []
    policy = load_policy(str(start), **load)
    for number in range(1, config.rounds + 1):
        folder = bench.run.path / f"round-{number}"
        file = bench.run.path / f"chosen-{number}.jsonl"
        if not file.exists():
            chosen, metrics = await sample_round(bench, policy, tasks, grader, config, number)
            bench.run.tracker.log(metrics, step=number)
            bench.say(f"round {number}: {_summary(metrics)}")
            lines = (ChosenAnswer(trajectory=kept.trajectory, score=kept.score).to_json() for kept in chosen)
            write_atomic(file, b"".join(line + b"\n" for line in lines))
        else:
            chosen = [Kept(line.trajectory, line.score) for line in read_jsonl(file, ChosenAnswer)]
        pooled = without_repetitions([*chosen, *pooled]) if config.pool else chosen
        if not folder.exists():
            policy = load_policy(str(start), **load) if config.anew and number > 1 else policy
            tune_on(bench, policy, pooled, config, number)
            policy.save(folder)
        else:
            policy = load_policy(str(folder), **load)
    return policy


def _summary(metrics: dict[str, float]) -> str:
    passes = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("pass@"))
    return f"{passes}; {metrics['selected/num']:.0f} answers to {metrics['selected/prompts']:.0f} prompts chosen"


@recipe
def rejection_sampling(
    *,
    model: str,
    data: Path,
    grader: str = "number",
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    rounds: int = 1,
    samples: int = 8,
    keep: Keep = "correct",
    per_prompt: int = 4,
    threshold: float = 1.0,
    max_solved: float = 1.0,
    anew: bool = True,
    pool: bool = True,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    epochs: float = 2.0,
    batch_size: int = 32,
    lr: float = 1e-5,
    held_out: int = 0,
    kl_prompts: int = 16,
    evaluation: tuple[Path, ...] = (),
    max_failed: float = 0.05,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "rejection-sampling",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Rejection sampling: imitate the model's own best answers; with rounds, expert iteration.

    Args:
        model: folder of the model to tune, or a Hugging Face name.
        data: prompts with reference answers; GSM8K's question and answer columns are known.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        columns: which columns to read, as `prompt=question,answer=solution`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        rounds: sample, choose, tune, so many times.
        samples: answers per prompt and round.
        keep: best (highest score), correct (drawn among the right ones) or shortest (of the right ones).
        per_prompt: answers kept of a prompt and round at most; 0 keeps all.
        threshold: the lowest score that is right.
        max_solved: leave out prompts of which a larger share of answers is right.
        anew: tune the first model each round; `--no-anew` goes on with the last round's.
        pool: learn from the choices of all rounds so far; `--no-pool` from this round's alone.
        max_tokens: new tokens per answer; answers cut there are never kept.
        temperature: of sampling.
        top_p: of sampling.
        epochs: of each round's tuning.
        batch_size: answers per optimiser step.
        lr: peak learning rate, linear schedule.
        held_out: chosen answers kept apart to measure the loss on.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        max_failed: share of failed rollouts or grades that stops the run.
        dtype: of the trainer's matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides samples, choices and order.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    with open_workbench("rejection_sampling", options, runs=runs, resume=resume) as bench:
        judge = grader_from(grader)
        source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
        loaded = rows.load(
            data, kind="prompt", columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl"
        )
        bench.say(loaded.report.summary())
        tasks = [rows.to_task(row, chat=chat) for row in loaded.rows]
        tasks = without_evaluation(bench, tasks, evaluation, source)
        config = RejectionSampling.from_dict(
            {key: options[key] for key in RejectionSampling.__struct_fields__ if key in options}
        )
        first = resolve(model)
        policy = asyncio.run(
            rejection_sampling_loop(bench, first, tasks, judge, config, device=device, template=template)
        )
        report_kl(bench, replace(policy, path=first, base=first), tasks, num_prompts=kl_prompts, max_tokens=max_tokens)
        tuned = policy.save(bench.run.path / "model")
        bench.registry.add_run(bench.run)
        parent = bench.registry.add_artifact(first, kind="model", name=str(model), storage="reference")
        card = bench.registry.add_artifact(
            tuned, kind="model", name=name, parents=[source.id, parent.id], run=bench.run.id, storage="reference"
        )
        bench.say(f"model {card.short()} in {tuned}")
        return bench.run.path
