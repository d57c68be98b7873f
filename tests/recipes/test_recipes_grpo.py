"""GRPO's own decisions: whose advantage, against which reference, and what a killed loop does again."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from posttrain.core import (
    ConfigError,
    Example,
    Grade,
    GradeError,
    Task,
    TokenSequence,
    TrainError,
    Trajectory,
    read_metrics,
)
from posttrain.recipes.grpo import Grpo, advantages_of, grpo_loop, with_reference
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.workbench import Workbench
from posttrain.train import Ledger, TrainConfig, Trainer, list_checkpoints, nll_objective, read_state


def settings(**changes: object) -> Grpo:
    values = {"steps": 3, "prompts_per_step": 2, "group_size": 3, "max_tokens": 4, "lr": 1e-3, "dtype": "float32"}
    return Grpo.from_dict({**values, **changes})


def grade(score: float | None) -> Grade:
    return Grade(score=score, grader="toy", error=None if score is not None else "crashed")


# Advantages


def test_advantages_by_hand(make_group) -> None:
    groups = [make_group("a", ["x", "y", "z"]), make_group("b", ["x", "y", "z"])]
    grades = [grade(score) for score in (1.0, 0.0, 0.5, 1.0, 1.0, 1.0)]
    plain = advantages_of(groups, grades, settings())
    assert plain == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]  # the mean of 1, 0, 0.5 is 0.5; b's answers are all equal
    scaled = advantages_of(groups, grades, settings(scale_rewards=True))
    # the standard deviation of 1, 0, 0.5 (over n − 1) is 0.5, to which 1e-4 is added
    assert scaled[0] == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0.0])
    assert scaled[1] == [0.0, 0.0, 0.0]


def test_a_failed_grade_is_no_zero(make_group) -> None:
    groups = [make_group("a", ["x", "y", "z"]), make_group("b", ["x", "y", "z"])]
    grades = [grade(score) for score in (1.0, None, 0.5, None, None, 1.0)]
    found = advantages_of(groups, grades, settings())
    assert found[0] == [0.25, None, -0.25]  # of the two that were graded: mean 0.75
    assert found[1] == [None, None, 0.0]  # one alone has nobody to compare with


# The reference


def test_reference_column_is_the_reference_models_logprob(tiny_policy: Policy) -> None:
    reference = Trainer(tiny_policy.model, TrainConfig(lr=1e-3), nll_objective)
    sequences = [
        TokenSequence(
            tokens=(40, 41, 42, 43), mask=(False, False, True, True), columns={"advantages": (0.0, 0.0, 1.0, 1.0)}
        ),
        TokenSequence(tokens=(50, 51), mask=(False, True), columns={"advantages": (0.0, -1.0)}),
    ]
    examples = [Example(id=str(number), sequences=(sequence,)) for number, sequence in enumerate(sequences)]
    found = with_reference(examples, reference)
    for before, after in zip(examples, found, strict=True):
        (old,), (new,) = before.sequences, after.sequences
        assert (new.tokens, new.mask, new.columns["advantages"]) == (old.tokens, old.mask, old.columns["advantages"])
        values = new.columns["ref_logprobs"]
        assert len(values) == len(old.tokens)
        assert all((value < 0) == trained for value, trained in zip(values, old.mask, strict=True))
    # The mean of the targets' logprobs is minus the loss on them.
    columns = [value for example in found for value in example.sequences[0].columns["ref_logprobs"] if value]
    assert -sum(columns) / 3 == pytest.approx(reference.evaluate(examples)["nll"], abs=1e-5)


# The loop


class LikesToken:
    """A grader: the share of answers' characters that are `e`; fails for the tasks it is told to."""

    name = "likes"

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.seen: list[str] = []

    async def grade(self, trajectory: Trajectory) -> Grade:
        self.seen.append(trajectory.id)
        if trajectory.task.id in self.failing:
            raise RuntimeError("the judge is out")
        return Grade(score=trajectory.text.count("e") / 4 + len(trajectory.text) / 100, grader=self.name)


TASKS = [Task(id=f"task-{number}", prompt=f"be {number}") for number in range(4)]


def fresh(tmp_path: Path) -> Policy:
    return new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=64,
        seed=0,
        path=tmp_path / "model",
    )


def test_the_loop_grades_everything_once_and_resumes_a_finished_run(bench: Workbench, tmp_path: Path) -> None:
    grader = LikesToken()
    policy = fresh(tmp_path)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    last = asyncio.run(grpo_loop(bench, policy, TASKS, grader, settings(steps=4, beta=0.1)))
    assert len(grader.seen) == len(set(grader.seen)) == 4 * 2 * 3
    rows = read_metrics(bench.run.path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6), "the first step's policy is the reference"
    assert rows[-1]["kl"] > 0
    assert rows[-1]["num_sampled"] == last["num_tokens"]
    assert any(not tensor.equal(before[name]) for name, tensor in policy.model.state_dict().items())
    ledger = Ledger()
    _, kept = read_state(list_checkpoints(bench.run.checkpoints)[0])
    ledger.restore(kept["ledger"])
    for epoch in (0, 1):
        assert sorted(ledger.trained(epoch=epoch)) == [task.id for task in TASKS]

    again = asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, grader, settings(steps=4, beta=0.1)))
    assert len(grader.seen) == 24, "nothing is sampled again"
    assert again["reward"] == last["reward"]
    assert again["num_tokens"] == last["num_tokens"]
    assert len(read_metrics(bench.run.path / "metrics.jsonl")) == 4


def test_too_many_failed_grades_stop_the_run_with_their_cause(bench: Workbench, tmp_path: Path) -> None:
    grader = LikesToken(failing=("task-0", "task-1"))
    with pytest.raises(GradeError, match="RuntimeError: the judge is out"):
        asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, grader, settings(steps=2)))


def test_failed_grades_within_the_limit_are_masked_and_counted(bench: Workbench, tmp_path: Path) -> None:
    grader = LikesToken(failing=("task-0",))
    config = settings(steps=1, prompts_per_step=4, max_failed=0.3)
    metrics = asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, grader, config))
    assert metrics["examples/left_out_ungraded"] == 3
    assert metrics["examples/taken"] + metrics["examples/left_out_zero"] == 9
    assert math.isfinite(metrics["loss"])


def test_equal_rewards_move_nothing(bench: Workbench, tmp_path: Path) -> None:
    class Same:
        name = "same"

        async def grade(self, trajectory: Trajectory) -> Grade:
            return Grade(score=1.0, grader=self.name)

    policy = fresh(tmp_path)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    metrics = asyncio.run(grpo_loop(bench, policy, TASKS, Same(), settings(steps=2)))
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["grad_norm"] == 0.0
    assert all(tensor.equal(before[name]) for name, tensor in policy.model.state_dict().items())


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        settings(group_size=1)
    with pytest.raises(ConfigError, match="lerning_rate"):
        settings(lerning_rate=1.0)


def test_a_checkpoint_of_other_settings_is_refused(bench: Workbench, tmp_path: Path) -> None:
    asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, LikesToken(), settings(steps=1)))
    with pytest.raises(TrainError, match=r"lr: checkpoint 0\.001, this run 0\.002"):
        asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, LikesToken(), settings(steps=1, lr=2e-3)))
