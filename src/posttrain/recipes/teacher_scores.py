"""A teacher's word on every token that a student sampled: credit for on-policy distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from posttrain.core import UsageError
from posttrain.recipes.policy import Policy
from posttrain.recipes.teachers import RemoteTeacher
from posttrain.rollout import Group, to_examples
from posttrain.train import TrainConfig, Trainer, nll_objective


class Scorer:
    """A teacher that says how likely it finds what is there: from a folder, or behind an endpoint."""

    def __init__(
        self,
        teacher: Policy | RemoteTeacher,
        *,
        micro_tokens: int,
        dtype: Literal["float32", "bfloat16"],
        temperature: float,
    ) -> None:
        if isinstance(teacher, RemoteTeacher) and temperature != 1:
            raise UsageError(f"an endpoint tells logprobs at temperature 1: sample there too, not at {temperature}")
        self.remote = teacher if isinstance(teacher, RemoteTeacher) else None
        self.local: Trainer | None = None
        if isinstance(teacher, Policy):
            settings = TrainConfig(micro_tokens=micro_tokens, dtype=dtype, temperature=temperature)
            self.local = Trainer(teacher.model.requires_grad_(True), settings, nll_objective)

    async def advantages(self, groups: Sequence[Group], clip: float | None) -> list[list[list[float] | None]]:
        """log teacher − log student of every token, T numbers for each trajectory; None where there are none."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        if self.remote is not None:
            told = await self.remote.score(trajectories)
        else:
            assert self.local is not None
            live = [trajectory for trajectory in trajectories if any(trajectory.mask)]
            zeros = [(0.0,) * len(group.trajectories) for group in groups]
            examples = to_examples(groups, zeros)
            scored = dict(zip((e.id for e in examples), self.local.logprobs(examples), strict=True)) if live else {}
            told = [list(scored[t.id][0]) if t.id in scored else None for t in trajectories]
        flat = [
            None
            if own is None
            else [
                _clipped(theirs - mine, clip) if wrote else 0.0
                for theirs, mine, wrote in zip(own, trajectory.logprobs, trajectory.mask, strict=True)
            ]
            for own, trajectory in zip(told, trajectories, strict=True)
        ]
        rest = iter(flat)
        return [[next(rest) for _ in group.trajectories] for group in groups]


def _clipped(value: float, clip: float | None) -> float:
    return value if clip is None else max(-clip, min(clip, value))


def mean_reverse_kl(groups: Sequence[Group], advantages: Sequence[Sequence[list[float] | None]]) -> float:
    """Mean over sampled tokens of log student − log teacher, nats: an unbiased estimate where nothing was clipped."""
    total, count = 0.0, 0
    for group, own in zip(groups, advantages, strict=True):
        for trajectory, values in zip(group.trajectories, own, strict=True):
            if values is not None:
                total, count = total - math.fsum(values), count + trajectory.num_completion_tokens()
    return total / max(count, 1)
