"""Candidate against champion on the same tasks: a paired test with a stated confidence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Literal

from posttrain.core import Comparison, EvalReport, EvalSample, EvaluateError, Sampling
from posttrain.evaluate.intervals import paired_bootstrap
from posttrain.evaluate.scores import is_right, score_of
from posttrain.evaluate.statistics import mcnemar

Measure = Literal["accuracy", "score"]


def compare(
    candidate: EvalReport,
    champion: EvalReport,
    *,
    margin: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
    measure: Measure = "accuracy",
) -> Comparison:
    """Compare two reports on the same suite, paired by task.

    Each task gives one number per model, the mean over its samples. The difference is their mean with a paired
    bootstrap (clusters drawn whole where tasks have one); wins and losses are tasks on which one model does better.

    `better` asks for two things: the interval's lower bound above the margin, and, for a margin of 0 or more,
    McNemar's exact p at most 1 − confidence. With few discordant tasks the bootstrap alone is too sure of itself:
    four wins and no loss among a hundred tasks keep its interval above 0, and a fair coin does that one time in eight.

    Args:
        margin: by how much the candidate must be better; below 0 asks only that it is not much worse.
        measure: "accuracy" counts full marks; "score" takes partial ones, and then McNemar's test is the sign test.

    Raises:
        EvaluateError: other tasks, another grader, another sampling, or missing answers.
    """
    _check_same(candidate, champion)
    value: Callable[[EvalSample], float] = score_of if measure == "score" else lambda sample: float(is_right(sample))
    ours, theirs = _per_task(candidate, value), _per_task(champion, value)
    ids = sorted(ours)
    clusters = {sample.task.id: sample.task.cluster or f"task:{sample.task.id}" for sample in candidate.samples}
    names = [clusters[task_id] for task_id in ids]
    difference = paired_bootstrap(
        [ours[task_id] for task_id in ids],
        [theirs[task_id] for task_id in ids],
        seed=seed,
        clusters=names if len(set(names)) < len(names) else None,
        confidence=confidence,
    )
    wins = sum(ours[task_id] > theirs[task_id] for task_id in ids)
    losses = sum(ours[task_id] < theirs[task_id] for task_id in ids)
    p_value = mcnemar(wins, losses)
    return Comparison(
        suite=candidate.suite,
        candidate=candidate.model,
        champion=champion.model,
        difference=difference,
        wins=wins,
        losses=losses,
        ties=len(ids) - wins - losses,
        p_value=p_value,
        better=difference.low > margin and (margin < 0 or p_value <= 1 - confidence + 1e-12),
        margin=margin,
    )


def _check_same(candidate: EvalReport, champion: EvalReport) -> None:
    if candidate.suite_hash != champion.suite_hash:
        raise EvaluateError(
            f"suite {candidate.suite!r} ({candidate.suite_hash[:12]}) and suite {champion.suite!r} "
            f"({champion.suite_hash[:12]}) are not the same tasks and grader; evaluate both models on one suite"
        )
    if _comparable(candidate.sampling) != _comparable(champion.sampling):
        raise EvaluateError(
            f"suite {candidate.suite!r}: the candidate was sampled with {candidate.sampling}, the champion with "
            f"{champion.sampling}; evaluate both alike"
        )
    ours, theirs = _answers(candidate), _answers(champion)
    if ours != theirs:
        odd = sorted(ours ^ theirs)[0]
        raise EvaluateError(f"suite {candidate.suite!r}: task {odd[0]!r}, sample {odd[1]} is in one report only")


def _comparable(sampling: Sampling) -> Sampling:
    """Without what may differ between two fair evaluations: the seed, and the ids at which a vocabulary's turns end."""
    return sampling.replace(seed=None, stop_tokens=())


def _answers(report: EvalReport) -> set[tuple[str, int]]:
    return {(sample.task.id, sample.index) for sample in report.samples}


def _per_task(report: EvalReport, value: Callable[[EvalSample], float]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for sample in report.samples:
        values[sample.task.id].append(value(sample))
    return {task_id: sum(own) / len(own) for task_id, own in values.items()}
