"""The learning half of the loop: from graded groups to optimiser steps, and what must outlive a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from posttrain import objectives
from posttrain.core import CheckpointError, Example, generator
from posttrain.models import Decoder, token_stats
from posttrain.recipes.rl_credit import advantages_of, spent_on, with_column, with_columns_of, with_reference
from posttrain.recipes.rl_settings import Grpo
from posttrain.rollout import PromptSource, Rolled, example_metrics, to_examples
from posttrain.train import (
    Batch,
    Ledger,
    Objective,
    Pass,
    Scores,
    Surrogate,
    TrainConfig,
    Trainer,
    hidden_states,
    load_latest,
    policy_objective,
    save_checkpoint,
)

SURROGATES: dict[str, Callable[..., Any]] = {
    "cispo": objectives.cispo_surrogate,
    "sapo": objectives.sapo_surrogate,
    "vespo": objectives.vespo_surrogate,
    "reinforce": objectives.reinforce_surrogate,
}


class Learner:
    """A policy, what it is held near to, and how far the run has come."""

    def __init__(self, model: Decoder, config: Grpo) -> None:
        self.config = config
        train = train_config(config)
        self.start = copy.deepcopy(model)  # what the KL that was spent is measured against
        self.reference = Trainer(
            copy.deepcopy(model) if config.reference_every else self.start, train, objective_of(config, 0.0)
        )
        self.trainer = Trainer(model, train, objective_of(config, 0.0))
        self.step = 0  # sampling steps done
        self.num_sampled = 0.0  # tokens that the policy wrote
        self.entropy_coef = config.entropy_coef
        self.entropy: float | None = None  # of the last update

    def learn(self, rolled: Sequence[Rolled]) -> dict[str, float]:
        """One step's updates.

        Returns:
            The trainer's metrics, means over the updates where there are several, and counts of examples.
        """
        config = self.config
        groups = [one.group for one in rolled]
        grades = [grade for one in rolled for grade in one.grades]
        scored = self._scored(rolled) if config.kl_in_reward else []
        token_kl = spent_on(scored, config) if config.kl_in_reward else None
        advantages = advantages_of(groups, grades, config, token_kl=token_kl)
        keep = {"keep_zero": config.keeps_zero, "keep_clipped": not config.mask_clipped}
        examples = to_examples(groups, advantages, **keep) or to_examples(groups, advantages)
        if config.kl_in_reward:
            examples = with_columns_of(examples, scored, "ref_logprobs", "old_logprobs")
        else:
            if config.beta > 0 or (config.kl_every and self.step % config.kl_every == 0):
                examples = with_reference(examples, self.reference)
            if config.updates > 1:
                examples = with_column(examples, "old_logprobs", self.trainer)
        if config.entropy_share < 1:
            examples = self._forks_only(examples)
        found = []
        for epoch in range(config.epochs):
            for part in minibatches(examples, config.minibatches, config.seed, self.step, epoch):
                found.append(self._update(part))
        self.step += 1
        if config.reference_every and self.step % config.reference_every == 0:
            self._move_reference()
        metrics = found[0] if len(found) == 1 else merged(found)
        if token_kl is not None:
            metrics["kl_in_reward"] = fmean(sum(kl_T) for kl_T in token_kl.values())
        return metrics | example_metrics(groups, advantages, **keep)

    def resume(self, folder: Path, source: PromptSource, ledger: Ledger, report: Callable[[str], None]) -> bool:
        """Go on from the newest checkpoint of a folder, if there is one: weights, counters, prompts, reference."""
        resumed = load_latest(folder, self.trainer, ledger=ledger, report=report)
        if resumed is None:
            return False
        extra = resumed.extra
        self.step = int(extra.get("step", self.trainer.num_steps))
        self.num_sampled = float(extra["num_sampled"])
        self.entropy_coef = float(extra.get("entropy_coef", self.entropy_coef))
        self.entropy = extra.get("entropy")
        if "source" in extra:
            source.restore(extra["source"])
        else:  # written before prompts were drawn from a source: every step was one full draw
            for _ in range(self.step):
                source.draw(self.config.prompts_per_step)
        if self.config.reference_every:
            beside = Path(resumed.checkpoint.path) / "reference"
            if load_latest(beside, self.reference) is None:
                raise CheckpointError(f"{beside}: the reference is missing, and this run moves it")
        return True

    def save(self, folder: Path, source: PromptSource, ledger: Ledger) -> None:
        """Write all that `resume` reads."""
        extra = {
            "num_sampled": self.num_sampled,
            "step": self.step,
            "entropy_coef": self.entropy_coef,
            "entropy": self.entropy,
            "source": source.to_dict(),
        }
        beside = self._save_reference if self.config.reference_every else None
        save_checkpoint(folder, self.trainer, ledger=ledger, extra=extra, export=beside)

    def _update(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimiser step with the entropy coefficient as it stands, which then moves on."""
        config, coef = self.config, self.entropy_coef
        if config.entropy_target is not None:
            coef = objectives.active_entropy_coef(coef, self.entropy, target=config.entropy_target)
        self.trainer.objective = objective_of(config, coef)
        metrics = self.trainer.step(examples)
        self.entropy = metrics["entropy"]
        if config.entropy_target is not None:
            metrics["entropy_coef"] = coef
            self.entropy_coef = objectives.adapt_entropy_coef(
                self.entropy_coef,
                self.entropy,
                target=config.entropy_target,
                delta=config.entropy_delta,
                high=config.entropy_max,
            )
        return metrics

    def _scored(self, rolled: Sequence[Rolled]) -> list[Example]:
        """All answers with the policy's and the reference's logprobs, for the KL that they have spent."""
        groups = [one.group for one in rolled]
        zeros = [[0.0] * len(group.trajectories) for group in groups]
        examples = with_column(to_examples(groups, zeros), "old_logprobs", self.trainer)
        return with_reference(examples, self.reference)

    def _forks_only(self, examples: Sequence[Example]) -> list[Example]:
        """A column `policy_weights`: 1 at the step's tokens of highest entropy, else 0."""
        judge = Trainer(self.trainer.model, self.trainer.config, self.trainer.objective, forward=entropy_forward)
        measured = with_column(examples, "policy_weights", judge)
        entropies = [
            entropy
            for example in measured
            for sequence in example.sequences
            for entropy, target in zip(sequence.columns["policy_weights"], sequence.mask, strict=True)
            if target
        ]
        kept = iter(objectives.high_entropy_mask(torch.tensor(entropies), self.config.entropy_share).tolist())
        return [
            example.replace(
                sequences=tuple(
                    sequence.replace(
                        columns={
                            **sequence.columns,
                            "policy_weights": tuple(float(target and next(kept)) for target in sequence.mask),
                        }
                    )
                    for sequence in example.sequences
                )
            )
            for example in measured
        ]

    @torch.no_grad()
    def _move_reference(self) -> None:
        """reference ← mix · policy + (1 − mix) · reference (TR-DPO, https://arxiv.org/abs/2404.09656, equation 4)."""
        for theirs, own in zip(self.reference.model.parameters(), self.trainer.model.parameters(), strict=True):
            theirs.lerp_(own, self.config.reference_mix)

    def _save_reference(self, folder: Path) -> None:
        save_checkpoint(folder / "reference", self.reference, keep=1)


def train_config(config: Grpo) -> TrainConfig:
    """How the trainer steps."""
    return TrainConfig(
        lr=config.lr,
        warmup=config.warmup,
        schedule=config.schedule,
        total_steps=config.steps * config.updates,
        betas=(0.9, 0.95),
        micro_tokens=config.micro_tokens,
        dtype=config.dtype,
        temperature=config.temperature,
        entropy=True,
        seed=config.seed,
    )


def objective_of(config: Grpo, entropy_coef: float) -> Objective:
    """The loss that the settings describe."""
    surrogate: Surrogate | None = SURROGATES.get(config.surrogate)
    if config.surrogate == "cispo":
        surrogate = partial(objectives.cispo_surrogate, clip_high=config.clip_high)
    return policy_objective(
        ratio=config.ratio,
        surrogate=surrogate,
        normalise=config.normalise,
        max_length=config.max_tokens,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        importance_cap=config.importance_cap,
        importance_low=config.importance_low,
        importance_bound=config.importance_bound,
        importance_level=config.importance_level,
        stale_threshold=config.stale_threshold,
        kl_coef=config.kl_in_loss,
        kl_estimator=config.kl_estimator,
        kl_unbiased=config.kl_unbiased,
        entropy_coef=entropy_coef,
    )


def entropy_forward(model: Decoder, batch: Batch, row: Pass) -> Scores:
    """The entropy of the distribution at every target, for `Trainer.logprobs`."""
    before_PD = hidden_states(model, row).index_select(0, batch.target_P - 1)
    stats = token_stats(model, before_PD, batch.targets_P, temperature=row.temperature, entropy=True)
    assert stats.entropy_N is not None, "asked for"
    return Scores(stats.entropy_N)


def minibatches(examples: Sequence[Example], num: int, seed: int, step: int, epoch: int) -> list[list[Example]]:
    """The examples in at most `num` parts of about as many groups each; siblings stay together."""
    if num == 1:
        return [list(examples)]
    names = list(dict.fromkeys(example.group for example in examples))
    generator(seed, "minibatches", step, epoch).shuffle(names)
    bounds = [round(len(names) * part / num) for part in range(num + 1)]
    parts = [set(names[low:high]) for low, high in pairwise(bounds) if high > low]
    return [[example for example in examples if example.group in part] for part in parts]


def merged(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over a step's updates; of counters the last, of extremes the extreme."""
    metrics = {}
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one[name] for one in found if name in one]
        if name in ("lr", "num_tokens"):
            metrics[name] = values[-1]
        elif name in ("num_targets", "num_examples", "num_empty_examples", "num_micro_batches", "step_s"):
            metrics[name] = sum(values)
        elif name.endswith("/max"):
            metrics[name] = max(values)
        elif name.endswith("/min"):
            metrics[name] = min(values)
        else:
            metrics[name] = fmean(values)
    return {**metrics, "num_updates": float(len(found))}
