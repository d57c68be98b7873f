"""StepReport: how well a process reward model tells right steps from wrong ones, and finds the first error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.core import EvaluateError, Interval, Record
from posttrain.evaluate.calibration import Calibration, calibration
from posttrain.evaluate.intervals import clustered, clustered_standard_error, wilson


class ScoredSteps(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer in steps: the logit that the model gave to each, and its label where it has one."""

    id: str
    scores: tuple[float, ...]  # logits
    labels: tuple[float | None, ...]  # in [0, 1]; None where nobody labelled the step


class StepReport(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="step_report/1"
):
    """What a process reward model is worth on answers that it was not trained on."""

    num_answers: int
    num_steps: int  # labelled
    positive_rate: float  # share of them that are right: what always saying "right" would score
    accuracy: Interval  # of steps, clustered by answer
    accuracy_right: Interval | None  # of right steps
    accuracy_wrong: Interval | None  # of wrong steps: where most steps are right, the number to look at
    first_error: Interval | None  # of answers with an error, the share whose first one is found exactly
    all_right: Interval | None  # of answers without error, the share with no step flagged
    f1: float | None  # harmonic mean of the two: ProcessBench's number
    calibration: Calibration  # of σ(score) as the probability that a step is right

    def summary(self) -> str:
        """A few lines for the terminal."""
        named = {
            "step accuracy": self.accuracy,
            "of right steps": self.accuracy_right,
            "of wrong steps": self.accuracy_wrong,
            "first error found": self.first_error,
            "no false alarm": self.all_right,
        }
        lines = [
            f"{name} {each.value:.3f} [{each.low:.3f}, {each.high:.3f}] (n = {each.n})"
            for name, each in named.items()
            if each is not None
        ]
        lines.append(f"{self.positive_rate:.1%} of steps are right; calibration error {self.calibration.ece:.3f}")
        return "\n".join(lines)


def step_report(answers: Sequence[ScoredSteps], *, seed: int = 0) -> StepReport:
    """Judge a process reward model by its scores of held-out answers.

    A step is taken for wrong where σ(score) is below 1/2, and is wrong where its label is.

    Raises:
        EvaluateError: no labelled step, a score that is not finite, or other numbers of scores and labels.

    Source: first error and F1: Zheng et al., "ProcessBench", https://arxiv.org/abs/2412.06559, section 4.
    """
    steps: list[tuple[str, float, float]] = []
    for answer in answers:
        if len(answer.scores) != len(answer.labels):
            raise EvaluateError(f"{answer.id}: {len(answer.scores)} scores for {len(answer.labels)} steps")
        if not all(math.isfinite(score) for score in answer.scores):
            raise EvaluateError(f"{answer.id}: a score is not finite")
        steps += [
            (answer.id, score, label)
            for score, label in zip(answer.scores, answer.labels, strict=True)
            if label is not None
        ]
    if len(steps) < 2:
        raise EvaluateError(f"step_report: {len(steps)} labelled steps say nothing; at least 2 are needed")
    found, clean = _first_errors(answers)
    f1 = None
    if found is not None and clean is not None:
        total = found.value + clean.value
        f1 = 2 * found.value * clean.value / total if total else 0.0
    return StepReport(
        num_answers=len(answers),
        num_steps=len(steps),
        positive_rate=sum(label > 0.5 for _, _, label in steps) / len(steps),
        accuracy=_accuracy(steps) or wilson(0, 1),
        accuracy_right=_accuracy([step for step in steps if step[2] > 0.5]),
        accuracy_wrong=_accuracy([step for step in steps if step[2] < 0.5]),
        first_error=found,
        all_right=clean,
        f1=f1,
        calibration=calibration(
            [_sigmoid(score) for _, score, _ in steps], [label for _, _, label in steps], seed=seed
        ),
    )


def _accuracy(steps: Sequence[tuple[str, float, float]]) -> Interval | None:
    if not steps:
        return None
    names = [name for name, _, _ in steps]
    hits = [float((score > 0) == (label > 0.5)) for _, score, label in steps]
    clusters = len(set(names))
    if clusters == len(names) or clusters < 2 or clustered_standard_error(hits, names) == 0.0:
        return wilson(sum(hits) / len(hits) * clusters, clusters)
    interval = clustered(hits, names)
    return interval.replace(low=max(0.0, interval.low), high=min(1.0, interval.high))


def _first_errors(answers: Sequence[ScoredSteps]) -> tuple[Interval | None, Interval | None]:
    """Of answers with an error, how many have it found; of the others, how many raise no alarm."""
    found: list[bool] = []
    clean: list[bool] = []
    for answer in answers:
        wrong = [place for place, label in enumerate(answer.labels) if label is not None and label < 0.5]
        flagged = [place for place, score in enumerate(answer.scores) if score < 0]
        if wrong:
            found.append(bool(flagged) and flagged[0] == wrong[0])
        elif any(label is not None for label in answer.labels):
            clean.append(not flagged)
    return (
        wilson(sum(found), len(found)) if found else None,
        wilson(sum(clean), len(clean)) if clean else None,
    )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
