"""The learning half of PPO: a policy and a value model, credit token by token, and what must outlive a kill.

N tokens that the policy wrote in a step, answers end to end; S answers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from posttrain import models, objectives
from posttrain.core import CheckpointError, Config, Example, ModelError, StopReason, doc
from posttrain.models import Decoder, ScoredDecoder
from posttrain.recipes.rl_credit import with_column, with_reference
from posttrain.recipes.rl_learner import merged, minibatches
from posttrain.rollout import PromptSource, Rolled, example_metrics, to_examples
from posttrain.train import (
    Ledger,
    TrainConfig,
    Trainer,
    load_latest,
    policy_objective,
    save_checkpoint,
    value_forward,
    value_objective,
)


class Ppo(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    steps: Annotated[int, doc("sampling steps", ge=1)]
    prompts_per_step: Annotated[int, doc("prompts per step", ge=1)]
    max_tokens: Annotated[int, doc("new tokens per answer", ge=1)]
    lr: Annotated[float, doc("learning rate of the policy")]
    value_lr: Annotated[float, doc("learning rate of the value model")]
    group_size: Annotated[int, doc("answers per prompt", ge=1)] = 1
    schedule: Annotated[Literal["linear", "cosine", "constant"], doc("course of both learning rates")] = "constant"
    warmup: Annotated[float, doc("below 1 a fraction of the updates, else updates")] = 0.0
    temperature: Annotated[float, doc("of sampling, and of the policy in the loss", gt=0)] = 1.0
    epochs: Annotated[int, doc("passes over a step's samples", ge=1)] = 4
    minibatches: Annotated[int, doc("optimiser steps per pass", ge=1)] = 1
    value_warmup: Annotated[int, doc("first steps in which the value model alone learns", ge=0)] = 0
    gamma: Annotated[float, doc("discount", ge=0, le=1)] = 1.0
    lam: Annotated[float, doc("lambda of the advantage estimation", ge=0, le=1)] = 0.95
    clip_low: Annotated[float, doc("epsilon below 1")] = 0.2
    clip_high: Annotated[float, doc("epsilon above 1")] = 0.2
    value_clip: Annotated[float | None, doc("how far a value may move in a step; None: any way")] = 0.2
    whiten_advantages: Annotated[bool, doc("to mean 0 and variance 1 over the step's tokens")] = True
    whiten_rewards: Annotated[bool, doc("to variance 1 over the step's tokens, mean kept")] = False
    beta: Annotated[float, doc("weight of every token's KL in its reward; the first one with kl_target", ge=0)] = 0.05
    kl_estimator: Annotated[Literal["k1", "k2", "k3"], doc("of that KL")] = "k1"
    kl_target: Annotated[float | None, doc("adapt beta so that the KL is this, nats per answer")] = None
    kl_gain: Annotated[float, doc("how fast beta is adapted", ge=0)] = 0.1
    eos_penalty: Annotated[float, doc("taken off the reward of an answer that did not end", ge=0)] = 0.0
    entropy_coef: Annotated[float, doc("weight of the entropy bonus", ge=0)] = 0.0
    importance_cap: Annotated[float | None, doc("truncated importance weights for sampler mismatch")] = 2.0
    max_failed: Annotated[float, doc("share of failed rollouts or grades that stops the run")] = 0.05
    evaluate_every: Annotated[int, doc("steps between evaluations on the held-out tasks; 0: never", ge=0)] = 20
    checkpoint_every: Annotated[int, doc("steps between checkpoints", ge=1)] = 20
    kl_prompts: Annotated[int, doc("fixed prompts on which the KL to the start is measured at the end", ge=0)] = 0
    micro_tokens: Annotated[int, doc("tokens per packed micro-batch", ge=1)] = 8192
    dtype: Annotated[Literal["float32", "bfloat16"], doc("of the trainers' matrix products")] = "bfloat16"
    sampler_dtype: Annotated[Literal["float32", "bfloat16"], doc("of the sampler's weights")] = "float32"
    slots: Annotated[int, doc("answers sampled at the same time", ge=1)] = 256
    seed: Annotated[int, doc("decides the order of prompts and every sample")] = 0


def value_model(origin: str, policy: Decoder, *, seed: int = 0) -> ScoredDecoder:
    """A value model for a policy.

    Args:
        origin: "policy" (the policy's trunk, a head that says 0), "scratch" (fresh weights of the same shape), or the
            folder of a reward model of the same vocabulary, whose judgement it begins with.
        policy: not changed.
        seed: of fresh weights.

    Raises:
        ModelError: the folder's model has another vocabulary, or fewer positions than the policy.
    """
    device = policy.embed.weight.device
    if origin == "policy":
        return ScoredDecoder(copy.deepcopy(policy), zero=True)
    if origin == "scratch":
        return ScoredDecoder(Decoder.random(policy.config, seed=seed, device=device), seed=seed)
    critic = models.load_scored(origin, device=device, seed=seed, zero=True)
    ours, theirs = policy.config, critic.config
    if theirs.vocab_size != ours.vocab_size or theirs.max_positions < ours.max_positions:
        raise ModelError(
            f"{origin}: a value model of {theirs.vocab_size} tokens and {theirs.max_positions} positions for a policy "
            f"of {ours.vocab_size} and {ours.max_positions}: take one trained from the same base"
        )
    return critic


class ActorCritic:
    """Two trainers, the reference, the KL coefficient, and how far the run has come."""

    def __init__(self, policy: Decoder, critic: ScoredDecoder, config: Ppo) -> None:
        self.config = config
        objective = policy_objective(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            entropy_coef=config.entropy_coef,
        )
        self.start = copy.deepcopy(policy)
        self.reference = Trainer(self.start, self._train(config.lr), objective)
        self.policy = Trainer(policy, self._train(config.lr), objective)
        self.critic = Trainer(
            critic, self._train(config.value_lr), value_objective(clip=config.value_clip), forward=value_forward
        )
        self.step = 0
        self.num_sampled = 0.0
        self.kl_coef = config.beta

    def learn(self, rolled: Sequence[Rolled]) -> dict[str, float]:
        """Credit, then epochs of minibatches for both models.

        Returns:
            The policy's metrics under their names, the value model's under `value/…` and `val/…`, and those of
            `assign_credit`; means over the updates.
        """
        groups = [one.group for one in rolled]
        graded = [[None if grade.score is None else 0.0 for grade in one.grades] for one in rolled]
        examples = self._scored(to_examples(groups, graded))
        answers = {
            t.id: (t, grade) for one in rolled for t, grade in zip(one.group.trajectories, one.grades, strict=True)
        }
        scores, ended = [], []
        for example in examples:
            trajectory, grade = answers[example.id]
            scores.append(math.nan if grade.score is None else grade.score)
            ended.append(trajectory.stop_reason is not StopReason.LENGTH)
        scores_S = objectives.missing_eos_penalty(
            torch.tensor(scores, dtype=torch.float64), torch.tensor(ended), self.config.eos_penalty
        )
        examples, credit = assign_credit(examples, scores_S, self.config, self.kl_coef)
        policy_metrics, value_metrics = [], []
        for epoch in range(self.config.epochs):
            for part in minibatches(examples, self.config.minibatches, self.config.seed, self.step, epoch):
                if self.step >= self.config.value_warmup:
                    policy_metrics.append(self.policy.step(part))
                value_metrics.append(self.critic.step(part))
        credit["objective/kl_coef"] = self.kl_coef
        if self.config.kl_target is not None:
            self.kl_coef = objectives.adapt_kl_coef(
                self.kl_coef, credit["objective/kl"], target=self.config.kl_target, gain=self.config.kl_gain
            )
        self.step += 1
        value = {name if name.startswith("val/") else f"value/{name}": v for name, v in merged(value_metrics).items()}
        return (merged(policy_metrics) if policy_metrics else {}) | value | credit | example_metrics(groups, graded)

    def resume(self, folder: Path, source: PromptSource, ledger: Ledger, report: Callable[[str], None]) -> bool:
        """Go on from the newest checkpoint of a folder, if there is one: both models, counters, prompts."""
        resumed = load_latest(folder, self.policy, ledger=ledger, report=report)
        if resumed is None:
            return False
        beside = Path(resumed.checkpoint.path) / "critic"
        if load_latest(beside, self.critic) is None:
            raise CheckpointError(f"{beside}: the value model is missing: is this the checkpoint of another recipe?")
        self.step = int(resumed.extra["step"])
        self.num_sampled = float(resumed.extra["num_sampled"])
        self.kl_coef = float(resumed.extra["kl_coef"])
        source.restore(resumed.extra["source"])
        return True

    def save(self, folder: Path, source: PromptSource, ledger: Ledger) -> None:
        """Write all that `resume` reads; the value model's checkpoint lies in the policy's, hashed with it."""
        extra = {
            "step": self.step,
            "num_sampled": self.num_sampled,
            "kl_coef": self.kl_coef,
            "source": source.to_dict(),
        }
        save_checkpoint(
            folder,
            self.policy,
            ledger=ledger,
            extra=extra,
            export=self._save_critic,
        )

    def _save_critic(self, folder: Path) -> None:
        save_checkpoint(folder / "critic", self.critic, keep=1)

    def _scored(self, examples: Sequence[Example]) -> list[Example]:
        """With what policy, reference and value model say of every token before the first update."""
        examples = with_column(examples, "old_logprobs", self.policy)
        return with_column(with_reference(examples, self.reference), "old_values", self.critic)

    def _train(self, lr: float) -> TrainConfig:
        config = self.config
        return TrainConfig(
            lr=lr,
            warmup=config.warmup,
            schedule=config.schedule,
            total_steps=config.steps * config.epochs * config.minibatches,
            betas=(0.9, 0.95),
            micro_tokens=config.micro_tokens,
            dtype=config.dtype,
            temperature=config.temperature,
            entropy=True,
            seed=config.seed,
        )


def assign_credit(
    examples: Sequence[Example], scores_S: Tensor, config: Ppo, kl_coef: float
) -> tuple[list[Example], dict[str, float]]:
    """Rewards token by token, advantages and returns.

    Args:
        examples: one answer each, with the columns `old_logprobs`, `ref_logprobs` and `old_values`.
        scores_S: what each answer is worth, penalties taken off.
        config: discount, lambda, whitening, estimator of the KL.
        kl_coef: weight of the KL as it stands.

    Returns:
        The examples with the columns `advantages` and `returns`; and `objective/kl` (k1 summed over an answer, mean
        over answers, nats), `objective/scores`, `objective/non_score_reward`, `objective/rlhf_reward`,
        `val/explained_variance` and `advantages/std` (before whitening).
    """
    own_N, ref_N, values_N = (_flat(examples, name) for name in ("old_logprobs", "ref_logprobs", "old_values"))
    lengths = [example.num_targets() for example in examples]
    sequence_N = torch.arange(len(examples)).repeat_interleave(torch.tensor(lengths))
    rewards_N = objectives.token_rewards(
        scores_S,
        sequence_N,
        logprobs_N=own_N,
        ref_logprobs_N=ref_N,
        kl_coef=kl_coef,
        kl_estimator=config.kl_estimator,
    )
    if config.whiten_rewards:
        rewards_N = objectives.whiten(rewards_N, shift_mean=False)
    advantages_N, returns_N = objectives.gae(
        rewards_N, values_N, sequence_N, len(examples), gamma=config.gamma, lam=config.lam
    )
    kl = float(objectives.kl_estimate(own_N, ref_N, "k1").sum()) / len(examples)
    paid = -kl_coef * float(objectives.kl_estimate(own_N, ref_N, config.kl_estimator).sum()) / len(examples)
    metrics = {
        "objective/kl": kl,
        "objective/scores": float(scores_S.mean()),
        "objective/non_score_reward": paid,
        "objective/rlhf_reward": float(scores_S.mean()) + paid,
        "val/explained_variance": float(objectives.explained_variance(values_N, returns_N)),
        "advantages/std": float(advantages_N.std(correction=0)),
    }
    if config.whiten_advantages:
        advantages_N = objectives.whiten(advantages_N)
    credited = _with_flat(examples, {"advantages": advantages_N, "returns": returns_N})
    return credited, metrics


def _flat(examples: Sequence[Example], name: str) -> Tensor:
    """A column's values at the targets, answers end to end; float64."""
    values = [
        value
        for example in examples
        for sequence in example.sequences
        for value, target in zip(sequence.columns[name], sequence.mask, strict=True)
        if target
    ]
    return torch.tensor(values, dtype=torch.float64)


def _with_flat(examples: Sequence[Example], columns: dict[str, Tensor]) -> list[Example]:
    """The inverse of `_flat`."""
    rest: dict[str, Iterator[float]] = {name: iter(values_N.tolist()) for name, values_N in columns.items()}

    def spread(mask: Sequence[bool]) -> dict[str, tuple[float, ...]]:
        return {name: tuple(next(values) if target else 0.0 for target in mask) for name, values in rest.items()}

    return [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={**sequence.columns, **spread(sequence.mask)})
                for sequence in example.sequences
            )
        )
        for example in examples
    ]
