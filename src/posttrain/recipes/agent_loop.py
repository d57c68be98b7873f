"""The loop of multi-turn reinforcement learning: play episodes, grade them, make the better turns likelier.

One step: tasks are drawn, G episodes of each are played in environments of their own, all turns of all episodes in
lockstep over one engine; the environment's rewards, or a grader's scores, become advantages; the trainer takes a step.
Episodes, credit and updates are those of single turns: only what is sampled differs. What a killed run needs to go on
is in its newest checkpoint; where environments are deterministic, it goes on to the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch

from posttrain.core import Config, Grader, Sampling, Task, doc, read_metrics
from posttrain.engine import LocalEngine
from posttrain.evaluate import bootstrap_mean, wilson
from posttrain.grade import WatchedGrader, grade_all
from posttrain.grade import check_failures as check_grades
from posttrain.recipes.agent_credit import token_advantages
from posttrain.recipes.policy import Policy
from posttrain.recipes.rl_learner import Learner
from posttrain.recipes.rl_loop import log, sampled_metrics, shown, source_of, tokens_of
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.workbench import Workbench
from posttrain.rollout import (
    Draw,
    EnvironmentFactory,
    EpisodeLimits,
    Filled,
    Group,
    PromptSource,
    Rolled,
    TurnTokens,
    episode_metrics,
    example_metrics,
    fill_batch,
    has_variance,
    pass_rate,
    run_episodes,
    to_examples,
)
from posttrain.rollout import check_failures as check_rollouts
from posttrain.train import Ledger


class Agent(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the episodes, besides those of the loop."""

    turn_tokens: Annotated[int, doc("new tokens per turn", ge=1)] = 256
    limits: Annotated[EpisodeLimits, doc("where an episode is cut off")] = EpisodeLimits()
    credit: Annotated[Literal["episode", "turn"], doc("one advantage for an episode, or one for each turn")] = "episode"
    discount: Annotated[float, doc("of later rewards per turn, with credit by turns", ge=0, le=1)] = 1.0
    keep_prefixes: Annotated[bool, doc("keep the cache of a conversation for its next turn")] = True
    concurrency: Annotated[int | None, doc("tasks played at the same time; None: all of a step")] = None
    full_marks: Annotated[float, doc("reward that counts as success, in evaluations", gt=0)] = 1.0


class Stage:
    """Where episodes are played: a sampler, a chat template, environments and a grader."""

    def __init__(
        self, engine: LocalEngine, turns: TurnTokens, factory: EnvironmentFactory, grader: Grader, agent: Agent
    ) -> None:
        self.engine, self.turns, self.factory, self.grader, self.agent = engine, turns, factory, grader, agent

    async def play(
        self, tasks: Sequence[Task], *, siblings: int, temperature: float, seed: int, step: int, max_failed: float
    ) -> list[Rolled]:
        """Episodes of each task, graded.

        Raises:
            RolloutError, GradeError: more than the share `max_failed` of the episodes or grades failed.
        """
        sampling = Sampling(max_tokens=self.agent.turn_tokens, temperature=temperature, n=siblings)
        groups = await run_episodes(
            self.engine,
            tasks,
            self.factory,
            sampling,
            turns=self.turns,
            seed=seed,
            step=step,
            limits=self.agent.limits,
            concurrency=self.agent.concurrency,
            lockstep=True,
        )
        check_rollouts(groups, max_failed)
        grades = await grade_all(self.grader, [trajectory for group in groups for trajectory in group.trajectories])
        if isinstance(self.grader, WatchedGrader) and max_failed < 1:
            self.grader.check(grades)
        else:
            check_grades(grades, max_failed)
        rest = iter(grades)
        return [Rolled(group, [next(rest) for _ in group.trajectories]) for group in groups]


def stage_of(policy: Policy, factory: EnvironmentFactory, grader: Grader, config: Grpo, agent: Agent) -> Stage:
    """A stage over the policy's own weights, with room for all episodes of a step."""
    length = min(agent.limits.max_tokens, policy.model.config.max_positions)
    slots = min(config.slots, config.prompts_per_step * config.group_size)
    kind = {"float32": None, "bfloat16": torch.bfloat16}[config.sampler_dtype]
    engine = LocalEngine(
        policy.model,
        policy.tokenizer,
        max_batch=slots,
        max_length=length,
        prefix_tokens=slots * length if agent.keep_prefixes else 0,
        dtype=kind,
        seed=config.seed,
        inline=True,
    )
    limits = agent.limits.replace(max_tokens=length)
    return Stage(engine, TurnTokens(policy.renderer), factory, grader, agent.replace(limits=limits))


async def agent_loop(
    bench: Workbench,
    policy: Policy,
    tasks: Sequence[Task],
    factory: EnvironmentFactory,
    grader: Grader,
    config: Grpo,
    agent: Agent,
    *,
    held_out: Sequence[Task] = (),
    title: str = "agent",
    max_sampled: float = math.inf,
) -> dict[str, float]:
    """Run the loop from the run's newest checkpoint to its last step; the policy is tuned in place.

    Args:
        bench: the run.
        policy: what is tuned.
        tasks: to draw from.
        factory: makes the environment of one episode.
        grader: says how good an episode is; `EpisodeReward` repeats the environment's word.
        config: settings of the loop; its `max_tokens` are those of a whole episode.
        agent: settings of the episodes.
        held_out: played greedily every `config.evaluate_every` steps.
        title: of the progress bar.
        max_sampled: the step in which the policy has written so many tokens is the last one.

    Returns:
        The last step's metrics, and `num_tokens`: tokens sampled in all.
    """
    learner = Learner(policy.model, config)
    source, ledger = source_of(tasks, config), Ledger()
    resumed = learner.resume(bench.run.checkpoints, source, ledger, lambda line: bench.run.event("warning", text=line))
    bench.run.truncate_after(learner.step if resumed else -1)
    past = read_metrics(bench.run.path / "metrics.jsonl") if resumed else []
    metrics = past[-1] if past else {}
    watched = WatchedGrader(grader, bench.run, step=learner.step, max_failed=config.max_failed, past=past)
    await watched.prove()
    stage = stage_of(policy, factory, watched, config, agent)
    with stage.engine, bench.progress(title, config.steps, start=learner.step) as progress:
        for step in range(learner.step, config.steps):
            if learner.num_sampled >= max_sampled:
                break
            stage.engine.update_weights(policy.model, version=step)
            filled = await play_step(stage, source, config)
            metrics = learn(learner, filled.kept or filled.dropped, agent)
            for draw in filled.draws:
                ledger.record([task.id for task in draw.tasks], epoch=draw.epoch)
            metrics |= sampled_metrics(filled) | episode_metrics([rolled.group for rolled in filled.sampled])
            metrics |= source.metrics() | (filled.metrics() if config.dynamic_rounds else {})
            learner.num_sampled += tokens_of(filled)
            metrics["num_sampled"] = learner.num_sampled
            done = learner.step
            if held_out and config.evaluate_every and done % config.evaluate_every == 0:
                stage.engine.update_weights(policy.model, version=done)
                with watched.paused():
                    metrics |= await evaluate_episodes(stage, held_out)
            metrics |= await watched.step(done, held_out=metrics.get("eval/success"))
            log(bench, metrics, filled.sampled, done)
            progress.advance(shown(metrics))
            if done % config.checkpoint_every == 0 or done == config.steps or learner.num_sampled >= max_sampled:
                learner.save(bench.run.checkpoints, source, ledger)
    return {**metrics, "num_tokens": learner.num_sampled}


async def play_step(stage: Stage, source: PromptSource, config: Grpo) -> Filled:
    """Groups and grades of one step; the source learns the pass rates."""

    async def roll(draw: Draw) -> list[Rolled]:
        return await stage.play(
            draw.tasks,
            siblings=config.group_size,
            temperature=config.temperature,
            seed=config.seed,
            step=draw.number,
            max_failed=config.max_failed,
        )

    filled = await fill_batch(
        source.draw,
        roll,
        has_variance if config.dynamic_rounds else lambda _: True,
        num_groups=config.prompts_per_step,
        max_rounds=config.dynamic_rounds or 1,
    )
    rates = {rolled.group.task.id: pass_rate(rolled.grades, full_marks=config.full_marks) for rolled in filled.sampled}
    source.record({task_id: rate for task_id, rate in rates.items() if rate is not None})
    return filled


def learn(learner: Learner, rolled: Sequence[Rolled], agent: Agent) -> dict[str, float]:
    """One step's update, with credit by episodes or by turns."""
    if agent.credit == "episode":
        return learner.learn(rolled)
    groups: list[Group] = [one.group for one in rolled]
    advantages = token_advantages(rolled, agent.discount)
    keep = {"keep_zero": learner.config.keeps_zero, "keep_clipped": not learner.config.mask_clipped}
    examples = to_examples(groups, advantages, **keep) or to_examples(groups, advantages)
    metrics = learner.trainer.step(examples)
    learner.step += 1
    return metrics | example_metrics(groups, advantages, **keep)


async def evaluate_episodes(stage: Stage, tasks: Sequence[Task], *, temperature: float = 0.0) -> dict[str, float]:
    """One episode of each task, greedily.

    Returns:
        `eval/success`, the share that reached full marks, with its 95 % Wilson interval (`eval/success_low`, `_high`);
        `eval/reward` with a bootstrap interval; `eval/turns` and `eval/tokens`: means of what the policy wrote.
        Episodes that failed count as no success.
    """
    rolled = await stage.play(tasks, siblings=1, temperature=temperature, seed=0, step=0, max_failed=1.0)
    scores = [0.0 if one.grades[0].score is None else one.grades[0].score for one in rolled]
    played = [one.group.trajectories[0] for one in rolled]
    share = wilson(sum(score >= stage.agent.full_marks for score in scores), len(scores))
    mean = bootstrap_mean(scores, seed=0)
    return {
        "eval/success": share.value,
        "eval/success_low": share.low,
        "eval/success_high": share.high,
        "eval/reward": mean.value,
        "eval/reward_low": mean.low,
        "eval/reward_high": mean.high,
        "eval/turns": sum(trajectory.metrics.get("turns", 0.0) for trajectory in played) / len(played),
        "eval/tokens": sum(trajectory.num_completion_tokens() for trajectory in played) / len(played),
    }
