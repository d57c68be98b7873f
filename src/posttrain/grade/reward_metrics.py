"""Metrics of a step's grades, under the names that TRL's GRPO trainer uses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev

from posttrain.core import Grade
from posttrain.grade.batch import ROLLOUT_FAILED, UNGRADED
from posttrain.grade.combine import failure_parts

FAILURES = ("failed", "timed_out", "invalid")


def reward_metrics(grades: Sequence[Grade], groups: Sequence[str]) -> dict[str, float]:
    """Means and spreads of rewards.

    Args:
        grades: one for each trajectory.
        groups: of each trajectory, the group it was sampled in (`trajectory.group`).

    Returns:
        `reward`: mean score of what was graded. `reward_std`: mean over groups of the siblings' sample standard
        deviation. `frac_reward_zero_std`: share of groups whose scores are all equal, so that nothing is learned from
        them. `rewards/<grader>/mean` and `/std` of the score, and `rewards/<part>/…` of each part by its name (so a
        Weighted grade reports each of its graders as TRL reports reward functions). `grade/graded` and `grade/failed`:
        counts; `grade/not_rolled_out`: trajectories that failed before grading; `grade/seconds`: mean time of a grade;
        `grade/cost`: US dollars, all together; and `failure_metrics`. A metric of nothing is left out.
    """
    scores_by_group: dict[str, list[float]] = defaultdict(list)
    values: dict[str, list[float]] = defaultdict(list)
    for grade, group in zip(grades, groups, strict=True):
        if grade.score is None:
            continue
        scores_by_group[group].append(grade.score)
        values[grade.grader].append(grade.score)
        for part, value in grade.parts.items():
            if part != grade.grader and part.rpartition("/")[2] not in FAILURES:
                values[part].append(value)
    metrics: dict[str, float] = {}
    if scores_by_group:
        stds = [_std(scores) for scores in scores_by_group.values()]
        metrics["reward"] = fmean(score for scores in scores_by_group.values() for score in scores)
        metrics["reward_std"] = fmean(stds)
        metrics["frac_reward_zero_std"] = fmean(math.isclose(std, 0.0, abs_tol=1e-8) for std in stds)
    for name, numbers in sorted(values.items()):
        metrics[f"rewards/{name}/mean"] = fmean(numbers)
        metrics[f"rewards/{name}/std"] = _std(numbers)
    failed = [grade for grade in grades if grade.score is None]
    not_rolled_out = sum((grade.error or "").startswith(ROLLOUT_FAILED) for grade in failed)
    metrics["grade/graded"] = float(len(grades) - len(failed))
    metrics["grade/failed"] = float(len(failed) - not_rolled_out)
    metrics["grade/not_rolled_out"] = float(not_rolled_out)
    if len(grades) > not_rolled_out:
        metrics["grade/seconds"] = sum(grade.seconds for grade in grades) / (len(grades) - not_rolled_out)
    metrics["grade/cost"] = sum(grade.cost for grade in grades)
    return metrics | failure_metrics(grades)


def failure_metrics(grades: Sequence[Grade]) -> dict[str, float]:
    """How often each grader failed, by name, and so for the graders that it is made of.

    Returns:
        `grader/<name>/failed`: grades that it did not give; of these `grader/<name>/timed_out`: not in time, and
        `grader/<name>/invalid`: not a number, not finite, out of its range, or no grade at all. For the grader itself
        they are always there, for its parts where there is something to count.
    """
    found: dict[str, float] = defaultdict(float)
    for grade in grades:
        if (grade.error or "").startswith((ROLLOUT_FAILED, UNGRADED)):
            continue
        for kind in FAILURES:
            found[f"grader/{grade.grader}/{kind}"] += 0.0
        marks = {**grade.parts, **failure_parts(grade)}
        for name, value in marks.items():
            owner, _, kind = name.rpartition("/")
            if owner and kind in FAILURES:
                found[f"grader/{owner}/{kind}"] += value
    return dict(sorted(found.items()))


def _std(numbers: Sequence[float]) -> float:
    return stdev(numbers) if len(numbers) > 1 else 0.0
