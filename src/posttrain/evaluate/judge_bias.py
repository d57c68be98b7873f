"""A score that an imperfect judge gave, put right by what calibration says of the judge."""

from __future__ import annotations

import math

from posttrain.core import EvaluateError, Interval, Record
from posttrain.evaluate.intervals import wilson
from posttrain.evaluate.quantiles import z_value


class JudgeErrors(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often a judge is right about answers that people called wrong, and about those they called right."""

    true_negatives: int  # the judge says no, as people do
    num_negatives: int  # people say no
    true_positives: int
    num_positives: int

    @property
    def specificity(self) -> float:
        """q0 = P(judge says no | people say no)."""
        return self.true_negatives / self.num_negatives

    @property
    def sensitivity(self) -> float:
        """q1 = P(judge says yes | people say yes)."""
        return self.true_positives / self.num_positives

    def intervals(self, confidence: float = 0.95) -> dict[str, Interval]:
        """Both with Wilson's interval."""
        return {
            "specificity": wilson(self.true_negatives, self.num_negatives, confidence),
            "sensitivity": wilson(self.true_positives, self.num_positives, confidence),
        }

    def informedness(self, confidence: float = 0.95) -> Interval:
        """q0 + q1 − 1: 0 for a judge that does not look at the answer, 1 for one that is always right.

        With the adjusted Wald interval of a difference of proportions (one success and one failure more for each).
        """
        self.check()
        q0, q1 = (
            (self.true_negatives + 1) / (self.num_negatives + 2),
            (self.true_positives + 1) / (self.num_positives + 2),
        )
        variance = q0 * (1 - q0) / (self.num_negatives + 2) + q1 * (1 - q1) / (self.num_positives + 2)
        half = z_value(confidence) * math.sqrt(variance)
        return Interval(
            value=self.specificity + self.sensitivity - 1,
            low=max(-1.0, q0 + q1 - 1 - half),
            high=min(1.0, q0 + q1 - 1 + half),
            n=self.num_negatives + self.num_positives,
            method="adjusted Wald",
            confidence=confidence,
        )

    def check(self) -> None:
        """Raise EvaluateError where these are no counts, or one of the two kinds is missing."""
        pairs = ((self.true_negatives, self.num_negatives), (self.true_positives, self.num_positives))
        if any(not 0 <= right <= count or count < 1 for right, count in pairs):
            raise EvaluateError(
                f"judge calibration needs answers that people called right and answers they called wrong, with counts "
                f"that fit; these are {self.to_dict()}"
            )


def bias_corrected(judged_right: int, num_judged: int, errors: JudgeErrors, confidence: float = 0.95) -> Interval:
    """The share of right answers, from a judge's verdicts and the judge's errors: θ̂ = (p + q0 − 1) / (q0 + q1 − 1).

    The interval carries the noise of the verdicts and of the calibration (arXiv 2511.21140, section 3; Rogan and Gladen
    1978, Lang and Reiczigel 2014): all three proportions are pulled towards ½ (p by z²/2 successes of z², the others by
    1 of 2), and the interval is moved by 2z²(θ q1(1−q1)/m1 − (1−θ) q0(1−q0)/m0).

    Args:
        judged_right: answers that the judge called right; none of them from the calibration.
        num_judged: answers judged.
        errors: of this judge, on answers like these.
        confidence: of the interval.

    Raises:
        EvaluateError: the judge is not shown to be better than chance (the interval of q0 + q1 − 1 reaches 0), so that
            its verdicts say nothing about the answers; or counts that do not fit.
    """
    if num_judged < 1 or not 0 <= judged_right <= num_judged:
        raise EvaluateError(f"bias_corrected: {judged_right} of {num_judged} is no share")
    errors.check()
    informed = errors.informedness(confidence)
    if informed.value <= 0 or informed.low <= 0:
        raise EvaluateError(
            f"bias_corrected: this judge is not shown to be better than chance: specificity {errors.specificity:.3f} + "
            f"sensitivity {errors.sensitivity:.3f} − 1 = {informed.value:.3f} "
            f"[{informed.low:.3f}, {informed.high:.3f}]. "
            "Its scores cannot be put right; take another judge, or calibrate on more answers"
        )
    z = z_value(confidence)
    value = (judged_right / num_judged + errors.specificity - 1) / (errors.specificity + errors.sensitivity - 1)
    n, m0, m1 = num_judged + z * z, errors.num_negatives + 2, errors.num_positives + 2
    p, q0, q1 = (judged_right + z * z / 2) / n, (errors.true_negatives + 1) / m0, (errors.true_positives + 1) / m1
    slope = q0 + q1 - 1
    centre = (p + q0 - 1) / slope
    noise0, noise1 = q0 * (1 - q0) / m0, q1 * (1 - q1) / m1
    moved = centre + 2 * z * z * (centre * noise1 - (1 - centre) * noise0)
    half = z * math.sqrt(p * (1 - p) / n + (1 - centre) ** 2 * noise0 + centre**2 * noise1) / slope
    return Interval(
        value=min(1.0, max(0.0, value)),
        low=min(1.0, max(0.0, moved - half)),
        high=min(1.0, max(0.0, moved + half)),
        n=num_judged,
        method="Rogan–Gladen, calibration noise included",
        confidence=confidence,
    )
