"""Where a step's prompts come from: a stream of shuffled epochs, or a curriculum by running pass rates.

Both are drawn from; a draw depends on the seed and the state alone, and the state is small and plain: kept in the
checkpoint (`to_dict`, `restore`), a resumed run draws what the killed one would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from posttrain.core import CheckpointError, ConfigError, Task, generator
from posttrain.rollout.schedule import PromptSchedule


class Draw(NamedTuple):
    """Some tasks to sample."""

    tasks: list[Task]
    number: int  # how many draws came before: a group is known by its task and its draw
    epoch: int  # in which no task is drawn twice


class PromptSource(Protocol):
    """Gives tasks, and may learn from what became of them."""

    def draw(self, num: int) -> Draw:
        """The next tasks, at least one and at most `num`."""
        ...

    def record(self, rates: Mapping[str, float]) -> None:
        """Pass rates of a step, by task id."""
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The state, in plain JSON types."""
        ...

    def restore(self, values: dict[str, Any]) -> None:
        """Take up what `to_dict` gave."""
        ...


class PromptStream:
    """Shuffled epochs, one draw after another, none across the end of an epoch.

    Draws of the same size are the steps of a `PromptSchedule` with that many prompts per step and the same seed.

    Args:
        tasks: what there is to do; their ids differ.
        seed: the run's seed.
    """

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self._schedule = PromptSchedule(tasks, seed, 1)
        self.position = 0  # tasks drawn
        self.index = 0  # draws made

    def draw(self, num: int) -> Draw:
        """The next tasks; fewer than `num` only at the end of an epoch."""
        _check(num)
        size = len(self._schedule.tasks)
        epoch, place = divmod(self.position, size)
        taken = min(num, size - place)
        tasks = [self._schedule.tasks_at(self.position + offset)[0] for offset in range(taken)]
        self.position += taken
        self.index += 1
        return Draw(tasks, self.index - 1, epoch)

    def record(self, rates: Mapping[str, float]) -> None:
        """Nothing: the stream does not learn."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Position and number of draws."""
        return {"position": self.position, "index": self.index}

    def restore(self, values: dict[str, Any]) -> None:
        """Take up what `to_dict` gave."""
        self.position, self.index = _numbers(values, "position", "index")


class PassRateCurriculum:
    """Favours prompts that are sometimes solved: they are what a group-relative method learns from.

    Each draw is a weighted sample without replacement. Weight 1 have tasks whose running pass rate lies in
    [low, high], and tasks not tried yet; `outside` all others, so that what was too hard or too easy is looked at
    again now and then. The running rate is an exponential mean of the steps' rates.

    Args:
        tasks: what there is to do; their ids differ.
        seed: the run's seed.
        low: of the window.
        high: of the window; ScaleRL leaves out what is solved nine times in ten (https://arxiv.org/abs/2510.13786).
        outside: weight outside the window, in [0, 1]; with 0 such tasks only fill up draws that would be short.
        decay: weight of the past in the running rate, in [0, 1); 0 remembers the last step only.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: two tasks of one id.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        *,
        low: float = 0.05,
        high: float = 0.9,
        outside: float = 0.1,
        decay: float = 0.5,
    ) -> None:
        if not (0 <= low <= high <= 1 and 0 <= outside <= 1 and 0 <= decay < 1):
            raise ConfigError(
                f"curriculum: 0 ≤ low ≤ high ≤ 1, outside in [0, 1] and decay in [0, 1) are needed, "
                f"not {low}, {high}, {outside} and {decay}"
            )
        self.tasks = PromptSchedule(tasks, seed, 1).tasks  # checks that ids differ
        self.seed = seed
        self.low, self.high, self.outside, self.decay = low, high, outside, decay
        self.index = 0
        self.rates: dict[str, float] = {}

    def weight(self, task_id: str) -> float:
        """How eagerly a task is drawn, in [0, 1]."""
        rate = self.rates.get(task_id)
        return 1.0 if rate is None or self.low <= rate <= self.high else self.outside

    def draw(self, num: int) -> Draw:
        """`num` tasks, or all that there are.

        Weighted sampling without replacement by Efraimidis and Spirakis (Information Processing Letters 97, 2006): the
        largest of u^(1/w), u uniform.
        """
        _check(num)
        dice = generator(self.seed, "curriculum", self.index)
        keys = []
        for place, task in enumerate(self.tasks):
            chance, weight = dice.random(), self.weight(task.id)
            keys.append((chance ** (1 / weight) if weight else chance - 1.0, place))
        best = sorted(keys, reverse=True)[:num]
        self.index += 1
        return Draw([self.tasks[place] for _, place in best], self.index - 1, self.index - 1)

    def record(self, rates: Mapping[str, float]) -> None:
        """Mix a step's pass rates into the running ones."""
        for task_id, rate in rates.items():
            before = self.rates.get(task_id)
            self.rates[task_id] = rate if before is None else self.decay * before + (1 - self.decay) * rate

    def metrics(self) -> dict[str, float]:
        """`curriculum/tried` and `curriculum/in_window`: shares of the tasks; `curriculum/pass_rate`: mean of those."""
        tried = len(self.rates) / len(self.tasks)
        inside = sum(self.low <= rate <= self.high for rate in self.rates.values()) / len(self.tasks)
        metrics = {"curriculum/tried": tried, "curriculum/in_window": inside}
        return metrics | ({"curriculum/pass_rate": fmean(self.rates.values())} if self.rates else {})

    def to_dict(self) -> dict[str, Any]:
        """Number of draws and running rates."""
        return {"index": self.index, "rates": dict(self.rates)}

    def restore(self, values: dict[str, Any]) -> None:
        """Take up what `to_dict` gave."""
        (self.index,) = _numbers(values, "index")
        self.rates = {str(task_id): float(rate) for task_id, rate in values.get("rates", {}).items()}


def _check(num: int) -> None:
    if num < 1:
        raise ConfigError(f"a draw of {num} tasks: at least 1 is needed")


def _numbers(values: dict[str, Any], *names: str) -> list[int]:
    missing = [name for name in names if not isinstance(values.get(name), int)]
    if missing:
        raise CheckpointError(f"not the state of this source of prompts: {', '.join(missing)} is missing in {values!r}")
    return [values[name] for name in names]
