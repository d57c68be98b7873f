"""The loop of group-relative reinforcement learning: sample siblings, grade them, make the better ones likelier.

One step: prompts are drawn, G answers to each are sampled from the current policy and graded; groups without variance
may be replaced (`dynamic_rounds`); `rl_credit` says what each answer deserves; the trainer takes one optimiser step, or
several over minibatches. What a killed run needs to go on is in its newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.core import Grader, Sampling, Task, read_metrics
from posttrain.engine import LocalEngine
from posttrain.evaluate import Suite, run_suite
from posttrain.grade import WatchedGrader, reward_metrics, waits
from posttrain.models import Decoder
from posttrain.recipes.group_stream import graded_groups
from posttrain.recipes.kl_spent import fixed_prompts, kl_spent
from posttrain.recipes.policy import Policy
from posttrain.recipes.rl_learner import Learner
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.workbench import Workbench
from posttrain.rollout import (
    Draw,
    Filled,
    PassRateCurriculum,
    PromptSource,
    PromptStream,
    Rolled,
    fill_batch,
    has_variance,
    pass_rate,
    rollout_metrics,
)
from posttrain.rollout import check_failures as check_rollouts
from posttrain.train import Ledger


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
    learner = Learner(policy.model, config)
    source, ledger = source_of(tasks, config), Ledger()
    resumed = learner.resume(bench.run.checkpoints, source, ledger, lambda line: bench.run.event("warning", text=line))
    bench.run.truncate_after(learner.step if resumed else -1)
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        n=config.group_size,
        stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
    )
    past = read_metrics(bench.run.path / "metrics.jsonl") if resumed else []
    metrics = past[-1] if past else {}
    watched = WatchedGrader(grader, bench.run, step=learner.step, max_failed=config.max_failed, past=past)
    await watched.prove()
    every = [*tasks, *(held_out.tasks if held_out else ())]
    length = policy.length_for(every, config.max_tokens)
    slots = min(config.slots, config.prompts_per_step * config.group_size)
    inline = not waits(grader)  # a sampler that holds up the event loop would hold up those who are waited for
    engine = policy.engine(slots=slots, length=length, dtype=config.sampler_dtype, seed=config.seed, inline=inline)
    with engine, bench.progress("grpo", config.steps, start=learner.step) as progress:
        for step in range(learner.step, config.steps):
            engine.update_weights(policy.model, version=step)
            filled = await sample_step(engine, policy, source, sampling, watched, config)
            metrics = learner.learn(filled.kept or filled.dropped)
            for draw in filled.draws:
                ledger.record([task.id for task in draw.tasks], epoch=draw.epoch)
            metrics |= sampled_metrics(filled) | source.metrics()
            metrics |= filled.metrics() if config.dynamic_rounds else {}
            learner.num_sampled += tokens_of(filled)
            metrics["num_sampled"] = learner.num_sampled
            done = learner.step
            if held_out and config.evaluate_every and done % config.evaluate_every == 0:
                metrics["eval/accuracy"] = await held_out_accuracy(engine, policy, held_out, done)
            if config.kl_prompts and (
                done == config.steps or (config.kl_spent_every and done % config.kl_spent_every == 0)
            ):
                metrics |= await spent(
                    engine,
                    policy,
                    learner.start,
                    tasks,
                    num_prompts=config.kl_prompts,
                    max_tokens=config.max_tokens,
                    version=done,
                )
            metrics |= await watched.step(done, held_out=metrics.get("eval/accuracy"))
            log(bench, metrics, filled.sampled, done)
            progress.advance(shown(metrics))
            if done % config.checkpoint_every == 0 or done == config.steps:
                learner.save(bench.run.checkpoints, source, ledger)
    return {**metrics, "num_tokens": learner.num_sampled}


def source_of(tasks: Sequence[Task], config: Grpo) -> PromptSource:
    """Shuffled epochs, or the curriculum."""
    if not config.curriculum:
        return PromptStream(tasks, config.seed)
    return PassRateCurriculum(tasks, config.seed, low=config.curriculum_low, high=config.curriculum_high)


async def sample_step(
    engine: LocalEngine, policy: Policy, source: PromptSource, sampling: Sampling, grader: WatchedGrader, config: Grpo
) -> Filled:
    """Groups and grades of one step; the source learns the pass rates.

    Raises:
        RolloutError, GradeError: too many rollouts or grades of a round failed.
    """

    async def roll(draw: Draw) -> list[Rolled]:
        return await roll_and_grade(
            engine, policy, draw, sampling, grader, seed=config.seed, max_failed=config.max_failed
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


async def roll_and_grade(
    engine: LocalEngine,
    policy: Policy,
    draw: Draw,
    sampling: Sampling,
    grader: WatchedGrader,
    *,
    seed: int,
    max_failed: float,
) -> list[Rolled]:
    """The groups of one draw with their grades, which are given while others are sampled where the grader waits.

    Raises:
        RolloutError, GradeError: more than the share `max_failed` of the rollouts or grades failed.
    """
    groups, grades = await graded_groups(
        engine, draw.tasks, sampling, grader, prompt_tokens=policy.renderer.prompt, seed=seed, step=draw.number
    )
    check_rollouts(groups, max_failed)
    grader.check(grades)
    rest = iter(grades)
    return [Rolled(group, [next(rest) for _ in group.trajectories]) for group in groups]


def sampled_metrics(filled: Filled) -> dict[str, float]:
    """Metrics of all that was sampled, whether it was kept or not."""
    groups = [rolled.group for rolled in filled.sampled]
    grades = [grade for rolled in filled.sampled for grade in rolled.grades]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    return reward_metrics(grades, [trajectory.group for trajectory in trajectories]) | rollout_metrics(groups)


def tokens_of(filled: Filled) -> int:
    """Tokens that the policy wrote, kept or not."""
    return sum(
        trajectory.num_completion_tokens() for rolled in filled.sampled for trajectory in rolled.group.trajectories
    )


async def held_out_accuracy(engine: LocalEngine, policy: Policy, suite: Suite, step: int) -> float:
    """Accuracy of the policy as it is."""
    report = await run_suite(suite, engine, policy.renderer.prompt, model=f"step {step}")
    return report.metrics["accuracy"].value


async def spent(
    engine: LocalEngine,
    policy: Policy,
    start: Decoder,
    tasks: Sequence[Task],
    *,
    num_prompts: int,
    max_tokens: int,
    version: int,
) -> dict[str, float]:
    """The KL to the start on the fixed prompts, as metrics."""
    engine.update_weights(policy.model, version=version)
    measured = await kl_spent(policy, start, fixed_prompts(tasks, num_prompts), max_tokens=max_tokens, sampler=engine)
    return measured.metrics()


def log(bench: Workbench, metrics: dict[str, float], sampled: Sequence[Rolled], step: int) -> None:
    """The step's metrics, and two of its groups: enough to read."""
    bench.run.tracker.log(metrics, step=step)
    for rolled in sampled[:2]:
        for trajectory, grade in zip(rolled.group.trajectories, rolled.grades, strict=True):
            bench.run.sample({"trajectory": trajectory.to_dict(), "grade": grade.to_dict()}, step=step)


def shown(metrics: dict[str, float]) -> dict[str, float]:
    """What is shown beside the progress bar."""
    names = {"reward": "reward", "completions/mean_length": "length", "eval/accuracy": "held-out"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}
