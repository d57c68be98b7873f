"""From graded answers to metrics with intervals: the arithmetic between a suite's run and its report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from posttrain.core import EvalSample, Interval, StopReason
from posttrain.evaluate.intervals import clustered, clustered_standard_error, wilson
from posttrain.evaluate.statistics import pass_at_k

FULL_MARKS = 1.0
_ROUNDING = 1e-9  # weights such as 0.1 + 0.2 + 0.7 do not add up to 1 exactly


def is_right(sample: EvalSample) -> bool:
    """Full marks. An answer that could not be graded is wrong."""
    return sample.grade.score is not None and sample.grade.score >= FULL_MARKS - _ROUNDING


def score_of(sample: EvalSample) -> float:
    """The grade's score; 0 where grading failed."""
    return 0.0 if sample.grade.score is None else sample.grade.score


def report_metrics(samples: Sequence[EvalSample], ks: Sequence[int], confidence: float = 0.95) -> dict[str, Interval]:
    """All metrics of a report.

    Gives `accuracy`; `accuracy/<tag>`; `score` where some answer is graded between 0 and 1; `mean@n` and `pass@k` where
    tasks are answered n > 1 times; `completions/mean_length` (tokens) and `completions/clipped_ratio`.
    """
    metrics = {"accuracy": proportion(samples, confidence)}
    scores = [score_of(sample) for sample in samples]
    if any(score not in (0.0, 1.0) for score in scores):
        metrics["score"] = mean(scores, samples, confidence)
    by_task = _by_task(samples)
    n = max(len(siblings) for siblings in by_task.values())
    if n > 1:
        metrics[f"mean@{n}"] = metrics["accuracy"]
        for k in ks:
            metrics[f"pass@{k}"] = _pass_at(k, by_task, confidence)
    by_tag: dict[str, list[EvalSample]] = defaultdict(list)
    for sample in samples:
        for tag in sample.task.tags:
            by_tag[tag].append(sample)
    for tag in sorted(by_tag):
        metrics[f"accuracy/{tag}"] = proportion(by_tag[tag], confidence)
    metrics["completions/mean_length"] = mean([float(sample.num_tokens) for sample in samples], samples, confidence)
    clipped = [float(sample.stop_reason is StopReason.LENGTH) for sample in samples]
    metrics["completions/clipped_ratio"] = _of_binary(clipped, samples, confidence)
    return metrics


def proportion(samples: Sequence[EvalSample], confidence: float = 0.95) -> Interval:
    """How many answers are right: Wilson where every answer stands alone, clustered where some belong together."""
    return _of_binary([float(is_right(sample)) for sample in samples], samples, confidence)


def _of_binary(values: Sequence[float], samples: Sequence[EvalSample], confidence: float) -> Interval:
    names = [cluster_of(sample) for sample in samples]
    clusters = len(set(names))
    if clusters == len(samples):
        return wilson(sum(values), len(values), confidence)
    share = sum(values) / len(values)
    if clusters < 2 or clustered_standard_error(values, names) == 0.0:
        # No spread was seen, which does not mean that there is none: Wilson with as many tries as clusters.
        return wilson(share * clusters, clusters, confidence)
    interval = clustered(values, names, confidence)
    return interval.replace(low=max(0.0, interval.low), high=min(1.0, interval.high))


def mean(values: Sequence[float], samples: Sequence[EvalSample], confidence: float = 0.95) -> Interval:
    """Mean of any number per answer, clustered. One cluster has no spread to see: the interval is then the range."""
    names = [cluster_of(sample) for sample in samples]
    if len(set(names)) < 2:
        value = math.fsum(values) / len(values)
        return Interval(value=value, low=min(values), high=max(values), n=1, method="range", confidence=confidence)
    return clustered(values, names, confidence)


def cluster_of(sample: EvalSample) -> str:
    """What an answer shares its luck with: its task's cluster, or its task."""
    return f"task:{sample.task.id}" if sample.task.cluster is None else f"cluster:{sample.task.cluster}"


def _pass_at(k: int, by_task: dict[str, list[EvalSample]], confidence: float) -> Interval:
    firsts = [siblings[0] for siblings in by_task.values()]
    values = [pass_at_k(len(siblings), sum(map(is_right, siblings)), k) for siblings in by_task.values()]
    if all(value in (0.0, 1.0) for value in values):
        return _of_binary(values, firsts, confidence)
    interval = mean(values, firsts, confidence)
    return interval.replace(low=max(0.0, interval.low), high=min(1.0, interval.high))


def _by_task(samples: Sequence[EvalSample]) -> dict[str, list[EvalSample]]:
    by_task: dict[str, list[EvalSample]] = defaultdict(list)
    for sample in samples:
        by_task[sample.task.id].append(sample)
    return by_task
