"""Best of K: which of the answers sampled to one prompt are kept to learn from, and how often K tries succeed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from posttrain.core import Example, Grade, StopReason, TokenSequence, Trajectory, derive_seed
from posttrain.evaluate import pass_at_k
from posttrain.rollout import Group

Keep = Literal["best", "correct", "shortest"]


class Kept(NamedTuple):
    """One answer that was chosen."""

    trajectory: Trajectory
    score: float


def select(
    groups: Sequence[Group],
    grades: Sequence[Grade],
    *,
    keep: Keep = "correct",
    per_prompt: int = 1,
    threshold: float = 1.0,
    max_solved: float = 1.0,
    seed: int = 0,
) -> list[Kept]:
    """Choose among each prompt's answers.

    An answer that failed, has no grade, was cut at its token limit or says the same
    as one already taken, white space aside, is never chosen.

        best      the highest scores, right or not: for graders without a right and a wrong (reward models, judges), as
                  in Llama 2's rejection sampling (arXiv 2307.09288, section 3.2.3)
        correct   those that score at least `threshold`, drawn at random: STaR (2203.14465), ReST-EM (2312.06585)
        shortest  those that score at least `threshold`, the shortest first

    Args:
        groups: what was sampled.
        grades: of every trajectory, group by group.
        keep: which.
        per_prompt: how many of a prompt at most; 0: all. A bound keeps easy prompts from taking over.
        threshold: the lowest score that is right.
        max_solved: prompts of which a larger share of answers is right are left out: little is to be learned there.
        seed: of the draw; it also breaks ties of "best".
    """
    chosen: list[Kept] = []
    for group, own in _with_grades(groups, grades):
        scores = [0.0 if grade.score is None else grade.score for grade in own]
        if keep != "best" and fmean(score >= threshold for score in scores) > max_solved:
            continue
        usable = [
            Kept(trajectory, grade.score)
            for trajectory, grade in zip(group.trajectories, own, strict=True)
            if grade.score is not None and not trajectory.failed() and trajectory.stop_reason is not StopReason.LENGTH
        ]
        if keep != "best":
            usable = [kept for kept in usable if kept.score >= threshold]
        usable.sort(key=lambda kept: derive_seed(seed, "best_of", kept.trajectory.id))
        if keep == "best":
            usable.sort(key=lambda kept: -kept.score)
        if keep == "shortest":
            usable.sort(key=lambda kept: kept.trajectory.num_completion_tokens())
        chosen += without_repetitions(usable)[: per_prompt or None]
    return chosen


def without_repetitions(kept: Sequence[Kept]) -> list[Kept]:
    """The first of those that answer the same prompt with the same words."""
    first: dict[tuple[str, str], Kept] = {}
    for one in kept:
        first.setdefault((one.trajectory.task.id, " ".join(one.trajectory.text.split())), one)
    return list(first.values())


def selection_metrics(
    groups: Sequence[Group], grades: Sequence[Grade], chosen: Sequence[Kept], *, threshold: float = 1.0
) -> dict[str, float]:
    """How good the samples were and what became of them.

    Returns:
        `pass@1`, `pass@2`, `pass@4` … up to K: unbiased estimates, means over prompts; failures count as wrong.
        `selected/num`, `selected/prompts` (prompts with an answer chosen), `selected/share_of_prompts`,
        `selected/mean_score`, and `best_of/mean_score`: the mean over prompts of the best score.
    """
    rights, bests = [], []
    for _, own in _with_grades(groups, grades):
        scores = [0.0 if grade.score is None else grade.score for grade in own]
        rights.append((len(scores), sum(score >= threshold for score in scores)))
        bests.append(max(scores))
    smallest = min(num for num, _ in rights)
    ks = sorted({2**power for power in range(smallest.bit_length()) if 2**power <= smallest} | {smallest})
    metrics = {f"pass@{k}": fmean(pass_at_k(num, right, k) for num, right in rights) for k in ks}
    prompts = {kept.trajectory.task.id for kept in chosen}
    return metrics | {
        "best_of/mean_score": fmean(bests),
        "selected/num": float(len(chosen)),
        "selected/prompts": float(len(prompts)),
        "selected/share_of_prompts": len(prompts) / len(groups),
        "selected/mean_score": fmean([kept.score for kept in chosen] or [0.0]),
    }


def example_of(trajectory: Trajectory) -> Example:
    """The very tokens that were sampled, to be imitated."""
    sequence = TokenSequence(tokens=trajectory.tokens, mask=trajectory.mask)
    return Example(id=trajectory.id, sequences=(sequence,), group=trajectory.task.id)


def _with_grades(groups: Sequence[Group], grades: Sequence[Grade]) -> list[tuple[Group, list[Grade]]]:
    graded = iter(grades)
    pairs = [(group, [next(graded) for _ in group.trajectories]) for group in groups]
    assert next(graded, None) is None, f"{len(grades)} grades are more than there are trajectories"
    return pairs
