"""From groups and their advantages to training examples. Credit is assigned before this door."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from posttrain.core import Example, RolloutError, StopReason, TokenSequence, Trajectory
from posttrain.rollout.group import Group

Advantage = float | Sequence[float] | None


def to_examples(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[Advantage]],
    *,
    keep_clipped: bool = True,
    keep_zero: bool = True,
) -> list[Example]:
    """One example for each trajectory that can be learned from.

    Left out are siblings whose rollout failed, whose grade failed (advantage None or NaN), or that wrote nothing;
    `example_metrics`, with the same arguments, counts them.

    The columns of each sequence, T numbers that are 0 where the policy did not write the token: `advantages`;
    `sampler_logprobs`, of the distribution that was sampled from; `policy_logprobs`, of the model itself at temperature
    1 without truncation. The last two are equal where sampling was at temperature 1 without truncation. Compare the
    trainer's logprobs with `policy_logprobs`; importance weights have `sampler_logprobs` in their denominator.

    Args:
        groups: a step's groups.
        advantages: of each group, for each sibling: one number for all its tokens, or T numbers, or None.
        keep_clipped: False leaves out trajectories that ran into max_tokens (DAPO's filter of over-long answers,
            arXiv 2503.14476).
        keep_zero: False leaves out trajectories whose advantages are all 0, which move nothing but the denominator.

    Raises:
        RolloutError: the advantages do not fit the groups, or one is infinite.
    """
    examples = []
    for group, trajectory, advantage in _pairs(groups, advantages):
        if _left_out(trajectory, advantage, keep_clipped, keep_zero) is not None:
            continue
        columns = {
            "advantages": _per_token(trajectory, advantage),
            "sampler_logprobs": trajectory.logprobs,
            "policy_logprobs": trajectory.policy_logprobs,
        }
        sequence = TokenSequence(tokens=trajectory.tokens, mask=trajectory.mask, columns=columns)
        scalars = {"weight_version": float(trajectory.weight_version)}
        examples.append(Example(id=trajectory.id, sequences=(sequence,), scalars=scalars, group=group.id))
    return examples


def example_metrics(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[Advantage]],
    *,
    keep_clipped: bool = True,
    keep_zero: bool = True,
) -> dict[str, float]:
    """How many trajectories `to_examples` takes (`examples/taken`) and leaves out (`examples/left_out_<reason>`)."""
    reasons = Counter(
        _left_out(trajectory, advantage, keep_clipped, keep_zero)
        for _, trajectory, advantage in _pairs(groups, advantages)
    )
    metrics = {"examples/taken": float(reasons[None])}
    for reason in ("failed", "ungraded", "empty", "clipped", "zero"):
        metrics[f"examples/left_out_{reason}"] = float(reasons[reason])
    return metrics


def _pairs(
    groups: Sequence[Group], advantages: Sequence[Sequence[Advantage]]
) -> list[tuple[Group, Trajectory, Advantage]]:
    if len(groups) != len(advantages):
        raise RolloutError(f"{len(groups)} groups, but advantages for {len(advantages)}")
    pairs: list[tuple[Group, Trajectory, Advantage]] = []
    for group, row in zip(groups, advantages, strict=True):
        if len(group.trajectories) != len(row):
            raise RolloutError(f"group {group.id!r}: {len(group.trajectories)} siblings, {len(row)} advantages")
        pairs.extend(
            (group, trajectory, advantage) for trajectory, advantage in zip(group.trajectories, row, strict=True)
        )
    return pairs


def _left_out(trajectory: Trajectory, advantage: Advantage, keep_clipped: bool, keep_zero: bool) -> str | None:
    """Why a trajectory is no example, or None where it is one."""
    if trajectory.failed():
        return "failed"
    if advantage is None or (isinstance(advantage, float) and math.isnan(advantage)):
        return "ungraded"
    if not any(trajectory.mask):
        return "empty"
    if not keep_clipped and trajectory.stop_reason is StopReason.LENGTH:
        return "clipped"
    if not keep_zero and not any(_per_token(trajectory, advantage)):
        return "zero"
    return None


def _per_token(trajectory: Trajectory, advantage: Advantage) -> tuple[float, ...]:
    """T advantages, 0 where the policy did not write the token."""
    num_tokens = len(trajectory.tokens)
    if isinstance(advantage, Sequence):
        if len(advantage) != num_tokens:
            raise RolloutError(f"trajectory {trajectory.id!r}: {num_tokens} tokens, {len(advantage)} advantages")
        values = advantage
    else:
        values = (float(advantage or 0.0),) * num_tokens
    column = tuple(float(value) if wrote else 0.0 for value, wrote in zip(values, trajectory.mask, strict=True))
    if not all(map(math.isfinite, column)):
        raise RolloutError(f"trajectory {trajectory.id!r}: an advantage is not a finite number")
    return column
