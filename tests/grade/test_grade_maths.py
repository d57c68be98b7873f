from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Grade, GradeError, MissingExtraError, Task
from posttrain.grade import Maths, WorkerFailure, WorkerPool, grade_all, trajectory_from_text

pytest.importorskip("math_verify", reason="the extra 'math' is not installed")

GradeText = Callable[..., Grade]

# Hangs with its signals blocked and math-verify's alarm useless, dies, prints rubbish, or answers.
WORKER = """
import json, os, signal, sys, time
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(60)
    if job["do"] == "die": os._exit(3)
    if job["do"] == "stale": job["id"] -= 1
    print(json.dumps({"id": job["id"], "said": job["do"], "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    (tmp_path / "odd_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = WorkerPool("odd_worker", num_workers=1)
    yield made
    made.close()
    assert made.pids() == []


def test_a_worker_stays_for_many_jobs(pool: WorkerPool) -> None:
    answers = [pool.call({"do": str(number)}, 20) for number in range(5)]
    assert [answer["said"] for answer in answers] == list("01234")
    assert {answer["pid"] for answer in answers} == set(pool.pids())


def test_a_hanging_worker_is_killed_and_replaced(pool: WorkerPool) -> None:
    pool.start()
    (first,) = pool.pids()
    with pytest.raises(WorkerFailure, match=r"no answer within 0\.3 s and was killed"):
        pool.call({"do": "hang"}, 0.3)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert pool.call({"do": "fine"}, 20)["pid"] != first


def test_a_worker_that_dies_is_replaced(pool: WorkerPool) -> None:
    with pytest.raises(WorkerFailure, match=r"died \(exit status 3\)"):
        pool.call({"do": "die"}, 20)
    assert pool.call({"do": "fine"}, 20)["said"] == "fine"


def test_a_worker_killed_while_idle_is_not_noticed(pool: WorkerPool) -> None:
    pool.start()
    (first,) = pool.pids()
    os.kill(first, signal.SIGKILL)
    for _ in range(200):
        if Path(f"/proc/{first}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.01)
    assert pool.call({"do": "fine"}, 20)["pid"] != first


def test_an_answer_to_another_job_is_never_taken(pool: WorkerPool) -> None:
    with pytest.raises(WorkerFailure, match="another job"):
        pool.call({"do": "stale"}, 20)
    assert pool.call({"do": "fine"}, 20)["said"] == "fine"


def test_several_threads_may_start_and_use_several_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = WorkerPool("odd_worker", num_workers=2)
    said: list[str] = []

    def work(place: int) -> None:
        pool.start()
        said.extend(pool.call({"do": f"{place}"}, 20)["said"] for _ in range(5))

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(said) == sorted(f"{place}" for place in range(6) for _ in range(5))
    assert len(pool.pids()) == 2
    pool.close()
    with pytest.raises(WorkerFailure, match="closed"):
        pool.call({"do": "fine"}, 20)


def test_a_module_that_cannot_start_says_so() -> None:
    pool = WorkerPool("posttrain.grade.no_such_module")
    with pytest.raises(WorkerFailure, match="died"):
        pool.start()
    pool.close()


@pytest.fixture(scope="module")
def maths() -> Iterator[Maths]:
    grader = Maths()
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("\\frac{14}{3}", "so $x = \\frac{28}{6}$", 1),
        ("\\frac{14}{3}", "\\boxed{4\\frac{2}{3}}", 1),
        ("p - q", "\\boxed{-q + p}", 1),
        ("\\$36", "\\boxed{36}", 1),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", 1),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left(\\frac{\\pi}{2}, 3\\right)}", 0),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", 1),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}}", 0),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", 1),
        ("\\text{Evelyn}", "\\boxed{\\text{Carla}}", 0),
        ("1", "\\boxed{", 0),
        ("1", "", 0),
    ],
)
def test_equal_as_mathematics(grade_text: GradeText, maths: Maths, answer: str, text: str, score: float) -> None:
    assert grade_text(maths, text, answer).score == score


def test_maths_grades_alike_from_any_thread(maths: Maths) -> None:
    """In a thread, math-verify itself raises or scores 0: signal.alarm works in a main thread only."""
    task = Task(id="half", prompt="?", answer="\\frac{1}{2}")
    scores: dict[int, list[float | None]] = {}

    def work(place: int) -> None:
        texts = [f"\\boxed{{\\frac{{{n}}}{{4}}}}" for n in range(4)]
        trajectories = [trajectory_from_text(task, text) for text in texts]
        scores[place] = [grade.score for grade in asyncio.run(grade_all(maths, trajectories, deadline_s=60))]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(scores.values()) == [[0.0, 0.0, 1.0, 0.0]] * 4


def test_algebra_that_never_ends_is_an_error_and_the_next_answer_is_graded(grade_text: GradeText) -> None:
    grader = Maths(timeout_s=1.0)
    tower = "9^{9^{9^{9^{9}}}}"
    with pytest.raises(GradeError):
        grade_text(grader, f"\\boxed{{\\sum_{{k=1}}^{{{tower}}} k! + {tower}}}", "\\frac{1}{7^{7^{7^{7}}} + 1}")
    assert grade_text(grader, "\\boxed{2}", "2").score == 1
    grader.close()


def test_a_gold_answer_that_is_no_mathematics_is_an_error(grade_text: GradeText, maths: Maths) -> None:
    with pytest.raises(GradeError, match="no mathematics that can be read"):
        grade_text(maths, "\\boxed{2}", "$$")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[math\]"):
        Maths()


# Problems of MATH-500 whose own solution Maths does not take for right: none.
KNOWN_FAILURES: set[str] = set()
# Neighbours whose answers differ as texts and say the same.
SAME_MATHEMATICS = {("5", "x=5")}


@pytest.mark.slow
def test_the_solutions_of_math500_are_right(data_rows: Callable[[str], list[dict[str, Any]]], maths: Maths) -> None:
    rows = data_rows("math/math500.jsonl.gz")
    assert len(rows) == 400
    gold = [
        trajectory_from_text(Task(id=row["unique_id"], prompt=row["problem"], answer=row["answer"]), row["solution"])
        for row in rows
    ]
    grades = asyncio.run(grade_all(maths, gold, deadline_s=60))
    failures = {t.id: (g.rationale, g.error) for t, g in zip(gold, grades, strict=True) if g.score != 1}
    assert set(failures) == KNOWN_FAILURES, failures


@pytest.mark.slow
def test_the_answer_of_another_problem_is_wrong(data_rows: Callable[[str], list[dict[str, Any]]], maths: Maths) -> None:
    rows = data_rows("math/math500.jsonl.gz")[:80]
    pairs = [(row["answer"], other["answer"]) for row, other in pairwise(rows) if row["answer"] != other["answer"]]
    trajectories = [
        trajectory_from_text(Task(id="t", prompt="?", answer=gold), f"\\boxed{{{given}}}") for gold, given in pairs
    ]
    grades = asyncio.run(grade_all(maths, trajectories, deadline_s=60))
    assert {pair for pair, grade in zip(pairs, grades, strict=True) if grade.score != 0} == SAME_MATHEMATICS
