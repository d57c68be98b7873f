from __future__ import annotations

import asyncio

import pytest

from posttrain import grade
from posttrain.core import Grade, GradeCase, GradeError, Grader, ProvesItself, Task, Trajectory
from posttrain.grade import Exact, Function, ProofReport, Weighted, all_graders, prove, right, wrong

TASK = Task(id="sum", prompt="1 + 1?", answer="2")


@pytest.mark.parametrize("grader", all_graders(), ids=lambda grader: grader.name)
def test_every_built_in_grader_proves_itself(grader: Grader) -> None:
    report = prove(grader)
    assert report.problems == ()
    assert report.ok
    report.raise_for_problems()
    proven = [*report.cases, *(case for part in report.parts for case in part.cases)]
    assert any(case.case.low == 1 for case in proven)
    assert any(case.case.high == 0 for case in proven)


def test_every_grader_of_the_room_is_in_the_registry() -> None:
    classes = {
        value for value in vars(grade).values() if isinstance(value, type) and callable(getattr(value, "grade", None))
    }
    there = {type(grader) for grader in all_graders()}
    # What this machine may lack: an extra, or a kernel that gives a sandbox. What watches a grader is none itself.
    lacking = {grade.Maths, grade.JsonSchema, grade.UnitTests, grade.InputOutput, grade.HttpReward}
    assert classes - there <= lacking | {grade.WatchedGrader}
    assert there <= classes
    assert len(classes) >= 20


def test_graders_are_graders() -> None:
    for grader in all_graders():
        assert isinstance(grader, Grader)
        assert isinstance(grader, ProvesItself)


def test_a_grader_that_is_wrong_about_its_cases_is_found_out() -> None:
    generous = Function(lambda trajectory: 1.0, "generous", cases=[right(TASK, "2"), wrong(TASK, "3", "off by one")])
    report = prove(generous)
    assert not report.ok
    assert report.problems == ("generous: '3' for task 'sum' (off by one) scored 1, not within [0, 0]",)
    with pytest.raises(GradeError, match="fails its own proof"):
        report.raise_for_problems()


def test_a_grader_that_crashes_on_a_case_is_not_proven() -> None:
    def crashes(trajectory: Trajectory) -> float:
        raise RuntimeError("oh")

    report = prove(Function(crashes, cases=[right(TASK, "2"), wrong(TASK, "3")]))
    assert "failed: RuntimeError: oh" in report.problems[0]


def test_a_hanging_case_ends() -> None:
    class Hangs:
        name = "hangs"

        async def grade(self, trajectory: Trajectory) -> Grade:
            await asyncio.sleep(3600)
            raise AssertionError

        def cases(self) -> list[GradeCase]:
            return [right(TASK, "2"), wrong(TASK, "3")]

    assert "no grade within 0.1 s" in prove(Hangs(), deadline_s=0.1).problems[0]


def test_no_cases_or_no_near_miss_is_no_proof() -> None:
    assert "has no cases" in prove(Function(lambda trajectory: 1.0, "f")).problems[0]
    only_gold = Function(lambda trajectory: 1.0, "f", cases=[right(TASK, "2")])
    assert "no near miss" in prove(only_gold).problems[0]


def test_the_parts_of_a_sum_prove_themselves() -> None:
    generous = Function(lambda trajectory: 1.0, "generous", cases=[wrong(TASK, "3")])
    report = prove(Weighted([(Exact(), 1.0), (generous, 1.0)]))
    assert [part.grader for part in report.parts] == ["exact", "generous"]
    assert not report.ok
    assert prove(Weighted([(Exact(), 1.0)])).ok


def test_proof_within_a_running_loop() -> None:
    async def inside() -> ProofReport:
        return prove(Exact())

    assert asyncio.run(inside()).ok


def test_cases_that_cannot_be_made_are_an_error() -> None:
    class Broken(Exact):
        def cases(self) -> list[GradeCase]:
            raise ValueError("no cases here")

    with pytest.raises(GradeError, match="no cases here"):
        prove(Broken())


def test_the_door_is_sorted_and_whole() -> None:
    assert list(grade.__all__) == sorted(grade.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(grade, name) for name in grade.__all__)
