"""RewardReport: how well a reward model tells better answers from worse, whether its confidence can be believed, and
whether it has learned to count words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from posttrain.core import (
    EvalReport,
    EvalSample,
    EvaluateError,
    Grade,
    Interval,
    Record,
    Sampling,
    StopReason,
    Task,
    content_hash,
)
from posttrain.evaluate.calibration import Calibration, calibration
from posttrain.evaluate.intervals import clustered, clustered_standard_error, wilson


class ScoredPair(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A better and a worse answer to one prompt, and what the model gave them."""

    id: str
    chosen: float  # reward of the better answer
    rejected: float
    chosen_length: int = 0  # tokens of the answer, prompt not counted
    rejected_length: int = 0
    tags: tuple[str, ...] = ()
    cluster: str = ""  # pairs of one prompt or ranked list share it; "" stands alone
    prompt: str = ""  # as text, for the report's page
    chosen_text: str = ""
    rejected_text: str = ""

    @property
    def hit(self) -> float:
        """1 where the better answer has the higher reward, 1/2 where both have the same."""
        return float(self.chosen > self.rejected) + 0.5 * float(self.chosen == self.rejected)


class LengthWatch(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether rewards follow length. A reward model that does will be hacked by long answers."""

    correlation: Interval  # Pearson, of the pair's difference in tokens with its difference in reward; Fisher's z
    longer_is_better: Interval  # share of the pairs whose better answer is the longer: what counting words would score
    longer_wins: Interval  # share of the pairs in which the model gives the longer answer the higher reward
    accuracy_when_longer: Interval | None  # on pairs whose better answer is the longer
    accuracy_when_shorter: Interval | None  # on the others: near 0 where the model only counts words


class RewardReport(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="reward_report/1"
):
    """What a reward model is worth on pairs that it was not trained on."""

    num_pairs: int
    accuracy: Interval
    by_tag: dict[str, Interval]  # accuracy
    margin: Interval  # mean of chosen − rejected
    mean_reward: float  # over both sides of all pairs
    std_reward: float
    mean_chosen: float
    mean_rejected: float
    calibration: Calibration  # of σ(|chosen − rejected|) as the probability that the higher-scored answer is better
    length: LengthWatch | None  # None where no lengths are known, or all pairs are of equal length

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"accuracy {_shown(self.accuracy)}",
            f"margin {self.margin.value:+.3f} [{self.margin.low:+.3f}, {self.margin.high:+.3f}]; "
            f"reward {self.mean_reward:+.3f} ± {self.std_reward:.3f}",
            f"calibration error {self.calibration.ece:.3f}, Brier {self.calibration.brier.value:.3f}",
        ]
        if self.length is not None:
            lines.append(
                f"length: correlation {_shown(self.length.correlation)}; the longer answer is better in "
                f"{self.length.longer_is_better.value:.1%} of pairs and gets more reward in "
                f"{self.length.longer_wins.value:.1%}"
            )
        lines += [f"accuracy/{tag} {_shown(interval)}" for tag, interval in self.by_tag.items()]
        return "\n".join(lines)


def reward_report(pairs: Sequence[ScoredPair], *, seed: int = 0) -> RewardReport:
    """Judge a reward model by its scores of held-out pairs.

    Args:
        pairs: scored pairs. The intervals of pairs that share a cluster are clustered.
        seed: of the bootstrap behind the Brier score's interval.

    Raises:
        EvaluateError: fewer than two pairs, or a reward that is not finite.
    """
    if len(pairs) < 2:
        raise EvaluateError(f"reward_report: {len(pairs)} pair says nothing; at least 2 are needed")
    lost = [pair.id for pair in pairs if not (math.isfinite(pair.chosen) and math.isfinite(pair.rejected))]
    if lost:
        raise EvaluateError(f"reward_report: {len(lost)} pairs have a reward that is not finite, first {lost[0]!r}")
    by_tag: dict[str, list[ScoredPair]] = defaultdict(list)
    for pair in pairs:
        for tag in pair.tags:
            by_tag[tag].append(pair)
    gaps = [pair.chosen - pair.rejected for pair in pairs]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    return RewardReport(
        num_pairs=len(pairs),
        accuracy=_share([pair.hit for pair in pairs], pairs),
        by_tag={tag: _share([pair.hit for pair in by_tag[tag]], by_tag[tag]) for tag in sorted(by_tag)},
        margin=_mean(gaps, pairs),
        mean_reward=float(np.mean([*chosen, *rejected])),
        std_reward=float(np.std([*chosen, *rejected])),
        mean_chosen=float(np.mean(chosen)),
        mean_rejected=float(np.mean(rejected)),
        calibration=calibration(
            [_sigmoid(abs(gap)) for gap in gaps], [pair.hit for pair in pairs], num_bins=10, low=0.5, seed=seed
        ),
        length=_length_watch(pairs),
    )


def as_eval_report(pairs: Sequence[ScoredPair], *, suite: str, model: str, seconds: float = 0.0) -> EvalReport:
    """The same pairs as an `EvalReport`, a pair as a task that is right where the better answer wins.

    So that two reward models are compared by the paired test of `compare`, and a run's page shows them.
    """
    tasks = [
        Task(
            id=pair.id,
            prompt=pair.prompt or pair.id,
            answer=pair.chosen_text or None,
            tags=pair.tags,
            cluster=pair.cluster or None,
        )
        for pair in pairs
    ]
    samples = tuple(
        EvalSample(
            task=task,
            index=0,
            text=pair.chosen_text if pair.chosen > pair.rejected else pair.rejected_text,
            grade=Grade(
                score=pair.hit,
                grader="reward_model",
                parts={"chosen": pair.chosen, "rejected": pair.rejected},
                rationale=f"better {pair.chosen:+.3f}, worse {pair.rejected:+.3f}",
            ),
            stop_reason=StopReason.EOS,
            num_tokens=pair.chosen_length + pair.rejected_length,
        )
        for task, pair in zip(tasks, pairs, strict=True)
    )
    report = reward_report(pairs)
    return EvalReport(
        suite=suite,
        suite_hash=content_hash({"pairs": [task.to_dict() for task in tasks]}),
        model=model,
        sampling=Sampling(max_tokens=1, temperature=0.0),
        metrics={
            "accuracy": report.accuracy,
            **{f"accuracy/{tag}": interval for tag, interval in report.by_tag.items()},
            "margin": report.margin,
            "brier": report.calibration.brier,
        },
        samples=samples,
        seconds=seconds,
    )


def _length_watch(pairs: Sequence[ScoredPair]) -> LengthWatch | None:
    unequal = [pair for pair in pairs if pair.chosen_length != pair.rejected_length]
    if len(unequal) < 2:
        return None
    longer = [pair for pair in unequal if pair.chosen_length > pair.rejected_length]
    shorter = [pair for pair in unequal if pair.chosen_length < pair.rejected_length]
    wins = [pair.hit if pair.chosen_length > pair.rejected_length else 1 - pair.hit for pair in unequal]
    return LengthWatch(
        correlation=_correlation(
            [float(pair.chosen_length - pair.rejected_length) for pair in pairs],
            [pair.chosen - pair.rejected for pair in pairs],
        ),
        longer_is_better=_share([float(pair.chosen_length > pair.rejected_length) for pair in unequal], unequal),
        longer_wins=_share(wins, unequal),
        accuracy_when_longer=_share([pair.hit for pair in longer], longer) if longer else None,
        accuracy_when_shorter=_share([pair.hit for pair in shorter], shorter) if shorter else None,
    )


def _correlation(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Interval:
    """Pearson's correlation with Fisher's interval; 0 with the whole range where one side does not vary."""
    n = len(x)
    if n < 4 or np.std(x) == 0 or np.std(y) == 0:
        return Interval(value=0.0, low=-1.0, high=1.0, n=n, method="fisher", confidence=confidence)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))
    half = NormalDist().inv_cdf((1 + confidence) / 2) / math.sqrt(n - 3)
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
    low, high = math.tanh(z - half), math.tanh(z + half)
    return Interval(value=r, low=min(low, r), high=max(high, r), n=n, method="fisher", confidence=confidence)


def _share(values: Sequence[float], pairs: Sequence[ScoredPair]) -> Interval:
    """A share: Wilson where pairs stand alone, clustered where several are of one prompt."""
    names = [pair.cluster or pair.id for pair in pairs]
    clusters = len(set(names))
    if clusters == len(names) or clusters < 2 or clustered_standard_error(values, names) == 0.0:
        # No spread between clusters was seen, which does not mean that there is none.
        return wilson(sum(values) / len(values) * clusters, clusters)
    interval = clustered(values, names)
    return interval.replace(low=max(0.0, interval.low), high=min(1.0, interval.high))


def _mean(values: Sequence[float], pairs: Sequence[ScoredPair]) -> Interval:
    names = [pair.cluster or pair.id for pair in pairs]
    if len(set(names)) < 2:
        value = float(np.mean(values))
        return Interval(value=value, low=min(values), high=max(values), n=1, method="range")
    return clustered(values, names)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}] (n = {interval.n})"
