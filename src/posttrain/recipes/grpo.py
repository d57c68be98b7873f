"""GRPO and its relatives: sample siblings, grade them, and make the better ones likelier than the worse.

One step: a few prompts, G answers to each from the current policy; a grader scores them; an answer's advantage is its
score minus the mean of its siblings (over their standard deviation with `scale_rewards`, as in DeepSeekMath,
arXiv 2402.03300; without it Dr. GRPO, arXiv 2503.20783); the clipped surrogate moves the weights. Groups whose answers
are all equal teach nothing and are left out of the update, and counted. The KL to the starting model is measured, and
added to the loss where `beta` is above 0. `--variant` sets what a published variant does otherwise (`rl_settings`); the
loop is in `rl_loop`, its updates in `rl_learner`, its advantages in `rl_credit`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from posttrain import data as rows
from posttrain.core import Sampling, recipe
from posttrain.evaluate import Suite
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import load_policy
from posttrain.recipes.rl_credit import advantages_of, with_reference
from posttrain.recipes.rl_loop import grpo_loop, held_out_accuracy
from posttrain.recipes.rl_settings import (
    Advantage,
    Grpo,
    Mean,
    Ratio,
    SurrogateName,
    Variant,
    with_variant,
)
from posttrain.recipes.workbench import RUNS, open_workbench

__all__ = ["Grpo", "advantages_of", "grpo", "grpo_loop", "held_out_accuracy", "with_reference"]


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
    evaluation: tuple[Path, ...] = (),
    variant: Variant | None = None,
    steps: int = 100,
    prompts_per_step: int = 16,
    group_size: int = 8,
    max_tokens: int = 256,
    lr: float = 1e-6,
    warmup: float = 0.0,
    schedule: Literal["linear", "cosine", "constant"] = "constant",
    temperature: float = 1.0,
    advantage: Advantage | None = None,
    scale_rewards: bool | None = None,
    surrogate: SurrogateName | None = None,
    ratio: Ratio | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    beta: float | None = None,
    kl_estimator: Literal["k1", "k2", "k3"] | None = None,
    kl_in_reward: bool | None = None,
    kl_unbiased: bool | None = None,
    normalise: Mean | None = None,
    keep_zero: bool | None = None,
    importance_cap: float | None = None,
    importance_low: float | None = None,
    importance_bound: Literal["truncate", "mask"] | None = None,
    importance_level: Literal["token", "sequence", "geometric"] | None = None,
    stale_threshold: float | None = None,
    epochs: int | None = None,
    minibatches: int | None = None,
    entropy_coef: float | None = None,
    entropy_target: float | None = None,
    entropy_share: float | None = None,
    over_long_buffer: int | None = None,
    eos_penalty: float | None = None,
    mask_clipped: bool | None = None,
    dynamic_rounds: int | None = None,
    curriculum: bool = False,
    curriculum_low: float = 0.05,
    curriculum_high: float = 0.9,
    full_marks: float = 1.0,
    reference_every: int = 0,
    reference_mix: float = 1.0,
    kl_prompts: int = 32,
    kl_spent_every: int = 0,
    max_failed: float = 0.05,
    checkpoint_every: int = 20,
    micro_tokens: int = 8192,
    slots: int = 256,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "grpo",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Reinforcement learning from a grader with group-relative advantages.

    Defaults: Olmo 3's and DAPO's for what they share (no KL, clip-higher, token-level loss, lr 1e-6), without the
    standard deviation (Dr. GRPO); a small model made from nothing wants a learning rate near 1e-4. An option that is
    not given is the variant's.

    Args:
        model: folder of the policy, or a Hugging Face name.
        data: prompts with reference answers; GSM8K's question and answer columns are known.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        columns: which columns to read, as `prompt=question,answer=solution`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: tasks kept apart and evaluated greedily every 20 steps.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        variant: published settings to begin with: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, max_rl.
        steps: sampling steps.
        prompts_per_step: prompts per step.
        group_size: answers per prompt.
        max_tokens: new tokens per answer.
        lr: learning rate.
        warmup: below 1 a fraction of the steps, else steps.
        schedule: course of the learning rate.
        temperature: of sampling.
        advantage: how an answer is compared with others; `group` without a variant.
        scale_rewards: divide advantages by the group's standard deviation.
        surrogate: what is maximised: clip, cispo, sapo, vespo or reinforce.
        ratio: whose ratio is bounded: each token's, the sequence's mean, that with token gradients, or its product.
        clip_low: epsilon below 1; 0.2 without a variant.
        clip_high: epsilon above 1; 0.28 without a variant.
        dual_clip: bound on the ratio of tokens with negative advantage.
        beta: weight of the KL to the starting model; 0 without a variant.
        kl_estimator: of the KL penalty.
        kl_in_reward: take the KL off the reward, not into the loss.
        kl_unbiased: weigh the KL in the loss by the ratio.
        normalise: what the loss is a mean over; token without a variant.
        keep_zero: count answers without advantage in that mean.
        importance_cap: upper bound of the importance weights for the sampler's mismatch; 2 by default, 0: none.
        importance_low: lower bound of the importance weights.
        importance_bound: truncate weights to their bounds, or mask tokens out of bounds (IcePop).
        importance_level: weights of each token, of the sequence's product, or its geometric mean.
        stale_threshold: leave bad answers out that the policy has left behind by so many nats per token.
        epochs: passes over a step's samples.
        minibatches: optimiser steps per pass.
        entropy_coef: weight of the entropy bonus; the first one with `entropy_target`.
        entropy_target: adapt the bonus so that the entropy stays above so many nats per token.
        entropy_share: share of tokens, those of highest entropy, that learn.
        over_long_buffer: tokens before max_tokens over which a penalty grows to 1.
        eos_penalty: taken off the reward of an answer that did not end.
        mask_clipped: leave answers that did not end out of the loss.
        dynamic_rounds: rounds in which groups without variance are replaced by others; 0: they are not.
        curriculum: favour prompts that are sometimes solved.
        curriculum_low: lowest running pass rate that is favoured.
        curriculum_high: highest running pass rate that is favoured.
        full_marks: score that counts as solved.
        reference_every: steps after which the reference of the KL becomes the policy; 0: never.
        reference_mix: how much of it does.
        kl_prompts: fixed prompts on which the KL to the start is measured at the end.
        kl_spent_every: and every so many steps.
        max_failed: share of failed rollouts or grades that stops the run.
        checkpoint_every: steps between checkpoints.
        micro_tokens: tokens per packed micro-batch.
        slots: answers sampled at the same time.
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
        tasks = without_evaluation(bench, tasks, evaluation, source)
        apart, kept = tasks[:held_out], tasks[held_out:]
        greedy = Sampling(
            max_tokens=max_tokens, temperature=0.0, stop_tokens=tuple(sorted(policy.renderer.stop_tokens))
        )
        suite = Suite("held-out", apart, greedy, judge) if apart else None
        config = with_variant(variant, options)
        metrics = asyncio.run(grpo_loop(bench, policy, kept, judge, config, held_out=suite))
        tuned = policy.save(bench.run.path / "model")
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
