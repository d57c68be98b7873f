"""How far a tuned model has moved from its start: the KL divergence on a fixed set of prompts, with its standard error.

What a run has gained should be read beside what it has spent (Gao et al., https://arxiv.org/abs/2210.10760). The policy
answers the same prompts with the same seeds at every measurement, at temperature 1 without truncation; both models
then score the answers, in float32 and by the same forward pass.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.core import RolloutError, SampleTokens, Sampling, Task, Trajectory, content_hash, derive_seed
from posttrain.models import CausalAttend, Decoder, adapters_off, packed_positions, token_stats
from posttrain.objectives import kl_estimate
from posttrain.recipes.policy import Policy
from posttrain.rollout import run_groups
from posttrain.train import pack


class KlSpent(NamedTuple):
    """Estimates of KL(policy ‖ reference), in nats, with standard errors that take answers to one prompt together."""

    k1: float  # per token, unbiased
    k1_error: float
    k3: float  # per token, unbiased and never negative
    k3_error: float
    per_answer: float  # k1 summed over each answer: what the literature calls the KL of a policy
    per_answer_error: float
    num_prompts: int
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """`kl_spent/…`."""
        return {f"kl_spent/{name}": float(value) for name, value in self._asdict().items()}


def fixed_prompts(tasks: Sequence[Task], num: int) -> list[Task]:
    """The same `num` tasks of a data set for every run, seed and order: those whose ids have the smallest hashes."""
    return sorted(tasks, key=lambda task: content_hash(["kl_spent", task.id]))[:num]


async def kl_spent(
    policy: Policy,
    reference: Decoder | None,
    prompts: Sequence[Task],
    *,
    samples: int = 4,
    max_tokens: int = 256,
    seed: int = 0,
    sampler: SampleTokens | None = None,
    prompt_tokens: Callable[[Task], Sequence[int]] | None = None,
    micro_tokens: int = 8192,
) -> KlSpent:
    """Measure KL(policy ‖ reference) on the policy's own answers to some prompts.

    Args:
        policy: the tuned model.
        reference: the model it began as (or any with the same vocabulary); not changed. None: the policy without its
            adapters.
        prompts: the fixed set; see `fixed_prompts`.
        samples: answers per prompt.
        max_tokens: new tokens per answer.
        seed: of the answers; keep it, and the measurements of a run are comparable.
        sampler: an engine with the policy's weights; None makes one for this measurement.
        prompt_tokens: of a task; None: as the policy's renderer has them.
        micro_tokens: tokens per packed row of the forward passes.

    Raises:
        RolloutError: no answer could be sampled.
    """
    stops = tuple(sorted(policy.renderer.stop_tokens))
    sampling = Sampling(max_tokens=max_tokens, n=samples, stop_tokens=stops)
    derived, tokens_of = derive_seed(seed, "kl_spent"), prompt_tokens or policy.renderer.prompt
    if sampler is None:
        longest = max((len(tokens_of(task)) for task in prompts), default=1)
        length = min(longest + max_tokens, policy.model.config.max_positions)
        slots = max(1, min(64, len(prompts) * samples))
        with policy.engine(slots=slots, length=length, seed=seed, inline=True) as engine:
            groups = await run_groups(engine, prompts, sampling, prompt_tokens=tokens_of, seed=derived, step=0)
    else:
        groups = await run_groups(sampler, prompts, sampling, prompt_tokens=tokens_of, seed=derived, step=0)
    answers = [t for group in groups for t in group.trajectories if not t.failed() and any(t.mask)]
    if not answers:
        causes = {t.error or t.stop_reason.value for group in groups for t in group.trajectories}
        raise RolloutError(f"KL spent: none of {len(groups)} prompts was answered: {'; '.join(sorted(causes)[:3])}")
    own = _logprobs(policy.model, answers, micro_tokens)
    with adapters_off(policy.model) if reference is None else nullcontext():
        theirs = _logprobs(reference or policy.model, answers, micro_tokens)
    return _estimate(answers, own, theirs)


def kl_spent_sync(
    policy: Policy,
    reference: Decoder | None,
    prompts: Sequence[Task],
    *,
    samples: int = 4,
    max_tokens: int = 256,
    seed: int = 0,
    prompt_tokens: Callable[[Task], Sequence[int]] | None = None,
    micro_tokens: int = 8192,
) -> KlSpent:
    """`kl_spent` where no event loop runs."""
    return asyncio.run(
        kl_spent(
            policy,
            reference,
            prompts,
            samples=samples,
            max_tokens=max_tokens,
            seed=seed,
            prompt_tokens=prompt_tokens,
            micro_tokens=micro_tokens,
        )
    )


@torch.no_grad()
def _logprobs(model: Decoder, answers: Sequence[Trajectory], micro_tokens: int) -> list[Tensor]:
    """Logprob of every token that the policy wrote, by answer; float64."""
    device = model.embed.weight.device
    found: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    for members in pack([len(answer.tokens) for answer in answers], micro_tokens):
        lengths = [len(answers[index].tokens) for index in members]
        tokens_N = torch.tensor([token for index in members for token in answers[index].tokens], device=device)
        mask_N = torch.tensor([wrote for index in members for wrote in answers[index].mask], device=device)
        hidden_ND = model.hidden(
            tokens_N[None], positions_BT=packed_positions(lengths, device), attend=CausalAttend(lengths)
        )[0]
        targets_P = mask_N.nonzero()[:, 0]
        logprobs_P = token_stats(model, hidden_ND[targets_P - 1], tokens_N[targets_P]).logprobs_N.double().cpu()
        sizes = [answers[index].num_completion_tokens() for index in members]
        found |= dict(zip(members, torch.split(logprobs_P, sizes), strict=True))
    model.train(was_training)
    return [found[index] for index in range(len(answers))]


def _estimate(answers: Sequence[Trajectory], own: Sequence[Tensor], theirs: Sequence[Tensor]) -> KlSpent:
    sums: dict[str, list[float]] = {}  # of each prompt: tokens, answers, k1, k3
    for answer, own_N, their_N in zip(answers, own, theirs, strict=True):
        row = sums.setdefault(answer.group, [0.0, 0.0, 0.0, 0.0])
        k1, k3 = (float(kl_estimate(own_N, their_N, estimator).sum()) for estimator in ("k1", "k3"))
        for place, value in enumerate((float(len(own_N)), 1.0, k1, k3)):
            row[place] += value
    tokens, answered, k1s, k3s = (list(column) for column in zip(*sums.values(), strict=True))
    (k1, k1_error), (k3, k3_error) = _ratio(k1s, tokens), _ratio(k3s, tokens)
    per_answer, per_answer_error = _ratio(k1s, answered)
    return KlSpent(k1, k1_error, k3, k3_error, per_answer, per_answer_error, len(sums), int(sum(tokens)))


def _ratio(totals: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Σ totals / Σ counts over prompts, and its standard error (delta method; NaN for a single prompt)."""
    num = len(totals)
    mean = math.fsum(totals) / math.fsum(counts)
    if num < 2:
        return mean, math.nan
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return mean, math.sqrt(squares * num / (num - 1)) / math.fsum(counts)
