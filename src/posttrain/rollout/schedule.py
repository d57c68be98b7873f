"""Which tasks come in which step."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.core import ConfigError, DataError, Task, content_hash, generator


class PromptSchedule:
    """The tasks of every step, as a function of the step alone: resuming at step k needs nothing but k.

    Each epoch is a new shuffle, from the seed and the epoch's number. Without `drop_last` every task comes exactly once
    in every epoch, and the epoch's last step is smaller where the number of tasks is no multiple of
    `prompts_per_step`; steps never cross epochs. With `drop_last` every step is full, and the epoch's last few tasks,
    others in every epoch, are left out of it.

    Args:
        tasks: what there is to do; their ids differ.
        seed: the run's seed.
        prompts_per_step: tasks in a full step.
        drop_last: leave out each epoch's incomplete step.

    Raises:
        ConfigError: no tasks, no prompts per step, or `drop_last` with fewer tasks than a step takes.
        DataError: two tasks of one id.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, prompts_per_step: int, *, drop_last: bool = False) -> None:
        if not tasks or prompts_per_step < 1:
            raise ConfigError(
                f"schedule: {len(tasks)} tasks, {prompts_per_step} prompts per step; both need at least 1"
            )
        if drop_last and len(tasks) < prompts_per_step:
            raise ConfigError(
                f"schedule: with drop_last, {len(tasks)} tasks never fill a step of {prompts_per_step} prompts"
            )
        first: dict[str, int] = {}
        for position, task in enumerate(tasks):
            if first.setdefault(task.id, position) != position:
                raise DataError(f"schedule: task id {task.id!r} comes twice, at {first[task.id]} and {position}")
        self.tasks = tuple(tasks)
        self.seed = seed
        self.prompts_per_step = prompts_per_step
        self.drop_last = drop_last
        self._shuffled: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every task comes (at most) once."""
        full, rest = divmod(len(self.tasks), self.prompts_per_step)
        return full + (1 if rest and not self.drop_last else 0)

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def tasks_at(self, step: int) -> list[Task]:
        """The tasks of a step, from 0."""
        if step < 0:
            raise ConfigError(f"schedule: steps count from 0, not {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        start = place * self.prompts_per_step
        return [self.tasks[position] for position in order[start : start + self.prompts_per_step]]

    def fingerprint(self) -> str:
        """Twelve hex digits, the same for the same tasks in the same order and the same settings.

        Keep it in the checkpoint: a run that resumes with another one would skip or repeat prompts.
        """
        settings = [self.seed, self.prompts_per_step, self.drop_last, [task.content_hash() for task in self.tasks]]
        return content_hash(settings)[:12]

    def _order(self, epoch: int) -> list[int]:
        """The epoch's shuffle; the last one asked for is kept."""
        known, order = self._shuffled
        if known != epoch:
            order = list(range(len(self.tasks)))
            generator(self.seed, "prompt_schedule", epoch).shuffle(order)
            self._shuffled = (epoch, order)
        return order
