"""Each variant and PPO raise the reward of a toy: letters after a prompt, paid for the share of even tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from posttrain.core import Grade, Task, Trajectory, read_metrics
from posttrain.recipes.grpo import grpo_loop
from posttrain.recipes.ppo import Ppo, ppo_loop, value_model
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.rl_settings import VARIANTS, with_variant
from posttrain.recipes.workbench import Workbench

pytestmark = pytest.mark.slow

TASKS = [Task(id=f"task-{number}", prompt=f"be {number}") for number in range(24)]
STEPS = 12


class EvenTokens:
    """The share of an answer's tokens with even ids: about half by chance."""

    name = "even"

    async def grade(self, trajectory: Trajectory) -> Grade:
        new = trajectory.tokens[-trajectory.num_completion_tokens() :]
        return Grade(score=sum(token % 2 == 0 for token in new) / len(new), grader=self.name)


@pytest.mark.parametrize("name", [*VARIANTS, "ppo"])
def test_the_reward_rises(bench: Workbench, tmp_path: Path, name: str) -> None:
    policy = new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=64,
        seed=0,
        path=tmp_path / "model",
    )
    values = {
        "steps": STEPS,
        "prompts_per_step": 8,
        "group_size": 8,
        "max_tokens": 4,
        "lr": 1e-2,
        "dtype": "float32",
        "evaluate_every": 0,
    }
    if name == "ppo":
        config = Ppo.from_dict({**values, "value_lr": 1e-2, "epochs": 2})
        asyncio.run(ppo_loop(bench, policy, value_model("policy", policy.model), TASKS, EvenTokens(), config))
    else:
        gentle = {"lr": 4e-3} if "minibatches" in VARIANTS[name] else {}
        asyncio.run(grpo_loop(bench, policy, TASKS, EvenTokens(), with_variant(name, {**values, **gentle})))
    rewards = [row["reward"] for row in read_metrics(bench.run.path / "metrics.jsonl")]
    assert len(rewards) == STEPS
    # 64 answers of up to 4 tokens a step: a mean of three steps has a standard error under 0.02
    assert sum(rewards[:2]) / 2 < 0.6
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.12, [round(reward, 2) for reward in rewards]
