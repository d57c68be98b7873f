"""Suite: the tasks, how to sample answers to them, and who grades."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from posttrain import data
from posttrain.core import EvaluateError, Grader, Sampling, Task, content_hash, read_jsonl

GREEDY = Sampling(max_tokens=256, temperature=0.0)


@dataclass(frozen=True)
class Suite:
    """An evaluation that can be run again on another model and gives comparable numbers.

    Args:
        name: short; artifacts and reports carry it.
        tasks: what is asked, each id once.
        sampling: greedy, or `n` samples at a temperature.
        grader: an answer is right where it gives full marks (a score of 1 or more).
        k: for which k to give pass@k; each at most `sampling.n`. By default 1, 2, 4 … up to n.
    """

    name: str
    tasks: Sequence[Task]
    sampling: Sampling
    grader: Grader
    k: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise EvaluateError(f"suite {self.name!r} has no tasks")
        twice = [task_id for task_id, count in Counter(task.id for task in self.tasks).items() if count > 1]
        if twice:
            raise EvaluateError(
                f"suite {self.name!r}: task id {twice[0]!r} occurs more than once; ids pair the answers"
            )
        if any(not 1 <= k <= self.sampling.n for k in self.k):
            raise EvaluateError(
                f"suite {self.name!r}: pass@k for k={self.k} needs sampling.n ≥ k, not {self.sampling.n}"
            )
        if self.sampling.n > 1 and self.sampling.temperature == 0:
            raise EvaluateError(f"suite {self.name!r}: {self.sampling.n} greedy samples are {self.sampling.n} copies")

    @cached_property
    def suite_hash(self) -> str:
        """The same for the same tasks and the same grader; two reports compare only if it is equal."""
        return content_hash({"tasks": [task.to_dict() for task in self.tasks], "grader": self.grader.name})

    def ks(self) -> tuple[int, ...]:
        """For which k pass@k is given."""
        n = self.sampling.n
        return self.k or tuple(sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n}))


def suite_from_file(
    path: Path | str,
    *,
    grader: Grader,
    sampling: Sampling = GREEDY,
    name: str | None = None,
    tags: Sequence[str] = (),
    cluster: str | None = None,
    chat: bool = False,
    limit: int | None = None,
    seed: int = 0,
    k: tuple[int, ...] = (),
) -> Suite:
    """A suite from a file of tasks, or of rows with prompts and answers in any format that `data.load` reads.

    Args:
        path: JSON lines of Task records, or any data file.
        name: by default the file's name without its endings.
        tags: names of a row's facts to report separately.
        cluster: name of the fact that tasks of one cluster share.
        chat: make text prompts a user's turn.
        limit: take this many tasks, drawn by `seed`; all by default.

    Raises:
        DataError: a row is not what it should be.
        EvaluateError: no tasks, or ids that occur twice.
    """
    path = Path(path)
    if _holds_tasks(path):
        tasks = read_jsonl(path, Task)
    else:
        tasks = [data.to_task(row, tags=tags, cluster=cluster, chat=chat) for row in data.load(path)]
    if limit is not None and limit < len(tasks):
        chosen = sorted(random.Random(seed).sample(range(len(tasks)), limit))
        tasks = [tasks[index] for index in chosen]
    return Suite(name or path.name.split(".")[0], tasks, sampling, grader, k)


def _holds_tasks(path: Path) -> bool:
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"record":"task/1"' in file.readline().replace(b" ", b"")
