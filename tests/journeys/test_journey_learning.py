"""A model learns a task from a reward alone, and answers questions better that it was never trained on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from scipy.stats import linregress

from posttrain.core import EvalReport, Sampling, Task, read_metrics
from posttrain.data import CompletionRow
from posttrain.evaluate import Suite, compare, run_suite_sync
from posttrain.grade import Exact
from posttrain.models import num_parameters
from posttrain.recipes.grpo import Grpo, grpo_loop
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.supervised import Supervised, supervised_loop
from posttrain.recipes.workbench import Workbench, open_stage, open_workbench
from posttrain.train import TrainConfig

HELD_OUT, PAIRS = 150, 75
SEEDS = [0]  # 1, 2 and 3 pass too; one is enough for a suite that is run often


def suite_of(policy: Policy, tasks: list[Task]) -> Suite:
    stops = tuple(sorted(policy.renderer.stop_tokens))
    return Suite("toy", tasks, Sampling(max_tokens=5, temperature=0.0, stop_tokens=stops), Exact())


def measure(policy: Policy, suite: Suite, model: str) -> EvalReport:
    with policy.engine(slots=len(suite.tasks)) as engine:
        return run_suite_sync(suite, engine, policy.renderer.prompt, model=model)


def imitate(bench: Workbench, policy: Policy, tasks: list[Task], seed: int) -> None:
    """SFT on so few pairs that the rule is only half learned."""
    pairs = [CompletionRow(id=task.id, prompt=task.prompt, completion=task.answer or "") for task in tasks]
    examples = completion_examples(bench, policy.renderer, pairs, 16)
    train = TrainConfig(lr=3e-3, schedule="cosine", warmup=5, total_steps=120)
    supervised_loop(
        bench, policy.model, examples, [], Supervised(train=train, batch_size=32, steps=120, seed=seed), title="sft"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_raises_reward_and_held_out_accuracy(tmp_path: Path, toy_tasks: list[Task], seed: int) -> None:
    held_out, training = toy_tasks[:HELD_OUT], toy_tasks[HELD_OUT:]
    with open_workbench("toy", {"seed": seed}, runs=tmp_path / "runs") as bench:
        policy = new_policy(
            [f"{task.prompt}{task.answer}" for task in training],
            vocab_size=262,
            width=64,
            num_layers=2,
            num_heads=4,
            max_positions=16,
            seed=seed,
            path=tmp_path / "model",
        )
        assert num_parameters(policy.model.config) <= 300_000
        assert policy.tokenizer.vocab_size <= 300
        suite = suite_of(policy, held_out)
        with open_stage(bench, "sft", {}) as stage:
            imitate(stage, policy, training[:PAIRS], seed)
        before = measure(policy, suite, "sft")
        config = Grpo(
            steps=60,
            prompts_per_step=24,
            group_size=8,
            max_tokens=5,
            lr=5e-4,
            warmup=3,
            evaluate_every=0,
            dtype="float32",
            seed=seed,
        )
        with open_stage(bench, "grpo", {}) as stage:
            asyncio.run(grpo_loop(stage, policy, training, Exact(), config))
            rows = read_metrics(stage.run.path / "metrics.jsonl")
        after = measure(policy, suite, "grpo")

    rewards = [row["reward"] for row in rows]
    assert len(rewards) == 60
    trend = linregress(range(60), rewards)
    assert trend.slope > 0
    assert trend.pvalue < 1e-3  # of a slope that is not zero
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.15

    found = compare(after, before, margin=0.05)
    assert found.better, found.difference
    assert found.p_value < 1e-3
    assert before.metrics["accuracy"].high < after.metrics["accuracy"].low  # the intervals do not even touch
    assert before.metrics["accuracy"].value > 0.1  # there was something for the reward to find
    assert not {task.id for task in held_out} & {task.id for task in training}
