"""The grader of mathematical answers: equal as mathematics, not as text, by math-verify (the extra `math`)."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence

from posttrain.core import Grade, GradeCase, GradeError, MissingExtraError, Task, Trajectory
from posttrain.grade.answer import accepted_answers, answer_text, binary, right, wrong
from posttrain.grade.combine import in_daemon_thread
from posttrain.grade.number import boxed
from posttrain.grade.worker_pool import WorkerFailure, WorkerPool

_MAX_CHARACTERS = 20_000  # only the end of a longer answer is read


class Maths:
    """1 where the answer's mathematics equals the gold answer's (`task.answer`, in LaTeX), else 0.

    Where the answer has a `\\boxed{…}`, the last one is compared, otherwise math-verify looks for mathematics in the
    text. math-verify runs in worker processes: one that hangs or crashes is killed and replaced, and that grade is an
    error, never 0. Grading works from any thread and any event loop.

    Args:
        timeout_s: seconds for one answer, from the moment a worker has it.
        workers: processes, each some 150 MB; grades beyond them wait.
        name: the grader's name.

    Raises:
        MissingExtraError: math-verify is not installed.
    """

    def __init__(self, timeout_s: float = 8.0, workers: int = 1, name: str = "maths") -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtraError("math-verify", "math", "grade.Maths")
        self.name = name
        self.max_concurrency = workers
        self._timeout_s = timeout_s
        self._pool = WorkerPool("posttrain.grade.maths_worker", workers)

    async def prepare(self) -> None:
        """Start the workers, so that their start is no part of a grade's deadline."""
        await in_daemon_thread(self._pool.start)

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Compare; raises GradeError where the gold answer cannot be read or the answer cannot be judged."""
        started_s = time.perf_counter()
        golds = accepted_answers(trajectory.task)
        text = answer_text(trajectory)[-_MAX_CHARACTERS:]
        inside = boxed(text)
        answer = text if inside is None else f"\\boxed{{{inside}}}"
        found = ""
        for gold in golds:
            gold_inside = boxed(gold)
            verdict = await in_daemon_thread(self._ask, trajectory.task, gold_inside or gold, answer)
            if verdict["correct"]:
                return binary(self.name, True, started_s)
            found = verdict["found"]
        return binary(self.name, False, started_s, f"read as {found}" if found else "no mathematics found")

    def cases(self) -> Sequence[GradeCase]:
        """Gold answers in other forms, and near misses."""
        half = Task(id="half", prompt="What is 3/6?", answer="\\frac{1}{2}")
        roots = Task(id="roots", prompt="Solve x^2 = 4.", answer="\\{-2, 2\\}")
        expression = Task(id="expression", prompt="Expand.", answer="x^2 + 2x + 1")
        return (
            right(half, "So it is \\boxed{\\frac{1}{2}}."),
            right(half, "\\boxed{0.5}"),
            right(half, "The answer is $\\dfrac{2}{4}$."),
            right(roots, "\\boxed{\\{2, -2\\}}"),
            right(expression, "\\boxed{(x+1)^2}"),
            wrong(half, "\\boxed{\\frac{2}{1}}"),
            wrong(half, "\\boxed{0.51}"),
            wrong(half, "First \\boxed{\\frac{1}{2}}, no: \\boxed{2}", "the last box counts"),
            wrong(roots, "\\boxed{\\{2\\}}", "one root of two"),
            wrong(expression, "\\boxed{x^2 + 2x}"),
            wrong(half, "I do not know."),
        )

    def close(self) -> None:
        """End the workers; they also end with this object."""
        self._pool.close()

    def _ask(self, task: Task, gold: str, answer: str) -> dict[str, object]:
        try:
            verdict = self._pool.call({"gold": gold, "answer": answer}, self._timeout_s)
        except WorkerFailure as failure:
            raise GradeError(f"task {task.id!r}: {failure}") from failure
        if "error" in verdict:
            raise GradeError(f"task {task.id!r}: {verdict['error']}")
        return verdict
