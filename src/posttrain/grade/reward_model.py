"""A reward model as a grader. The model is behind `ScoreText`: it may run here, on another machine, or be a fake."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import right, trajectory_from_text, wrong

Aggregate = Literal["last", "min", "mean", "product"]
EnsembleRule = Literal["mean", "worst_case", "uncertainty", "lower_bound"]


class ScoreText(Protocol):
    """Tasks (their prompts and tools are read) with answers in, numbers out."""

    async def score(self, items: Sequence[tuple[Task, str]]) -> Sequence[tuple[float, ...] | Exception]:
        """For each item, in order, its numbers: one for an outcome, one for each step of a process.

        An item that cannot be scored is an exception in its place. Calls that wait at the same time may share a batch.
        """
        ...


class RewardModel:
    """The score that a reward model gives to the answer.

    Batching is the scorer's: `grade_all` asks for many answers at once, and a scorer such as `engine.LocalScorer` runs
    those that wait in one forward pass. An answer that cannot be scored (too long, a number that is not finite, a
    deadline passed) is a grade with an error.

    Args:
        scorer: the model.
        name: the grader's name.
        aggregate: of a process reward model's steps, one number: "last" (the value of the whole), "min" (the weakest
            step; Lightman et al., https://arxiv.org/abs/2305.20050, appendix F, and Math-Shepherd), "product" (the
            probability that every step is right) or "mean". An outcome's one number is each of them.
        probability: take σ of every number first. "product" needs it.
        adjust: from the number to the reward, last of all: `Moments.whiten`, a clip, a scale.
        better: gold answers and near misses by which the instance proves itself: (task, gold, near miss). The gold must
            score higher; how high is the model's own affair.
        cases: cases with ranges of their own, of the final number.
        deadline_s: seconds for each answer; None leaves that to `grade_all`.

    Raises:
        ConfigError: an unknown aggregate, or a product of what is no probability.
    """

    def __init__(
        self,
        scorer: ScoreText,
        name: str = "reward_model",
        *,
        aggregate: Aggregate = "last",
        probability: bool = False,
        adjust: Callable[[float], float] | None = None,
        better: Sequence[tuple[Task, str, str]] = (),
        cases: Sequence[GradeCase] = (),
        deadline_s: float | None = None,
    ) -> None:
        if aggregate not in ("last", "min", "mean", "product"):
            raise ConfigError(f"grader {name!r}: aggregate must be last, min, mean or product, not {aggregate!r}")
        if aggregate == "product" and not probability:
            raise ConfigError(f"grader {name!r}: a product is of probabilities; set probability=True")
        if deadline_s is not None and deadline_s <= 0:
            raise ConfigError(f"grader {name!r}: deadline_s must be above 0, not {deadline_s}")
        self.name = name
        self.scorer = scorer
        self._aggregate: Aggregate = aggregate
        self._probability = probability
        self._adjust = adjust
        self._better = tuple(better)
        self._cases = tuple(cases)
        self._deadline_s = deadline_s

    @property
    def graders(self) -> tuple[Any, ...]:
        """What the proof runs besides: that every gold answer scores above its near miss."""
        return (Prefers(self, self._better),) if self._better else ()

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Score the trajectory's text as the answer to its task's prompt; in an episode of several turns, its last turn
        as the answer to all that came before.

        Returns:
            The reward; `parts` has the number of steps and their min, mean and last where there are several.
        """
        started_s = time.perf_counter()
        asked = self.scorer.score([_asked_and_answered(trajectory)])
        try:
            found = (await asyncio.wait_for(asked, self._deadline_s))[0]
        except TimeoutError as error:
            found = error if self._deadline_s is None else TimeoutError(f"no score within {self._deadline_s:g} s")
        seconds = time.perf_counter() - started_s
        if isinstance(found, Exception):
            return Grade(score=None, grader=self.name, error=f"{type(found).__name__}: {found}", seconds=seconds)
        if not found or not all(math.isfinite(value) for value in found):
            return Grade(score=None, grader=self.name, error=f"its scores are {found}", seconds=seconds)
        values = [sigmoid(value) for value in found] if self._probability else list(found)
        score = aggregated(values, self._aggregate)
        parts = {}
        if len(values) > 1:
            parts = {
                "steps": float(len(values)),
                "min": min(values),
                "mean": math.fsum(values) / len(values),
                "last": values[-1],
            }
        if self._adjust is not None:
            parts["raw"], score = score, self._adjust(score)
        return Grade(score=score, grader=self.name, parts=parts, seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """The cases with ranges that it was given."""
        return self._cases


class Prefers:
    """1 where a reward model scores an answer above what it is compared with: how a reward model proves itself.

    A gold answer is compared with its near miss, a near miss with its gold answer.
    """

    def __init__(self, model: RewardModel, better: Sequence[tuple[Task, str, str]]) -> None:
        self.name = f"{model.name}/prefers"
        self._model = model
        self._better = tuple(better)

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Compare the trajectory's text with its opponent."""
        for task, gold, near_miss in self._better:
            if task == trajectory.task and trajectory.text in (gold, near_miss):
                opponent = near_miss if trajectory.text == gold else gold
                own, other = await asyncio.gather(
                    self._model.grade(trajectory), self._model.grade(trajectory_from_text(task, opponent))
                )
                if own.score is None or other.score is None:
                    raise GradeError(own.error or other.error or "no score")
                return Grade(
                    score=float(own.score > other.score),
                    grader=self.name,
                    parts={"own": own.score, "other": other.score},
                    rationale=f"{own.score:.4g} against {other.score:.4g}",
                )
        raise GradeError(f"{self.name}: no opponent for the answer {trajectory.text[:60]!r}")

    def cases(self) -> Sequence[GradeCase]:
        """Each gold answer must win and each near miss lose."""
        found = []
        for task, gold, near_miss in self._better:
            found += [
                right(task, gold, "gold, against its near miss"),
                wrong(task, near_miss, "near miss, against gold"),
            ]
        return tuple(found)


class EnsembleScorer:
    """Several scorers as one, so that no member's mistake is worth seeking.

        mean          mean_m r_m
        worst_case    min_m r_m
        uncertainty   mean_m r_m − coefficient · var_m r_m
        lower_bound   mean_m r_m − coefficient · std_m r_m

    An answer that one member cannot score is an error of the whole.

    Args:
        scorers: the members, on one scale (whitened, or trained with centring).
        how: the rule.
        coefficient: of the spread; 0 or more.

    Source: Coste et al., https://arxiv.org/abs/2310.02743.
    """

    def __init__(
        self, scorers: Sequence[ScoreText], how: EnsembleRule = "worst_case", *, coefficient: float = 1.0
    ) -> None:
        if not scorers:
            raise ConfigError("an ensemble needs at least one scorer")
        if how not in ("mean", "worst_case", "uncertainty", "lower_bound") or coefficient < 0:
            raise ConfigError(
                f"an ensemble is mean, worst_case, uncertainty or lower_bound with a coefficient of 0 or more, "
                f"not {how!r} with {coefficient}"
            )
        self._scorers = tuple(scorers)
        self._how: EnsembleRule = how
        self._coefficient = coefficient

    async def score(self, items: Sequence[tuple[Task, str]]) -> Sequence[tuple[float, ...] | Exception]:
        """See `ScoreText`."""
        members = await asyncio.gather(*(scorer.score(items) for scorer in self._scorers))
        return [self._one([member[index] for member in members]) for index in range(len(items))]

    def _one(self, found: Sequence[tuple[float, ...] | Exception]) -> tuple[float, ...] | Exception:
        scores: list[tuple[float, ...]] = []
        for member in found:
            if isinstance(member, Exception):
                return member
            scores.append(member)
        if len({len(values) for values in scores}) > 1:
            return GradeError(f"the ensemble's members see {[len(values) for values in scores]} steps in one answer")
        return tuple(ensemble_score(step, self._how, self._coefficient) for step in zip(*scores, strict=True))


def ensemble_score(values: Sequence[float], how: EnsembleRule, coefficient: float = 1.0) -> float:
    """One number from those of an ensemble; see `EnsembleScorer`. Spreads are divided by the number of members."""
    if how == "worst_case":
        return min(values)
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    spread = {"mean": 0.0, "uncertainty": variance, "lower_bound": math.sqrt(variance)}[how]
    return mean - coefficient * spread


def _asked_and_answered(trajectory: Trajectory) -> tuple[Task, str]:
    task, messages = trajectory.task, trajectory.messages
    opening = 0 if isinstance(task.prompt, str) else len(task.prompt)
    if len(messages) > opening + 1 and messages[-1].role == "assistant":
        return task.replace(prompt=messages[:-1]), messages[-1].content
    return task, trajectory.text


def aggregated(values: Sequence[float], how: Aggregate) -> float:
    """One number from those of the steps."""
    if how == "last":
        return values[-1]
    if how == "min":
        return min(values)
    return math.prod(values) if how == "product" else math.fsum(values) / len(values)


def sigmoid(x: float) -> float:
    """1 / (1 + e^−x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
