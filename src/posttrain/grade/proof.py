"""Graders that prove themselves: gold answers score full marks, near misses do not."""

from __future__ import annotations

import asyncio
import importlib.util
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from posttrain.core import Grade, GradeCase, GradeError, Grader, ProvesItself, Record, Task, Trajectory
from posttrain.grade.answer import answer_text, right, trajectory_from_text, wrong
from posttrain.grade.batch import grade_all
from posttrain.grade.combine import Function, Weighted
from posttrain.grade.judge_proof import judged_graders
from posttrain.grade.maths import Maths
from posttrain.grade.number import Number
from posttrain.grade.reward_model import Prefers, RewardModel
from posttrain.grade.sql_result import SqlResult
from posttrain.grade.text import Exact, Length, Regex
from posttrain.grade.verifier_proof import verifier_graders


class ProvenCase(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A case and the grade it got."""

    case: GradeCase
    grade: Grade

    @property
    def holds(self) -> bool:
        """True where the score lies where it must."""
        return self.grade.score is not None and self.case.low <= self.grade.score <= self.case.high


class ProofReport(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of a grader's own cases, and of those of the graders it is made of."""

    grader: str
    cases: tuple[ProvenCase, ...]
    parts: tuple[ProofReport, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not hold, one line each; empty where the grader is proven."""
        found = []
        for proven in self.cases:
            if not proven.holds:
                case, grade = proven.case, proven.grade
                got = f"failed: {grade.error}" if grade.score is None else f"scored {grade.score:g}"
                reason = f" ({case.why})" if case.why else ""
                found.append(
                    f"{self.grader}: {case.text[:100]!r} for task {case.task.id!r}{reason} {got}, "
                    f"not within [{case.low:g}, {case.high:g}]"
                )
        if not self.cases and not self.parts:
            found.append(f"{self.grader}: has no cases; give it gold answers and near misses: cases=[…]")
        elif self.cases and not any(case.case.high < 1 for case in self.cases) and not self.parts:
            found.append(f"{self.grader}: has no near miss among its cases")
        return (*found, *(problem for part in self.parts for problem in part.problems))

    @property
    def ok(self) -> bool:
        """True where every case holds."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise GradeError naming every case that does not hold."""
        if self.problems:
            raise GradeError(f"the grader {self.grader!r} fails its own proof:\n  " + "\n  ".join(self.problems))


def prove(grader: Grader, *, deadline_s: float = 60.0) -> ProofReport:
    """Run a grader on its own cases, and the graders it is made of on theirs.

    May be called where an event loop runs; it waits there.

    Args:
        grader: any grader; one without `cases()` is not proven.
        deadline_s: seconds for each case.
    """
    outcome: Future[ProofReport] = Future()

    def work() -> None:
        try:
            outcome.set_result(asyncio.run(prove_all(grader, deadline_s)))
        except Exception as error:  # noqa: BLE001  it is raised again in the caller's thread
            outcome.set_exception(error)

    # A loop of its own in a thread of its own, since the caller's thread may have one running.
    threading.Thread(target=work, name="proof", daemon=True).start()
    try:
        return outcome.result()
    except Exception as error:
        raise GradeError(f"the proof of grader {grader.name!r} broke off: {type(error).__name__}: {error}") from error


async def prove_all(grader: Grader, deadline_s: float = 60.0) -> ProofReport:
    """`prove` for callers with an event loop: a grader that lives in this loop proves itself in it."""
    cases = tuple(grader.cases()) if isinstance(grader, ProvesItself) else ()
    trajectories = [
        trajectory_from_text(case.task, case.text, id=f"{case.task.id}/{n}") for n, case in enumerate(cases)
    ]
    grades = await grade_all(grader, trajectories, deadline_s=deadline_s)
    parts = [await prove_all(part, deadline_s) for part in getattr(grader, "graders", ())]
    proven = tuple(ProvenCase(case=case, grade=grade) for case, grade in zip(cases, grades, strict=True))
    return ProofReport(grader=grader.name, cases=proven, parts=tuple(parts))


def all_graders() -> list[Grader]:
    """One small instance of every built-in grader, each able to prove itself here and now.

    SqlResult gets a temporary database, which goes with it. Left out are those whose extra is not installed (Maths,
    JsonSchema), and those that run programs (UnitTests, InputOutput) where no sandbox is to be had.
    """
    fruit = Task(id="fruit", prompt="An apple?", answer="yes")
    tagged = [right(fruit, "<answer>Yes.</answer>"), wrong(fruit, "<answer>no</answer>"), wrong(fruit, "yes")]
    graders: list[Grader] = [
        Exact(),
        Regex(r"<answer>(.*?)</answer>", group=1, cases=tagged),
        Length(max=20, unit="words"),
        Length(100, unit="characters", slope=0.02, name="length_about"),
        Number(),
        Number(extract="####", name="number_marked"),
        Number(extract="boxed", name="number_boxed"),
        Function(_says_yes, cases=[right(fruit, "yes"), wrong(fruit, "perhaps")]),
        Weighted([(Exact(), 1.0), (Length(max=5, unit="words"), 0.5)]),
        _sql_on_temporary_database(),
        Regex(r"^(\s*\w+)*:\s*yes$", name="regex_nested", cases=[right(fruit, "so:yes"), wrong(fruit, "so:no")]),
        *_reward_models(fruit),
        *verifier_graders(),
        *judged_graders(),
    ]
    if importlib.util.find_spec("math_verify") is not None:
        graders.append(Maths())
    return graders


class _SharedWords:
    """A reward model that likes the words of the reference answer, step by step."""

    async def score(self, items: Sequence[tuple[Task, str]]) -> Sequence[tuple[float, ...] | Exception]:
        """The share of each step's words that the reference has; steps are lines."""
        found: list[tuple[float, ...] | Exception] = []
        for task, text in items:
            known = set((task.answer or "").lower().split())
            steps = [line.lower().split() for line in text.splitlines()] or [[]]
            found.append(tuple(2 * sum(w in known for w in words) / max(1, len(words)) - 1 for words in steps))
        return found


def _reward_models(fruit: Task) -> list[Grader]:
    """An outcome's and a process's reward model, and the comparison by which both prove themselves."""
    better = [(fruit, "yes", "no"), (fruit, "yes", "")]
    steps = [(fruit, "yes\nyes", "yes\nno"), (fruit, "yes", "no\nyes")]
    ranges = [right(fruit, "yes"), GradeCase(task=fruit, text="no", low=-1.0, high=-1.0)]
    outcome = RewardModel(_SharedWords(), better=better, cases=ranges)
    process = RewardModel(_SharedWords(), "process_reward", aggregate="min", better=steps)
    return [outcome, process, Prefers(outcome, better)]


def _says_yes(trajectory: Trajectory) -> float:
    return float(answer_text(trajectory).strip() == "yes")


def _sql_on_temporary_database() -> SqlResult:
    folder = tempfile.TemporaryDirectory(prefix="posttrain-proof-")
    path = Path(folder.name) / "fruit.sqlite"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE fruit (name TEXT, price REAL)")
        connection.executemany("INSERT INTO fruit VALUES (?, ?)", [("apple", 0.5), ("pear", 0.75)])
    connection.close()
    grader = SqlResult([path])
    weakref.finalize(grader, folder.cleanup)
    return grader
