"""PPO: a policy and a value model that foretells its rewards, token by token.

One step: answers are sampled and graded; every token pays for leaving the reference (KL), the last one is paid the
score; the value model's errors make each token's advantage (generalised advantage estimation); both models take several
optimiser steps over the same answers, neither far from where it stood. PPO: arXiv 1707.06347; for language models:
Ziegler et al., arXiv 1909.08593, and the details of Huang et al., arXiv 2403.17031. Its credit and updates are in
`rl_actor_critic`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain import data as rows
from posttrain import models
from posttrain.core import Grader, Sampling, Task, read_metrics, recipe
from posttrain.evaluate import Suite
from posttrain.grade import WatchedGrader, waits
from posttrain.models import ScoredDecoder
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.rl_actor_critic import ActorCritic, Ppo, value_model
from posttrain.recipes.rl_loop import held_out_accuracy, log, roll_and_grade, sampled_metrics, shown, spent, tokens_of
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.rollout import Filled, PromptStream
from posttrain.train import Ledger

__all__ = ["Ppo", "ppo", "ppo_loop", "value_model"]


async def ppo_loop(
    bench: Workbench,
    policy: Policy,
    critic: ScoredDecoder,
    tasks: Sequence[Task],
    grader: Grader,
    config: Ppo,
    *,
    held_out: Suite | None = None,
) -> dict[str, float]:
    """Run the loop from the run's newest checkpoint to its last step; policy and value model are tuned in place.

    Returns:
        The last step's metrics, and `num_tokens`: tokens sampled in all.
    """
    learner = ActorCritic(policy.model, critic, config)
    source, ledger = PromptStream(tasks, config.seed), Ledger()
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
    engine = policy.engine(
        slots=slots, length=length, dtype=config.sampler_dtype, seed=config.seed, inline=not waits(grader)
    )
    with engine, bench.progress("ppo", config.steps, start=learner.step) as progress:
        for step in range(learner.step, config.steps):
            engine.update_weights(policy.model, version=step)
            draw = source.draw(config.prompts_per_step)
            rolled = await roll_and_grade(
                engine, policy, draw, sampling, watched, seed=config.seed, max_failed=config.max_failed
            )
            filled = Filled(rolled, [], [draw])
            metrics = learner.learn(rolled) | sampled_metrics(filled)
            ledger.record([task.id for task in draw.tasks], epoch=draw.epoch)
            learner.num_sampled += tokens_of(filled)
            metrics["num_sampled"] = learner.num_sampled
            done = learner.step
            if held_out and config.evaluate_every and done % config.evaluate_every == 0:
                metrics["eval/accuracy"] = await held_out_accuracy(engine, policy, held_out, done)
            if config.kl_prompts and done == config.steps:
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


@recipe
def ppo(
    *,
    model: str,
    data: Path,
    grader: str = "number",
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 0,
    evaluation: tuple[Path, ...] = (),
    value: str = "policy",
    steps: int = 100,
    prompts_per_step: int = 64,
    group_size: int = 1,
    max_tokens: int = 256,
    lr: float = 3e-7,
    value_lr: float = 3e-7,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    warmup: float = 0.0,
    temperature: float = 1.0,
    epochs: int = 4,
    minibatches: int = 1,
    value_warmup: int = 0,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    whiten_advantages: bool = True,
    whiten_rewards: bool = False,
    beta: float = 0.05,
    kl_estimator: Literal["k1", "k2", "k3"] = "k1",
    kl_target: float | None = None,
    kl_gain: float = 0.1,
    eos_penalty: float = 0.0,
    entropy_coef: float = 0.0,
    kl_prompts: int = 32,
    max_failed: float = 0.05,
    checkpoint_every: int = 20,
    micro_tokens: int = 8192,
    slots: int = 256,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "ppo",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Reinforcement learning from a grader with a value model (PPO).

    Learning rate and KL default to Tülu 3's RLVR for 8B (arXiv 2411.15124), epochs, λ, clips and whitening to those of
    Huang et al. (arXiv 2403.17031); a small model made from nothing wants learning rates near 1e-4.

    Args:
        model: folder of the policy, or a Hugging Face name.
        data: prompts with reference answers; GSM8K's question and answer columns are known.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        columns: which columns to read, as `prompt=question,answer=solution`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        held_out: tasks kept apart and evaluated greedily every 20 steps.
        value: what the value model begins as: policy, scratch, or the folder of a reward model.
        steps: sampling steps.
        prompts_per_step: prompts per step.
        group_size: answers per prompt.
        max_tokens: new tokens per answer.
        lr: learning rate of the policy.
        value_lr: learning rate of the value model.
        schedule: course of both learning rates.
        warmup: below 1 a fraction of the updates, else updates.
        temperature: of sampling.
        epochs: passes over a step's answers.
        minibatches: optimiser steps per pass.
        value_warmup: first steps in which the value model alone learns.
        gamma: discount.
        lam: lambda of the advantage estimation.
        clip_low: epsilon below 1.
        clip_high: epsilon above 1.
        value_clip: how far a value may move in a step; 0: any way.
        whiten_advantages: to mean 0 and variance 1 over the step's tokens.
        whiten_rewards: to variance 1 over the step's tokens.
        beta: weight of every token's KL in its reward; the first one with `kl_target`.
        kl_estimator: of that KL.
        kl_target: adapt beta so that the KL is this, nats per answer.
        kl_gain: how fast it is adapted.
        eos_penalty: taken off the reward of an answer that did not end.
        entropy_coef: weight of the entropy bonus.
        kl_prompts: fixed prompts on which the KL to the start is measured at the end.
        max_failed: share of failed rollouts or grades that stops the run.
        checkpoint_every: steps between checkpoints.
        micro_tokens: tokens per packed micro-batch.
        slots: answers sampled at the same time.
        dtype: of the trainers' matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides the order of prompts and every sample.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options: dict[str, Any] = dict(locals())
    with open_workbench("ppo", options, runs=runs, resume=resume) as bench:
        policy = load_policy(model, device=device, template=template)
        judge = grader_from(grader)
        source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
        loaded = rows.load(
            data, kind="prompt", columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl"
        )
        bench.say(loaded.report.summary())
        tasks = [rows.to_task(row, chat=chat) for row in loaded.rows]
        tasks = without_evaluation(bench, tasks, evaluation, source)
        apart, kept = tasks[:held_out], tasks[held_out:]
        greedy = Sampling(
            max_tokens=max_tokens, temperature=0.0, stop_tokens=tuple(sorted(policy.renderer.stop_tokens))
        )
        suite = Suite("held-out", apart, greedy, judge) if apart else None
        settings = {key: options[key] for key in Ppo.__struct_fields__ if key in options}
        config = Ppo.from_dict({**settings, "value_clip": value_clip or None})
        critic = value_model(value, policy.model, seed=seed)
        metrics = asyncio.run(ppo_loop(bench, policy, critic, kept, judge, config, held_out=suite))
        tuned = policy.save(bench.run.path / "model")
        models.save_scored(critic, bench.run.path / "value_model", tokenizer=policy.tokenizer)
        bench.registry.add_run(bench.run)
        parent = bench.registry.add_artifact(policy.path, kind="model", name=str(model), storage="reference")
        card = bench.registry.add_artifact(
            tuned, kind="model", name=name, parents=[source.id, parent.id], run=bench.run.id, storage="reference"
        )
        if "kl_spent/per_answer" in metrics:
            bench.say(
                f"KL to the start, nats per answer: {metrics['kl_spent/per_answer']:.3f} "
                f"± {metrics['kl_spent/per_answer_error']:.3f} (standard error)"
            )
        bench.say(f"reward of the last step {metrics['reward']:.3f}; model {card.short()} in {tuned}")
        return bench.run.path
