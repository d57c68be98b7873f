"""Metrics of a step's rollouts, under the names that TRL's GRPO trainer uses."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from posttrain.core import StopReason
from posttrain.rollout.group import Group


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths, clipping, tokens and failures.

    Returns:
        `completions/{mean,min,max}_length`: tokens that the policy wrote, of rollouts that did not fail.
        `completions/clipped_ratio`: share of those that ran into max_tokens.
        `completions/{mean,min,max}_terminated_length`: lengths of those that ended by themselves; 0 where none did.
        `num_tokens`: tokens of this step, prompts and completions, failed ones too.
        `rollout/failed` and `rollout/num`: counts of trajectories. `rollout/seconds`: the slowest one.
        `rollout/weight_version_spread`: newest weight version that wrote a token, less the oldest.
        What has no trajectory to speak of is left out.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    finished = [trajectory for trajectory in trajectories if not trajectory.failed()]
    metrics: dict[str, float] = {
        "num_tokens": float(sum(len(trajectory.tokens) for trajectory in trajectories)),
        "rollout/num": float(len(trajectories)),
        "rollout/failed": float(len(trajectories) - len(finished)),
    }
    if trajectories:
        metrics["rollout/seconds"] = max(trajectory.seconds for trajectory in trajectories)
    if finished:
        lengths = [trajectory.num_completion_tokens() for trajectory in finished]
        terminated = [
            length
            for length, trajectory in zip(lengths, finished, strict=True)
            if trajectory.stop_reason is not StopReason.LENGTH
        ]
        metrics |= _lengths("length", lengths) | _lengths("terminated_length", terminated or [0])
        metrics["completions/clipped_ratio"] = 1.0 - len(terminated) / len(finished)
        newest = max(trajectory.last_weight_version for trajectory in finished)
        oldest = min(trajectory.weight_version for trajectory in finished)
        metrics["rollout/weight_version_spread"] = float(newest - oldest)
    return metrics


def _lengths(name: str, lengths: Sequence[int]) -> dict[str, float]:
    return {
        f"completions/mean_{name}": fmean(lengths),
        f"completions/min_{name}": float(min(lengths)),
        f"completions/max_{name}": float(max(lengths)),
    }
