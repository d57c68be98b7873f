"""A judge held against people: agreement, position, length, and what a bias-corrected score needs.

Legend: N things judged; votes of people and the judge's verdict on each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

import numpy as np

from posttrain.core import EvaluateError, Interval, Record
from posttrain.evaluate.intervals import wilson
from posttrain.evaluate.judge_agreement import (
    Table,
    Value,
    agreeing_pairs,
    alpha_of,
    bootstrap_tables,
    coincidences,
    kappa_of,
)
from posttrain.evaluate.judge_bias import JudgeErrors

Vote = Literal["a", "b", "tie"]
M = TypeVar("M", bound=Hashable)
_VOTES: tuple[Vote, ...] = ("a", "b", "tie")


class JudgedPair(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two answers to one prompt: what people voted and what the judge said."""

    id: str
    prompt: str  # pairs of one prompt are one cluster
    votes: tuple[Vote, ...]  # one of each person
    judge: Vote | None  # None: the judge gave no verdict
    in_order: Vote | None = None  # with a shown first
    swapped: Vote | None = None  # with b shown first, named back to a and b
    length_a: int = 0  # characters
    length_b: int = 0


class JudgedAnswer(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer: whether people call it right, and whether the judge does."""

    id: str
    prompt: str
    votes: tuple[bool, ...]
    judge: bool | None


class JudgeCalibration(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="judge_calibration/1"
):
    """How a judge compares with people. A metric that the data cannot give is in `left_out`, with the reason."""

    judge: str
    data: str
    num_items: int
    num_votes: int
    num_prompts: int
    num_failed: int  # items without a verdict of the judge; left out of every metric of the judge
    metrics: dict[str, Interval]
    left_out: dict[str, str] = {}
    errors: JudgeErrors | None = None  # of a judge of single answers, for `bias_corrected`
    settings: dict[str, str] = {}


def calibrate_pairs(
    pairs: Sequence[JudgedPair], *, judge: str = "judge", data: str = "pairs", seed: int = 0, confidence: float = 0.95
) -> JudgeCalibration:
    """Hold a judge of pairs against people's votes. Intervals resample prompts.

    Metrics, where a tie is a third verdict unless the name says `decided`:

    - `human_agreement`: the chance that two different people agree on a pair; `human_agreement_decided`: the same among
      votes that are no ties (MT-Bench's set-up S2, arXiv 2306.05685, section 4.2, where it is 81 %). Pairs weigh alike.
    - `agreement`, `agreement_decided`: the chance that the judge agrees with one person, drawn at random.
    - `agreement_majority`: with what most people say; pairs without a majority are left out.
    - `kappa`: Cohen's, judge against majority. `human_alpha`: Krippendorff's nominal α of the people;
      `alpha`: of the people and the judge together, as one rater more.
    - `tie_rate`, `human_tie_rate`.
    - `flip_rate`: pairs where the two orders contradict each other; `first_share`: of those, the share in which the
      answer shown first was preferred (½ is no preference for a place).
    - `longer_rate`, `human_longer_rate`: share of the decided verdicts for the longer answer; `verbosity_bias`: the
      difference on the same pairs.

    Args:
        pairs: N of them.
        judge: its name.
        data: the data's name.
        seed: of the resampling.
        confidence: of the intervals.

    Raises:
        EvaluateError: no pairs, or no votes.
    """
    if not pairs or not any(pair.votes for pair in pairs):
        raise EvaluateError("judge calibration: no pair has a vote of a person")
    gather = _Metrics(seed, confidence)
    prompts = [pair.prompt for pair in pairs]
    values: dict[Value, int] = {vote: place for place, vote in enumerate(_VOTES)}
    gather.ratio("human_agreement", [_pairs_of(pair.votes) for pair in pairs], prompts)
    gather.ratio("human_agreement_decided", [_pairs_of(_decided(pair.votes)) for pair in pairs], prompts)
    gather.ratio("human_tie_rate", [(pair.votes.count("tie"), len(pair.votes)) for pair in pairs], prompts)
    gather.table("human_alpha", [coincidences(pair.votes, values) for pair in pairs], prompts, _alpha)
    judged = [pair for pair in pairs if pair.judge is not None and pair.votes]
    clusters = [pair.prompt for pair in judged]
    gather.ratio("agreement", [_share(pair.judge, pair.votes) for pair in judged], clusters)
    decided = [_share(pair.judge, _decided(pair.votes)) if pair.judge != "tie" else (0, 0) for pair in judged]
    gather.ratio("agreement_decided", decided, clusters)
    major = [(pair, most) for pair in judged if (most := majority(pair.votes)) is not None]
    of_major = [pair.prompt for pair, _ in major]
    gather.ratio("agreement_majority", [(float(pair.judge == most), 1) for pair, most in major], of_major)
    confusions = [_cell(values[most], values[pair.judge], len(values)) for pair, most in major if pair.judge]
    gather.table("kappa", confusions, of_major, kappa_of)
    everybody = [coincidences([*pair.votes, pair.judge], values) for pair in judged]
    gather.table("alpha", everybody, clusters, _alpha)
    gather.ratio("tie_rate", [(float(pair.judge == "tie"), 1) for pair in judged], clusters)
    _positions(gather, judged)
    _lengths(gather, judged)
    return JudgeCalibration(
        judge=judge,
        data=data,
        num_items=len(pairs),
        num_votes=sum(len(pair.votes) for pair in pairs),
        num_prompts=len(set(prompts)),
        num_failed=sum(pair.judge is None for pair in pairs),
        metrics=gather.metrics,
        left_out=gather.left_out,
    )


def calibrate_answers(
    answers: Sequence[JudgedAnswer],
    *,
    judge: str = "judge",
    data: str = "answers",
    seed: int = 0,
    confidence: float = 0.95,
) -> JudgeCalibration:
    """Hold a judge of single answers, right or wrong, against people's votes. Intervals resample prompts.

    Metrics: `human_agreement`, `human_alpha`, `agreement` with one person drawn at random, `agreement_majority`,
    `kappa`, `alpha` as for pairs; `specificity` (q0), `sensitivity` (q1) against the majority, `informedness`
    (q0 + q1 − 1), `judge_rate` and `human_rate`: shares called right. Give `errors` to `bias_corrected`, with the
    judge's verdicts on answers outside the calibration.

    Raises:
        EvaluateError: no answers, or no votes.
    """
    if not answers or not any(answer.votes for answer in answers):
        raise EvaluateError("judge calibration: no answer has a vote of a person")
    gather = _Metrics(seed, confidence)
    prompts = [answer.prompt for answer in answers]
    values: dict[Value, int] = {False: 0, True: 1}
    gather.ratio("human_agreement", [_pairs_of(answer.votes) for answer in answers], prompts)
    gather.table("human_alpha", [coincidences(answer.votes, values) for answer in answers], prompts, _alpha)
    judged = [answer for answer in answers if answer.judge is not None and answer.votes]
    clusters = [answer.prompt for answer in judged]
    gather.ratio("agreement", [_share(answer.judge, answer.votes) for answer in judged], clusters)
    everybody = [coincidences([*answer.votes, answer.judge], values) for answer in judged]
    gather.table("alpha", everybody, clusters, _alpha)
    major = [(answer, most) for answer in judged if (most := majority(answer.votes)) is not None]
    of_major = [answer.prompt for answer, _ in major]
    gather.ratio("agreement_majority", [(float(answer.judge == most), 1) for answer, most in major], of_major)
    gather.table("kappa", [_cell(int(most), int(bool(a.judge)), 2) for a, most in major], of_major, kappa_of)
    gather.ratio("judge_rate", [(float(bool(answer.judge)), 1) for answer, _ in major], of_major)
    gather.ratio("human_rate", [(float(most), 1) for _, most in major], of_major)
    gather.ratio("specificity", [(float(not a.judge), 1) if not most else (0, 0) for a, most in major], of_major)
    gather.ratio("sensitivity", [(float(bool(a.judge)), 1) if most else (0, 0) for a, most in major], of_major)
    counts = Counter((bool(most), bool(answer.judge)) for answer, most in major)
    errors = JudgeErrors(
        true_negatives=counts[False, False],
        num_negatives=counts[False, False] + counts[False, True],
        true_positives=counts[True, True],
        num_positives=counts[True, True] + counts[True, False],
    )
    gather.one("informedness", lambda: errors.informedness(confidence))
    return JudgeCalibration(
        judge=judge,
        data=data,
        num_items=len(answers),
        num_votes=sum(len(answer.votes) for answer in answers),
        num_prompts=len(set(prompts)),
        num_failed=sum(answer.judge is None for answer in answers),
        metrics=gather.metrics,
        left_out=gather.left_out,
        errors=errors if errors.num_negatives and errors.num_positives else None,
    )


def majority(votes: Sequence[M]) -> M | None:
    """What more than half of the people say; None where nothing is said by so many."""
    if not votes:
        return None
    (most, count), *_ = Counter(votes).most_common(1)
    return most if 2 * count > len(votes) else None


def _positions(gather: _Metrics, judged: Sequence[JudgedPair]) -> None:
    both = [pair for pair in judged if pair.in_order is not None and pair.swapped is not None]
    flips = [(pair, {pair.in_order, pair.swapped} == {"a", "b"}) for pair in both]
    gather.ratio("flip_rate", [(float(flipped), 1) for _, flipped in flips], [pair.prompt for pair, _ in flips])
    # In a flip the judge preferred one place twice: the first, where it said "a" with a in front.
    first = [(float(pair.in_order == "a"), 1) for pair, flipped in flips if flipped]
    gather.ratio("first_share", first, [pair.prompt for pair, flipped in flips if flipped])


def _lengths(gather: _Metrics, judged: Sequence[JudgedPair]) -> None:
    usable = [p for p in judged if p.judge in ("a", "b") and _decided(p.votes) and p.length_a != p.length_b]
    longer: dict[str, Vote] = {p.id: "a" if p.length_a > p.length_b else "b" for p in usable}
    judges = [float(p.judge == longer[p.id]) for p in usable]
    people = [_decided(p.votes).count(longer[p.id]) / len(_decided(p.votes)) for p in usable]
    clusters = [p.prompt for p in usable]
    gather.ratio("longer_rate", [(value, 1) for value in judges], clusters)
    gather.ratio("human_longer_rate", [(value, 1) for value in people], clusters)
    gather.ratio("verbosity_bias", [(j - p, 1) for j, p in zip(judges, people, strict=True)], clusters)


class _Metrics:
    """Metrics as they are found, and why others are not."""

    def __init__(self, seed: int, confidence: float) -> None:
        self.metrics: dict[str, Interval] = {}
        self.left_out: dict[str, str] = {}
        self._seed, self._confidence = seed, confidence

    def ratio(self, name: str, shares: Sequence[tuple[float, float]], clusters: Sequence[str]) -> None:
        """A mean over items, each a share (part, whole); those with nothing to share are left out."""
        kept = [(part / whole, place) for place, (part, whole) in enumerate(shares) if whole]
        if not kept:
            self.left_out[name] = "no item that it could be taken from"
            return
        tables = [np.array([share, 1.0]) for share, _ in kept]
        self.table(name, tables, [clusters[place] for _, place in kept], lambda sums: sums[:, 0] / sums[:, 1])
        found = self.metrics.get(name)
        # Where all are alike, resampling them finds no spread, however few they are: Wilson's interval does.
        if found is not None and found.low == found.high and name != "verbosity_bias":
            self.metrics[name] = wilson(found.value * found.n, found.n, self._confidence)

    def table(
        self, name: str, tables: Sequence[Table], clusters: Sequence[str], statistic: Callable[[Table], Table]
    ) -> None:
        """A statistic of summed tables."""
        if not any(table.any() for table in tables):
            self.left_out[name] = "no item that it could be taken from"
            return
        options = {"seed": self._seed, "confidence": self._confidence}
        self.one(name, lambda: bootstrap_tables(tables, clusters, statistic, **options))  # type: ignore[arg-type]

    def one(self, name: str, find: Callable[[], Interval]) -> None:
        """An interval, or why there is none."""
        try:
            self.metrics[name] = find()
        except EvaluateError as error:
            self.left_out[name] = str(error)


def _alpha(tables: Table) -> Table:
    return alpha_of(tables, list(range(tables.shape[-1])), "nominal")


def _pairs_of(votes: Sequence[Vote] | Sequence[bool]) -> tuple[int, int]:
    return agreeing_pairs(votes)


def _decided(votes: Sequence[Vote]) -> list[Vote]:
    return [vote for vote in votes if vote != "tie"]


def _share(judge: Vote | bool | None, votes: Sequence[Vote] | Sequence[bool]) -> tuple[float, float]:
    return (sum(vote == judge for vote in votes) / len(votes), 1) if votes else (0, 0)


def _cell(row: int, column: int, size: int) -> Table:
    table = np.zeros((size, size))
    table[row, column] = 1.0
    return table
