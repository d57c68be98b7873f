"""People as graders: answers go into the feedback store, and what people say of them there comes back as grades."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from posttrain.core import Feedback, Interaction, Sampling, Trajectory, UsageError, content_hash
from posttrain.feedback import FeedbackStore
from posttrain.grade import HumanGrade


class StoreGrades:
    """Implements `grade.HumanGrades` on a feedback store.

    An answer to be graded is logged as an interaction under the trajectory's id, where the server's feedback pages and
    `posttrain feedback` find it; a thumb, a rating or a named label is a grade. Of each person the latest counts.

    Args:
        store: the store.
        model: under which name the answers are logged.
        ratings: lowest and highest rating, which become 0 and 1.
        label: name of a label whose value is the grade (a boolean, or a number from 0 to 1).
        people: whose signals count; None: everybody's.
    """

    def __init__(
        self,
        store: FeedbackStore,
        *,
        model: str = "policy",
        ratings: tuple[float, float] = (1.0, 5.0),
        label: str | None = None,
        people: Sequence[str] | None = None,
    ) -> None:
        if ratings[0] >= ratings[1]:
            raise UsageError(f"people: ratings go from {ratings[0]:g} to {ratings[1]:g}, which is no scale")
        self._store, self._model, self._ratings, self._label = store, model, ratings, label
        self._people = None if people is None else frozenset(people)

    async def ask_for(self, trajectory: Trajectory) -> None:
        """Log the answer, once."""
        await asyncio.to_thread(self._log, trajectory)

    async def grades_of(self, trajectory: Trajectory) -> Sequence[HumanGrade]:
        """The latest grade of each person."""
        signals = await asyncio.to_thread(self._store.feedback_for, interaction_id(trajectory))
        latest: dict[str, tuple[float, HumanGrade]] = {}
        for signal in signals:
            score = self._score(signal)
            if score is None or (self._people is not None and signal.source not in self._people):
                continue
            grade = HumanGrade(score=score, person=signal.source, comment=signal.comment)
            if signal.source not in latest or signal.created_s >= latest[signal.source][0]:
                latest[signal.source] = (signal.created_s, grade)
        return [grade for _, grade in latest.values()]

    def _score(self, signal: Feedback) -> float | None:
        value = signal.value
        if signal.kind == "thumb" and isinstance(value, bool):
            return float(value)
        if signal.kind == "rating" and isinstance(value, int | float):
            low, high = self._ratings
            return min(1.0, max(0.0, (value - low) / (high - low)))
        if signal.kind == "label" and self._label == signal.name and isinstance(value, bool | int | float):
            return min(1.0, max(0.0, float(value)))
        return None

    def _log(self, trajectory: Trajectory) -> None:
        if self._store.interaction(interaction_id(trajectory)) is not None:
            return  # a resumed run asks again for what it asked before
        own = [place for place, written in enumerate(trajectory.mask) if written]
        prompt = trajectory.task.prompt
        interaction = Interaction(
            id=interaction_id(trajectory),
            choice=0,
            model=self._model,
            model_name=self._model,
            messages=None if isinstance(prompt, str) else prompt,
            prompt=trajectory.task.prompt_text(),
            prompt_tokens=trajectory.tokens[: own[0]] if own else trajectory.tokens,
            tokens=tuple(trajectory.tokens[place] for place in own),
            logprobs=tuple(trajectory.logprobs[place] for place in own),
            text=trajectory.text,
            stop_reason=trajectory.stop_reason,
            sampling=Sampling(),
            weight_version=trajectory.weight_version,
            created_s=time.time(),
            metadata={"task_id": trajectory.task.id, "trajectory_id": trajectory.id},
        )
        self._store.log(interaction)


def interaction_id(trajectory: Trajectory) -> str:
    """Under which id an answer is in the store; another run's answer of the same name has another one."""
    return f"grade-{trajectory.id}-{content_hash(trajectory.text)[:12]}"
