"""GRPO: sample siblings, grade them, and make the better ones likelier than the worse.

One step: a few prompts, G answers to each from the current policy; a grader scores them; an answer's advantage is its
score minus the mean of its siblings (over their standard deviation with `scale_rewards`, as in DeepSeekMath,
arXiv 2402.03300; without it Dr. GRPO, arXiv 2503.20783); the clipped surrogate moves the weights. Groups whose answers
are all equal teach nothing and are left out of the update, and counted. The KL to the starting model is measured, and
added to the loss where `beta` is above 0.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from posttrain import data as rows
from posttrain.core import Config, Example, Grade, Grader, Sampling, Task, doc, read_metrics, recipe
from posttrain.engine import LocalEngine
from posttrain.evaluate import Suite, run_suite
from posttrain.grade import check_failures as check_grades
from posttrain.grade import grade_all, reward_metrics
from posttrain.objectives import group_advantages
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.rollout import Group, PromptSchedule, example_metrics, rollout_metrics, run_groups, to_examples
from posttrain.rollout import check_failures as check_rollouts
from posttrain.train import Ledger, TrainConfig, Trainer, load_latest, policy_objective, save_checkpoint


class Grpo(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    steps: Annotated[int, doc("sampling steps", ge=1)]
    prompts_per_step: Annotated[int, doc("P, prompts per step", ge=1)]
    group_size: Annotated[int, doc("G, answers per prompt", ge=2)]
    max_tokens: Annotated[int, doc("new tokens per answer", ge=1)]
    lr: Annotated[float, doc("learning rate")]
    warmup: Annotated[float, doc("below 1 a fraction of the steps, else steps")] = 0.0
    schedule: Annotated[Literal["linear", "cosine", "constant"], doc("course of the learning rate")] = "constant"
    temperature: Annotated[float, doc("of sampling, and of the policy in the loss", gt=0)] = 1.0
    scale_rewards: Annotated[bool, doc("divide advantages by the group's standard deviation")] = False
    clip_low: Annotated[float, doc("epsilon below 1")] = 0.2
    clip_high: Annotated[float, doc("epsilon above 1; DAPO 0.28")] = 0.28
    beta: Annotated[float, doc("weight of the KL to the starting model", ge=0)] = 0.0
    normalise: Annotated[Literal["token", "sequence", "constant"], doc("what the loss is a mean over")] = "token"
    importance_cap: Annotated[float | None, doc("truncated importance weights for sampler mismatch")] = 2.0
    kl_every: Annotated[int, doc("steps between measurements of the KL where beta is 0; 0: never", ge=0)] = 10
    max_failed: Annotated[float, doc("share of failed rollouts or grades that stops the run")] = 0.05
    evaluate_every: Annotated[int, doc("steps between evaluations on the held-out tasks; 0: never", ge=0)] = 20
    checkpoint_every: Annotated[int, doc("steps between checkpoints", ge=1)] = 20
    micro_tokens: Annotated[int, doc("tokens per packed micro-batch", ge=1)] = 8192
    dtype: Annotated[Literal["float32", "bfloat16"], doc("of the trainer's matrix products")] = "bfloat16"
    sampler_dtype: Annotated[Literal["float32", "bfloat16"], doc("of the sampler's weights")] = "float32"
    slots: Annotated[int, doc("answers sampled at the same time", ge=1)] = 256
    seed: Annotated[int, doc("decides the order of prompts and every sample")] = 0


async def grpo_loop(
    bench: Workbench,
    policy: Policy,
    tasks: Sequence[Task],
    grader: Grader,
    config: Grpo,
    *,
    held_out: Suite | None = None,
) -> dict[str, float]:
    """Run the loop from the run's newest checkpoint to its last step; the policy is tuned in place.

    Returns:
        The last step's metrics, and `num_tokens`: tokens sampled in all.
    """
    schedule = PromptSchedule(tasks, config.seed, config.prompts_per_step)
    objective = policy_objective(
        normalise=config.normalise,
        max_length=config.max_tokens,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        importance_cap=config.importance_cap,
        kl_coef=config.beta,
    )
    reference = Trainer(copy.deepcopy(policy.model), _train_config(config), objective)
    trainer = Trainer(policy.model, _train_config(config), objective)
    ledger = Ledger()
    resumed = load_latest(
        bench.run.checkpoints, trainer, ledger=ledger, report=lambda line: bench.run.event("warning", text=line)
    )
    sampled = float(resumed.extra["num_sampled"]) if resumed else 0.0
    bench.run.truncate_after(trainer.num_steps if resumed else -1)
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        n=config.group_size,
        stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
    )
    metrics = read_metrics(bench.run.path / "metrics.jsonl")[-1] if resumed else {}
    every = [*tasks, *(held_out.tasks if held_out else ())]
    length = policy.length_for(every, config.max_tokens)
    slots = min(config.slots, config.prompts_per_step * config.group_size)
    engine = policy.engine(slots=slots, length=length, dtype=config.sampler_dtype, seed=config.seed, inline=True)
    with engine, bench.progress("grpo", config.steps, start=trainer.num_steps) as progress:
        for step in range(trainer.num_steps, config.steps):
            engine.update_weights(policy.model, version=step)
            chosen = schedule.tasks_at(step)
            groups = await run_groups(
                engine, chosen, sampling, prompt_tokens=policy.renderer.prompt, seed=config.seed, step=step
            )
            check_rollouts(groups, config.max_failed)
            trajectories = [trajectory for group in groups for trajectory in group.trajectories]
            grades = await grade_all(grader, trajectories)
            check_grades(grades, config.max_failed)
            advantages = advantages_of(groups, grades, config)
            examples = to_examples(groups, advantages, keep_zero=config.beta > 0) or to_examples(groups, advantages)
            if config.beta > 0 or (config.kl_every and step % config.kl_every == 0):
                examples = with_reference(examples, reference)
            metrics = trainer.step(examples)
            ledger.record([task.id for task in chosen], epoch=schedule.epoch(step))
            metrics |= reward_metrics(grades, [trajectory.group for trajectory in trajectories])
            metrics |= rollout_metrics(groups) | example_metrics(groups, advantages, keep_zero=config.beta > 0)
            sampled += sum(trajectory.num_completion_tokens() for trajectory in trajectories)
            metrics["num_sampled"] = sampled
            done = step + 1
            if held_out and config.evaluate_every and done % config.evaluate_every == 0:
                metrics["eval/accuracy"] = await held_out_accuracy(engine, policy, held_out, done)
            _log(bench, metrics, groups, grades, done)
            progress.advance(_shown(metrics))
            if done % config.checkpoint_every == 0 or done == config.steps:
                save_checkpoint(bench.run.checkpoints, trainer, ledger=ledger, extra={"num_sampled": sampled})
    return {**metrics, "num_tokens": sampled}


def _train_config(config: Grpo) -> TrainConfig:
    return TrainConfig(
        lr=config.lr,
        warmup=config.warmup,
        schedule=config.schedule,
        total_steps=config.steps,
        betas=(0.9, 0.95),
        micro_tokens=config.micro_tokens,
        dtype=config.dtype,
        temperature=config.temperature,
        entropy=True,
        seed=config.seed,
    )


def advantages_of(groups: Sequence[Group], grades: Sequence[Grade], config: Grpo) -> list[list[float | None]]:
    """Each group's advantages, by sibling; None where the rollout or its grade failed."""
    scores = [math.nan if grade.score is None else grade.score for grade in grades]
    rewards_PG = torch.tensor(scores, dtype=torch.float64).view(len(groups), config.group_size)
    valid_PG = ~rewards_PG.isnan()
    advantages_PG = group_advantages(rewards_PG, std=config.scale_rewards, valid_PG=valid_PG)
    return [
        [value if valid else None for value, valid in zip(*pair, strict=True)]
        for pair in zip(advantages_PG.tolist(), valid_PG.tolist(), strict=True)
    ]


def with_reference(examples: Sequence[Example], reference: Trainer) -> list[Example]:
    """The examples with the starting model's logprobs as the column `ref_logprobs`."""
    return [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={**sequence.columns, "ref_logprobs": column})
                for sequence, column in zip(example.sequences, columns, strict=True)
            )
        )
        for example, columns in zip(examples, reference.logprobs(examples), strict=True)
    ]


async def held_out_accuracy(engine: LocalEngine, policy: Policy, suite: Suite, step: int) -> float:
    """Accuracy of the policy as it is."""
    report = await run_suite(suite, engine, policy.renderer.prompt, model=f"step {step}")
    return report.metrics["accuracy"].value


def _log(
    bench: Workbench, metrics: dict[str, float], groups: Sequence[Group], grades: Sequence[Grade], step: int
) -> None:
    bench.run.tracker.log(metrics, step=step)
    graded = iter(grades)
    for place, group in enumerate(groups):
        own = [next(graded) for _ in group.trajectories]
        if place < 2:  # two groups a step are enough to read
            for trajectory, grade in zip(group.trajectories, own, strict=True):
                bench.run.sample({"trajectory": trajectory.to_dict(), "grade": grade.to_dict()}, step=step)


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    names = {"reward": "reward", "completions/mean_length": "length", "eval/accuracy": "held-out"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


@recipe
def grpo(
    *,
    model: str,
    data: Path,
    grader: str = "number",
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 0,
    steps: int = 100,
    prompts_per_step: int = 16,
    group_size: int = 8,
    max_tokens: int = 256,
    lr: float = 1e-6,
    warmup: float = 0.0,
    temperature: float = 1.0,
    scale_rewards: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta: float = 0.0,
    normalise: Literal["token", "sequence", "constant"] = "token",
    max_failed: float = 0.05,
    checkpoint_every: int = 20,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "grpo",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Reinforcement learning from a grader with group-relative advantages.

    Defaults: Olmo 3's and DAPO's for what they share (no KL, clip-higher, token-level loss, lr 1e-6), without the
    standard deviation (Dr. GRPO); a small model made from nothing wants a learning rate near 1e-4.

    Args:
        model: folder of the policy, or a Hugging Face name.
        data: prompts with reference answers; GSM8K's question and answer columns are known.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        columns: which columns to read, as `prompt=question,answer=solution`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: tasks kept apart and evaluated greedily every 20 steps.
        steps: sampling steps.
        prompts_per_step: prompts per step.
        group_size: answers per prompt.
        max_tokens: new tokens per answer.
        lr: learning rate.
        warmup: below 1 a fraction of the steps, else steps.
        temperature: of sampling.
        scale_rewards: divide advantages by the group's standard deviation.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.
        beta: weight of the KL to the starting model.
        normalise: what the loss is a mean over.
        max_failed: share of failed rollouts or grades that stops the run.
        checkpoint_every: steps between checkpoints.
        dtype: of the trainer's matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides the order of prompts and every sample.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options: dict[str, Any] = dict(locals())
    with open_workbench("grpo", options, runs=runs, resume=resume) as bench:
        policy = load_policy(model, device=device, template=template)
        judge = grader_from(grader)
        source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
        loaded = rows.load(
            data, kind="prompt", columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl"
        )
        bench.say(loaded.report.summary())
        tasks = [rows.to_task(row, chat=chat) for row in loaded.rows]
        apart, kept = tasks[:held_out], tasks[held_out:]
        greedy = Sampling(
            max_tokens=max_tokens, temperature=0.0, stop_tokens=tuple(sorted(policy.renderer.stop_tokens))
        )
        suite = Suite("held-out", apart, greedy, judge) if apart else None
        config = Grpo.from_dict({key: options[key] for key in Grpo.__struct_fields__ if key in options})
        metrics = asyncio.run(grpo_loop(bench, policy, kept, judge, config, held_out=suite))
        tuned = policy.save(bench.run.path / "model")
        bench.registry.add_run(bench.run)
        parent = bench.registry.add_artifact(policy.path, kind="model", name=str(model), storage="reference")
        card = bench.registry.add_artifact(
            tuned, kind="model", name=name, parents=[source.id, parent.id], run=bench.run.id, storage="reference"
        )
        bench.say(f"reward of the last step {metrics['reward']:.3f}; model {card.short()} in {tuned}")
        return bench.run.path
