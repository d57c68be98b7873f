"""GRPO for agents: episodes of many turns with tools, databases, users or games in the place of single answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from posttrain.core import recipe
from posttrain.recipes.agent_loop import Agent, agent_loop
from posttrain.recipes.environments import environment_from, tasks_from
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import load_policy
from posttrain.recipes.rl_settings import Variant, with_variant
from posttrain.recipes.workbench import RUNS, open_workbench
from posttrain.rollout import EpisodeLimits, EpisodeReward


@recipe
def agent_grpo(
    *,
    model: str,
    environment: str,
    data: Path | None = None,
    grader: str = "environment",
    columns: str | None = None,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 0,
    variant: Variant | None = None,
    steps: int = 100,
    prompts_per_step: int = 16,
    group_size: int = 8,
    turn_tokens: int = 256,
    max_turns: int = 8,
    max_context: int = 4096,
    max_seconds: float | None = None,
    malformed_reward: float = 0.0,
    credit: Literal["episode", "turn"] = "episode",
    discount: float = 1.0,
    lr: float = 1e-6,
    warmup: float = 0.0,
    temperature: float = 1.0,
    scale_rewards: bool | None = None,
    beta: float | None = None,
    dynamic_rounds: int | None = None,
    max_failed: float = 0.05,
    evaluate_every: int = 20,
    checkpoint_every: int = 20,
    micro_tokens: int = 8192,
    slots: int = 256,
    concurrency: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "agent",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Reinforcement learning of an agent over episodes of many turns.

    Defaults are those of `grpo`; a small model made from nothing wants a learning rate near 1e-4.

    Args:
        model: folder of the policy, or a Hugging Face name.
        environment: guess, hangman, sql:DATABASE, python, or FILE.py:NAME.
        data: prompts with answers; without it the FILE.py's function tasks() gives the tasks.
        grader: environment (the sum of its rewards), or a grader as for `grpo`, which reads the last turn.
        columns: which columns to read, as `prompt=question,answer=solution`.
        template: a chat template file that replaces the model's own.
        limit: at most so many tasks.
        held_out: tasks kept apart and played greedily.
        variant: published settings to begin with: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, max_rl.
        steps: sampling steps.
        prompts_per_step: tasks per step.
        group_size: episodes per task.
        turn_tokens: new tokens per turn.
        max_turns: turns of an episode.
        max_context: tokens of an episode, all told; what the model has positions for, if that is less.
        max_seconds: of an episode, by the clock; one that is late fails.
        malformed_reward: for a turn whose tool calls cannot be read.
        credit: one advantage for the whole episode, or one for each turn from its rewards.
        discount: of later rewards per turn, with credit by turns.
        lr: learning rate.
        warmup: below 1 a fraction of the steps, else steps.
        temperature: of sampling.
        scale_rewards: divide advantages by the group's standard deviation.
        beta: weight of the KL to the starting model.
        dynamic_rounds: rounds in which groups without variance are replaced.
        max_failed: share of failed episodes or grades that stops the run.
        evaluate_every: steps between evaluations on the held-out tasks.
        checkpoint_every: steps between checkpoints.
        micro_tokens: tokens per packed micro-batch.
        slots: episodes whose turns are sampled at the same time.
        concurrency: tasks played at the same time; none: all of a step.
        dtype: of the trainer's matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides the order of tasks and every sample.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options: dict[str, Any] = dict(locals())
    with open_workbench("agent_grpo", options, runs=runs, resume=resume) as bench:
        policy = load_policy(model, device=device, template=template)
        factory = environment_from(environment)
        tasks = tasks_from(environment, data, limit=limit, columns=columns)
        bench.say(f"{len(tasks)} tasks in {environment}, {min(held_out, len(tasks))} of them held out")
        config = with_variant(variant, {**options, "max_tokens": max_context})
        agent = Agent(
            turn_tokens=turn_tokens,
            limits=EpisodeLimits(
                max_turns=max_turns, max_tokens=max_context, seconds=max_seconds, malformed_reward=malformed_reward
            ),
            credit=credit,
            discount=discount,
            concurrency=concurrency,
        )
        judge = EpisodeReward() if grader == "environment" else grader_from(grader)
        apart, kept = tasks[:held_out], tasks[held_out:]
        metrics = asyncio.run(agent_loop(bench, policy, kept, factory, judge, config, agent, held_out=apart))
        tuned = policy.save(bench.run.path / "model")
        bench.registry.add_run(bench.run)
        parents = [bench.registry.add_artifact(policy.path, kind="model", name=str(model), storage="reference").id]
        if data is not None:
            parents.append(bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference").id)
        card = bench.registry.add_artifact(
            tuned, kind="model", name=name, parents=parents, run=bench.run.id, storage="reference"
        )
        if "eval/success" in metrics:
            low, high = metrics["eval/success_low"], metrics["eval/success_high"]
            bench.say(f"held-out success {metrics['eval/success']:.1%} [{low:.1%}, {high:.1%}]")
        bench.say(f"model {card.short()} in {tuned}")
        return bench.run.path
