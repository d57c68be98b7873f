"""Runs whose grader fails, hangs, lies or is slow: what the run says of it, and when."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import pytest

from posttrain.core import Grade, GradeError, Task, Trajectory, read_metrics
from posttrain.grade import Function, right, waits, wrong
from posttrain.recipes.group_stream import graded_groups
from posttrain.recipes.grpo import Grpo, grpo_loop
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.rl_loop import Sampling
from posttrain.recipes.workbench import Workbench

TASKS = [Task(id=f"task-{number}", prompt=f"be {number}", answer="e") for number in range(4)]


def settings(**changes: object) -> Grpo:
    values = {
        "steps": 2, "prompts_per_step": 2, "group_size": 4, "max_tokens": 4, "lr": 1e-3, "dtype": "float32",
        "kl_prompts": 0, "max_failed": 0.3,
    }  # fmt: skip
    return Grpo.from_dict({**values, **changes})


def fresh(path: Path) -> Policy:
    shape = {"vocab_size": 262, "width": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    return new_policy(["to be or not to be"], **shape, seed=0, path=path)


def share(trajectory: Trajectory) -> float:
    return trajectory.text.count("e") / 4 + len(trajectory.text) / 100


def rows_of(bench: Workbench) -> list[dict[str, float]]:
    return read_metrics(bench.run.path / "metrics.jsonl")


def signs_of(bench: Workbench) -> list[tuple[str, int]]:
    return [(event.fields["sign"], event.fields["step"]) for event in bench.run.events() if event.kind == "alarm"]


def test_a_healthy_run_has_the_metrics_and_no_failures(bench: Workbench, tmp_path: Path) -> None:
    asyncio.run(grpo_loop(bench, fresh(tmp_path / "m"), TASKS, Function(share, "g"), settings()))
    for row in rows_of(bench):
        assert (row["grader/g/failed"], row["grader/g/timed_out"], row["grader/g/invalid"]) == (0, 0, 0)
        assert {"watch/keys", "watch/constant", "alarms"} <= row.keys()
    assert "grader_failed" not in [sign for sign, _ in signs_of(bench)]


@pytest.mark.parametrize(("kind", "at"), [("raises", 1), ("nan", 2)])
def test_a_failure_is_in_its_step_and_in_no_other(bench: Workbench, tmp_path: Path, kind: str, at: int) -> None:
    asked = 0

    def failing(trajectory: Trajectory) -> float:
        nonlocal asked
        asked += 1
        if asked == 8 * at:  # eight answers a step
            if kind == "raises":
                raise RuntimeError("the judge is out")
            return math.nan
        return share(trajectory)

    asyncio.run(grpo_loop(bench, fresh(tmp_path / "m"), TASKS, Function(failing, "g"), settings()))
    assert [row["grader/g/failed"] for row in rows_of(bench)] == [float(step == at) for step in (1, 2)]
    assert [row["grader/g/invalid"] for row in rows_of(bench)] == [
        float(step == at and kind == "nan") for step in (1, 2)
    ]
    assert [one for one in signs_of(bench) if one[0] == "grader_failed"] == [("grader_failed", at)]


def test_a_grader_that_hangs_is_in_its_step(bench: Workbench, tmp_path: Path) -> None:
    class Hangs:
        name, deadline_s, waits = "g", 1.0, True
        asked = 0

        async def grade(self, trajectory: Trajectory) -> Grade:
            self.asked += 1
            await asyncio.sleep(60 if self.asked == 12 else 0)
            return Grade(score=share(trajectory), grader=self.name)

    asyncio.run(grpo_loop(bench, fresh(tmp_path / "m"), TASKS, Hangs(), settings()))
    assert [row["grader/g/timed_out"] for row in rows_of(bench)] == [0, 1]
    assert ("grader_failed", 2) in signs_of(bench)


def test_a_run_that_stops_writes_its_last_step(bench: Workbench, tmp_path: Path) -> None:
    def broken(_: Trajectory) -> float:
        raise RuntimeError("the judge is out")

    with pytest.raises(GradeError, match="the judge is out"):
        asyncio.run(grpo_loop(bench, fresh(tmp_path / "m"), TASKS, Function(broken, "g"), settings()))
    (row,) = rows_of(bench)
    assert (row["step"], row["grader/g/failed"]) == (1, 8)
    assert signs_of(bench) == [("grader_failed", 1)]


def test_a_grader_that_is_wrong_about_its_own_cases_does_not_begin(bench: Workbench, tmp_path: Path) -> None:
    cases = [right(TASKS[0], "e"), wrong(TASKS[0], ""), wrong(TASKS[0], "Let's solve this problem step by step.")]
    with pytest.raises(GradeError, match="does not begin"):
        asyncio.run(
            grpo_loop(bench, fresh(tmp_path / "m"), TASKS, Function(lambda _: 1.0, "g", cases=cases), settings())
        )
    assert signs_of(bench) == [("proof", 0)]


def test_slow_graders_grade_while_others_are_sampled_and_change_no_sample(tmp_path: Path) -> None:
    policy = fresh(tmp_path / "m")
    begun: list[float] = []

    async def slow(trajectory: Trajectory) -> float:
        begun.append(time.monotonic())
        await asyncio.sleep(0.05)
        return share(trajectory)

    def quick(trajectory: Trajectory) -> float:
        return share(trajectory)

    async def both() -> list[tuple[list[str], list[float | None]]]:
        found = []
        for grader, inline in ((Function(quick, "g"), True), (Function(slow, "g"), False)):
            with policy.engine(slots=8, length=32, seed=0, inline=inline) as engine:
                groups, grades = await graded_groups(
                    engine, TASKS, Sampling(max_tokens=6, n=2), grader,
                    prompt_tokens=policy.renderer.prompt, seed=0,
                )  # fmt: skip
            found.append(([t.text for group in groups for t in group.trajectories], [grade.score for grade in grades]))
        return found

    assert waits(Function(slow, "g"))
    assert not waits(Function(quick, "g"))
    one, other = asyncio.run(both())
    assert one == other
    assert len(one[0]) == 8
