"""A group: what came of one task, sampled several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from posttrain.core import Record, RolloutError, Task, Trajectory


class Group(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="group/1"):
    """Siblings: trajectories sampled from the same prompt in the same step."""

    task: Task
    trajectories: tuple[Trajectory, ...]  # by index; failed ones keep their place

    @property
    def id(self) -> str:
        """The siblings' `trajectory.group`: `<task id>/<step>`."""
        return self.trajectories[0].group if self.trajectories else self.task.id


def check_failures(groups: Sequence[Group], max_failed: float = 0.05, *, min_failed: int = 2) -> None:
    """Stop when too many rollouts failed.

    Args:
        groups: a step's groups.
        max_failed: largest share of trajectories that may fail.
        min_failed: fewer failures than this are let pass, whatever their share, unless every rollout failed.

    Raises:
        RolloutError: too many failed; names the most frequent causes.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    causes = Counter((t.error or t.stop_reason.value)[:200] for t in trajectories if t.failed())
    failed = causes.total()
    if failed == 0 or failed <= max_failed * len(trajectories) or (failed < min_failed and failed < len(trajectories)):
        return
    listed = "".join(f"\n  {count} × {cause}" for cause, count in causes.most_common(5))
    raise RolloutError(
        f"{failed} of {len(trajectories)} rollouts failed ({failed / len(trajectories):.0%}, at most {max_failed:.0%} "
        f"may). Mend the sampler or its prompts, or raise the limit. Most frequent causes:{listed}"
    )
