"""The loop with everything on: a killed run goes on bit for bit; replaced groups; the KL that was spent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from posttrain.core import Grade, RolloutError, Task, Trajectory, read_metrics
from posttrain.models import Decoder
from posttrain.recipes.grpo import Grpo, grpo_loop
from posttrain.recipes.kl_spent import fixed_prompts, kl_spent, kl_spent_sync
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.rl_learner import Learner
from posttrain.recipes.workbench import Workbench, open_stage
from posttrain.rollout import Rolled
from posttrain.train import Ledger, list_checkpoints, read_state

TASKS = [Task(id=f"task-{number}", prompt=f"be {number}") for number in range(6)]


def fresh(tmp_path: Path, seed: int = 0) -> Policy:
    return new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=64,
        seed=seed,
        path=tmp_path / "model",
    )


class EvenTokens:
    """The share of an answer's tokens with even ids; every third task is solved by whatever is written."""

    name = "even"

    async def grade(self, trajectory: Trajectory) -> Grade:
        if trajectory.task.id in ("task-0", "task-3"):
            return Grade(score=1.0, grader=self.name)
        new = trajectory.tokens[-trajectory.num_completion_tokens() :]
        return Grade(score=sum(token % 2 == 0 for token in new) / len(new), grader=self.name)


class KilledError(Exception):
    """The machine went away."""


def kill_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """The loop dies after a step's updates, before anything of it is written."""
    learn = Learner.learn

    def until_killed(self: Learner, rolled: Sequence[Rolled]) -> dict[str, float]:
        metrics = learn(self, rolled)
        if self.step == step:
            raise KilledError
        return metrics

    patch.setattr(Learner, "learn", until_killed)


def settings(**changes: object) -> Grpo:
    values = {
        "steps": 5,
        "prompts_per_step": 2,
        "group_size": 3,
        "max_tokens": 4,
        "lr": 3e-3,
        "dtype": "float32",
        "checkpoint_every": 2,
    }
    return Grpo.from_dict({**values, **changes})


EVERYTHING = {
    "dynamic_rounds": 3,
    "curriculum": True,
    "minibatches": 2,
    "epochs": 2,
    "entropy_coef": 0.01,
    "entropy_target": 5.5,
    "entropy_share": 0.8,
    "reference_every": 2,
    "reference_mix": 0.6,
    "beta": 0.05,
    "eos_penalty": 0.1,
    "over_long_buffer": 2,
    "kl_prompts": 2,
    "surrogate": "cispo",
    "stale_threshold": 0.5,
}
SETTINGS: dict[str, dict[str, object]] = {
    "everything": EVERYTHING,
    "reinforce++": {"advantage": "reinforce_pp", "kl_in_reward": True, "beta": 0.05, "kl_estimator": "k1"},
    "dynamic": {"dynamic_rounds": 4, "scale_rewards": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_loop_goes_on_bit_for_bit(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed in its fourth step, a step after the newest checkpoint; all that counts is as in a run of one piece."""

    config = settings(**SETTINGS[name])
    with open_stage(bench, "whole", {}) as stage:
        whole = fresh(tmp_path)
        expected = asyncio.run(grpo_loop(stage, whole, TASKS, EvenTokens(), config))
        rows = read_metrics(stage.run.path / "metrics.jsonl")
        _, kept = read_state(list_checkpoints(stage.run.checkpoints)[0])
    with open_stage(bench, "killed", {}) as stage:
        with monkeypatch.context() as patch:
            kill_after(patch, 4)
            with pytest.raises(KilledError):
                asyncio.run(grpo_loop(stage, fresh(tmp_path), TASKS, EvenTokens(), config))
        resumed = fresh(tmp_path)
        found = asyncio.run(grpo_loop(stage, resumed, TASKS, EvenTokens(), config))
        again = read_metrics(stage.run.path / "metrics.jsonl")
        _, kept_again = read_state(list_checkpoints(stage.run.checkpoints)[0])
    for tensor, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    assert kept == kept_again
    clock = {"step_s", "tokens_per_second", "rollout/seconds", "grade/seconds", "time"}
    assert [{k: v for k, v in row.items() if k not in clock} for row in rows] == [
        {k: v for k, v in row.items() if k not in clock} for row in again
    ]
    assert expected["num_tokens"] == found["num_tokens"]


def test_groups_without_variance_are_replaced_and_counted(bench: Workbench, tmp_path: Path) -> None:
    config = settings(steps=3, dynamic_rounds=6)
    asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, EvenTokens(), config))
    rows = read_metrics(bench.run.path / "metrics.jsonl")
    assert all(row["resampling/kept"] == 2.0 for row in rows)
    assert sum(row["resampling/dropped"] for row in rows) > 0
    assert all(row["rollout/num"] == 3 * (row["resampling/kept"] + row["resampling/dropped"]) for row in rows)
    assert all(row["examples/taken"] + row["examples/left_out_zero"] == 6.0 for row in rows)
    ledger = Ledger()
    _, kept = read_state(list_checkpoints(bench.run.checkpoints)[0])
    ledger.restore(kept["ledger"])
    assert len(ledger) == sum(row["resampling/kept"] + row["resampling/dropped"] for row in rows)


def test_the_reference_moves_and_the_start_does_not(tmp_path: Path) -> None:
    policy = fresh(tmp_path)
    learner = Learner(policy.model, settings(reference_every=2, reference_mix=0.25, beta=0.1))
    before = [tensor.clone() for tensor in learner.start.state_dict().values()]
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(1.0)
    learner._move_reference()
    for moved, start, first in zip(
        learner.reference.model.state_dict().values(), learner.start.state_dict().values(), before, strict=True
    ):
        assert torch.equal(start, first)
        torch.testing.assert_close(moved, first + 0.25)


def test_several_updates_leave_the_ratio(bench: Workbench, tmp_path: Path) -> None:
    one = asyncio.run(grpo_loop(bench, fresh(tmp_path), TASKS, EvenTokens(), settings(steps=2)))
    assert one["ratio/max"] == one["ratio/min"] == 1.0

    with open_stage(bench, "several", {}) as stage:
        several = asyncio.run(grpo_loop(stage, fresh(tmp_path), TASKS, EvenTokens(), settings(steps=2, epochs=3)))
    assert several["num_updates"] == 3.0
    assert several["ratio/max"] > 1.0 > several["ratio/min"]


# The KL that was spent


def exact_kl(policy: Policy, reference: Decoder, tasks: list[Task]) -> float:
    """KL of the first token's distribution, mean over prompts, by summing over the vocabulary."""
    total = 0.0
    for task in tasks:
        tokens = torch.tensor([list(policy.renderer.prompt(task))])
        with torch.no_grad():
            own, their = (model(tokens)[0, -1].double().log_softmax(-1) for model in (policy.model, reference))
        total += float((own.exp() * (own - their)).sum())
    return total / len(tasks)


def test_kl_spent_is_the_kl_within_its_error(tmp_path: Path) -> None:
    policy = fresh(tmp_path, seed=1)
    tasks = [Task(id=str(number), prompt=f"be {number}") for number in range(60)]
    with torch.no_grad():
        policy.model.embed.weight.mul_(4.0)
    reference = fresh(tmp_path).model
    found = kl_spent_sync(policy, reference, tasks, samples=24, max_tokens=1)
    exact = exact_kl(policy, reference, tasks)
    assert exact > 0.02
    assert found.num_tokens == 60 * 24
    for value, error in ((found.k1, found.k1_error), (found.k3, found.k3_error)):
        assert 0 < error < 0.3 * exact
        assert abs(value - exact) < 4 * error
    assert found.per_answer == pytest.approx(found.k1)  # one token each
    assert kl_spent_sync(policy, reference, tasks, samples=24, max_tokens=1) == found


def test_kl_spent_of_nothing_is_nothing(tmp_path: Path) -> None:
    policy = fresh(tmp_path)
    found = kl_spent_sync(policy, fresh(tmp_path).model, TASKS, samples=2, max_tokens=4)
    assert found.k1 == found.k3 == found.per_answer == 0.0
    assert math.isnan(kl_spent_sync(policy, policy.model, TASKS[:1], samples=2, max_tokens=4).k1_error)
    assert found.metrics()["kl_spent/num_prompts"] == 6.0


def test_kl_spent_names_what_failed(tmp_path: Path) -> None:
    policy = fresh(tmp_path)

    class Broken:
        async def sample(self, requests: object) -> list[object]:
            raise RuntimeError("the sampler is out")

    with pytest.raises(RolloutError, match="the sampler is out"):
        asyncio.run(kl_spent(policy, policy.model, TASKS, sampler=Broken()))  # type: ignore[arg-type]


def test_fixed_prompts_depend_on_nothing_but_ids() -> None:
    tasks = [Task(id=str(number), prompt="?") for number in range(50)]
    first = fixed_prompts(tasks, 8)
    assert first == fixed_prompts(tasks[::-1], 8)
    assert fixed_prompts(tasks, 4) == first[:4]
    assert len(fixed_prompts(tasks[:3], 8)) == 3
