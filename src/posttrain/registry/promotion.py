"""Promotion: the gate that a candidate must pass to become champion, and the record of what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from posttrain.core import Comparison, Config, EvalReport, ModelCard, Record, doc

Action = Literal["promoted", "refused", "rolled_back"]


class Evidence(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the registry knows of a candidate, for the gate."""

    report: EvalReport | None  # the newest, on the comparison's suite
    contamination: dict[str, float | None]  # dataset in its lineage → fraction of the suite it touches; None: unknown


class Gate(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a candidate must show. The defaults ask for a proven improvement on enough tasks."""

    min_difference: Annotated[
        float, doc("the lower bound of candidate − champion must be above this (score units)", ge=-1.0)
    ] = 0.0
    confidence: Annotated[float, doc("least confidence of the comparison's interval", gt=0.0, lt=1.0)] = 0.95
    max_p_value: Annotated[float, doc("largest p of McNemar's exact test; 1 asks nothing", ge=0.0, le=1.0)] = 0.05
    min_samples: Annotated[int, doc("least number of independent tasks behind the numbers", ge=1)] = 30
    max_failed: Annotated[float, doc("largest fraction of samples that could not be graded", ge=0.0, le=1.0)] = 0.05
    require_no_contamination: Annotated[
        bool, doc("refuse where training data in the lineage is known to overlap the suite")
    ] = True
    require_contamination_check: Annotated[
        bool, doc("refuse also where a dataset in the lineage was never checked against the suite")
    ] = False
    max_contamination: Annotated[
        float, doc("fraction of the suite's tasks that a dataset may touch", ge=0.0, le=1.0)
    ] = 0.0

    def reasons(
        self,
        *,
        first: bool,
        comparison: Comparison | None,
        evidence: Evidence,
    ) -> list[str]:
        """Why not; empty where the candidate may pass.

        Args:
            first: the project has no champion yet, so there is nothing to compare with.
            comparison: candidate against the present champion.
            evidence: what the registry knows of the candidate.
        """
        found = self._report_reasons(evidence.report)
        if comparison is not None:
            found += self._comparison_reasons(comparison)
        elif not first:
            found.append("no comparison with the champion was given: evaluate both on the same suite and compare")
        return found + self._contamination_reasons(evidence.contamination)

    def _report_reasons(self, report: EvalReport | None) -> list[str]:
        if report is None:
            return ["the candidate has no evaluation report in the registry: evaluate it and add_report"]
        found = []
        tasks = len({sample.task.id for sample in report.samples})
        if tasks < self.min_samples:
            found.append(f"its report covers {tasks} tasks, the gate asks for {self.min_samples}")
        failed = report.num_failed / max(1, len(report.samples))
        if failed > self.max_failed:
            found.append(
                f"{report.num_failed} of {len(report.samples)} samples could not be graded "
                f"({failed:.1%}, at most {self.max_failed:.1%})"
            )
        return found

    def _comparison_reasons(self, comparison: Comparison) -> list[str]:
        found = []
        gap = comparison.difference
        if not gap.low > self.min_difference:  # also refuses NaN
            found.append(
                f"the difference {gap.value:+.4f} has the {gap.confidence:.0%} interval "
                f"[{gap.low:+.4f}, {gap.high:+.4f}]; its lower bound must be above {self.min_difference:+.4f}"
            )
        if gap.confidence < self.confidence:
            found.append(
                f"the comparison's confidence is {gap.confidence:.3f}, the gate asks for {self.confidence:.3f}"
            )
        if gap.n < self.min_samples:
            found.append(f"the comparison rests on {gap.n} tasks, the gate asks for {self.min_samples}")
        if not comparison.p_value <= self.max_p_value:
            found.append(f"McNemar's p is {comparison.p_value:.4f}, the gate asks for at most {self.max_p_value:.4f}")
        return found

    def _contamination_reasons(self, contamination: Mapping[str, float | None]) -> list[str]:
        found = []
        for name, fraction in contamination.items():
            if fraction is None and self.require_contamination_check:
                found.append(f"dataset {name} was never checked against the suite")
            if fraction is not None and self.require_no_contamination and not fraction <= self.max_contamination:
                found.append(
                    f"dataset {name} touches {fraction:.1%} of the suite, at most {self.max_contamination:.1%}"
                )
        return found


class Promotion(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="promotion/1"):
    """One decision about a project's champion, kept for ever: also refusals."""

    project: str
    action: Action
    card: ModelCard  # who was to become champion
    previous: str | None = None  # id of the champion before
    comparison: Comparison | None = None
    gate: Gate | None = None
    refused_for: tuple[str, ...] = ()  # the gate's reasons; with `forced` they were overruled
    forced: bool = False
    actor: str = ""
    reason: str = ""  # the person's words
    created_s: float = 0.0  # Unix time
    seq: int = 0  # its place in the registry's history
