"""PPO: credit by hand, two models that a kill does not part, where values begin, and the recipe from end to end."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from posttrain import models
from posttrain.core import Example, Grade, ModelError, Task, TokenSequence, Trajectory, read_metrics
from posttrain.models import ScoredDecoder
from posttrain.recipes.policy import Policy
from posttrain.recipes.ppo import Ppo, ppo, ppo_loop, value_model
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.rl_actor_critic import ActorCritic, assign_credit
from posttrain.recipes.workbench import Workbench, open_stage
from posttrain.rollout import Rolled
from posttrain.train import list_checkpoints, read_state

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


def settings(**changes: object) -> Ppo:
    values = {
        "steps": 4,
        "prompts_per_step": 3,
        "max_tokens": 4,
        "lr": 3e-3,
        "value_lr": 3e-3,
        "dtype": "float32",
        "checkpoint_every": 2,
        "epochs": 2,
    }
    return Ppo.from_dict({**values, **changes})


class EvenTokens:
    """The share of an answer's tokens with even ids."""

    name = "even"

    async def grade(self, trajectory: Trajectory) -> Grade:
        new = trajectory.tokens[-trajectory.num_completion_tokens() :]
        return Grade(score=sum(token % 2 == 0 for token in new) / len(new), grader=self.name)


# Credit


def answer(name: str, old: list[float], ref: list[float], values: list[float]) -> Example:
    size = len(old) + 1
    columns = {"old_logprobs": old, "ref_logprobs": ref, "old_values": values}
    sequence = TokenSequence(
        tokens=tuple(range(size)),
        mask=(False,) + (True,) * len(old),
        columns={key: (0.0, *column) for key, column in columns.items()},
    )
    return Example(id=name, sequences=(sequence,), group=name)


def test_credit_by_hand() -> None:
    # First answer: KL k1 of 1 and −1 nats, β ½: rewards −½ and 1 + ½. Values 0.2, 0.4; λ ½, γ 1:
    #   δ₁ = 1.5 − 0.4 = 1.1;  δ₀ = −0.5 + 0.4 − 0.2 = −0.3;  A₁ = 1.1;  A₀ = −0.3 + 0.55 = 0.25
    # Second: one token, no KL, score 0, value 0.1: A = −0.1.
    examples = [answer("a", [-1.0, -2.0], [-2.0, -1.0], [0.2, 0.4]), answer("b", [-1.0], [-1.0], [0.1])]
    scores_S = torch.tensor([1.0, 0.0], dtype=torch.float64)
    config = settings(lam=0.5, whiten_advantages=False)
    credited, metrics = assign_credit(examples, scores_S, config, 0.5)
    first, second = (example.sequences[0].columns for example in credited)
    assert first["advantages"] == pytest.approx((0.0, 0.25, 1.1))
    assert first["returns"] == pytest.approx((0.0, 0.45, 1.5))
    assert second["advantages"] == pytest.approx((0.0, -0.1))
    assert metrics["objective/kl"] == 0.0  # 1 − 1 + 0, over two answers
    assert metrics["objective/scores"] == 0.5
    assert metrics["objective/rlhf_reward"] == 0.5
    whitened, _ = assign_credit(examples, scores_S, settings(lam=0.5), 0.5)
    values = [value for example in whitened for value in example.sequences[0].columns["advantages"][1:]]
    mean = (0.25 + 1.1 - 0.1) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in (0.25, 1.1, -0.1)) / 3)
    assert values == pytest.approx([(value - mean) / spread for value in (0.25, 1.1, -0.1)])
    assert whitened[0].sequences[0].columns["returns"] == pytest.approx((0.0, 0.45, 1.5))  # of values as they are


def test_the_whole_reward_is_paid_whatever_lambda() -> None:
    """With λ = 1 and γ = 1 advantage plus value is all that is still to come."""
    examples = [answer("a", [-1.0, -2.0, -1.0], [-1.5, -1.5, -1.0], [0.3, -0.2, 0.9])]
    config = settings(lam=1.0, whiten_advantages=False, kl_estimator="k2")
    credited, _ = assign_credit(examples, torch.tensor([2.0], dtype=torch.float64), config, 0.1)
    # k2: 0.125, 0.125, 0, times β 0.1
    assert credited[0].sequences[0].columns["returns"][1:] == pytest.approx((1.975, 1.9875, 2.0))


# The value model


def test_values_begin_as_told(tmp_path: Path) -> None:
    policy = fresh(tmp_path)
    own = value_model("policy", policy.model)
    tokens = torch.tensor([[40, 41, 42]])
    assert not own(tokens).any()  # a head that says 0
    for mine, theirs in zip(own.decoder.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    scratch = value_model("scratch", policy.model, seed=5)
    assert scratch(tokens).any()
    assert torch.equal(scratch(tokens), value_model("scratch", policy.model, seed=5)(tokens))
    judge = ScoredDecoder(fresh(tmp_path, seed=2).model, seed=9)
    models.save_scored(judge, tmp_path / "judge", tokenizer=policy.tokenizer)
    loaded = value_model(str(tmp_path / "judge"), policy.model)
    torch.testing.assert_close(loaded(tokens), judge(tokens))
    small = new_policy(
        ["be"], vocab_size=260, width=32, num_layers=1, num_heads=2, max_positions=32, seed=0, path=tmp_path / "small"
    )
    models.save_scored(ScoredDecoder(small.model), tmp_path / "other", tokenizer=small.tokenizer)
    with pytest.raises(ModelError, match="take one trained from the same base"):
        value_model(str(tmp_path / "other"), policy.model)


# The loop


class KilledError(Exception):
    """The machine went away."""


def kill_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """The loop dies after a step's updates, before anything of it is written."""
    learn = ActorCritic.learn

    def until_killed(self: ActorCritic, rolled: Sequence[Rolled]) -> dict[str, float]:
        metrics = learn(self, rolled)
        if self.step == step:
            raise KilledError
        return metrics

    patch.setattr(ActorCritic, "learn", until_killed)


def test_a_killed_run_goes_on_bit_for_bit(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(kl_target=0.5, kl_gain=0.5, minibatches=2, eos_penalty=0.1, kl_prompts=2, group_size=2)
    with open_stage(bench, "whole", {}) as stage:
        whole, critic = fresh(tmp_path), value_model("scratch", fresh(tmp_path).model)
        expected = asyncio.run(ppo_loop(stage, whole, critic, TASKS, EvenTokens(), config))
        rows = read_metrics(stage.run.path / "metrics.jsonl")
        _, kept = read_state(list_checkpoints(stage.run.checkpoints)[0])
    with open_stage(bench, "killed", {}) as stage:
        with monkeypatch.context() as patch:
            kill_after(patch, 3)
            first = fresh(tmp_path)
            critic_too = value_model("scratch", first.model)
            with pytest.raises(KilledError):
                asyncio.run(ppo_loop(stage, first, critic_too, TASKS, EvenTokens(), config))
        resumed = fresh(tmp_path)
        other = value_model("scratch", resumed.model)
        found = asyncio.run(ppo_loop(stage, resumed, other, TASKS, EvenTokens(), config))
        again = read_metrics(stage.run.path / "metrics.jsonl")
        _, kept_again = read_state(list_checkpoints(stage.run.checkpoints)[0])
    for one, two in ((whole.model, resumed.model), (critic, other)):
        for tensor, twin in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
            assert torch.equal(tensor, twin)
    assert kept == kept_again
    clock = ("step_s", "tokens_per_second", "rollout/seconds", "grade/seconds", "time")
    assert [{k: v for k, v in row.items() if not k.endswith(clock)} for row in rows] == [
        {k: v for k, v in row.items() if not k.endswith(clock)} for row in again
    ]
    assert expected["num_tokens"] == found["num_tokens"]
    coefs = [row["objective/kl_coef"] for row in rows]
    assert coefs[0] == 0.05
    assert len(set(coefs)) > 1  # it was adapted, and the adapted one went on


def test_the_first_epoch_is_on_policy_and_the_warm_up_leaves_the_policy_alone(bench: Workbench, tmp_path: Path) -> None:
    policy = fresh(tmp_path)
    before = [tensor.clone() for tensor in policy.model.state_dict().values()]
    critic = value_model("policy", policy.model)
    asyncio.run(ppo_loop(bench, policy, critic, TASKS, EvenTokens(), settings(steps=1, value_warmup=1)))
    for tensor, was in zip(policy.model.state_dict().values(), before, strict=True):
        assert torch.equal(tensor, was)
    assert critic.score.weight.any()
    with open_stage(bench, "next", {}) as stage:
        metrics = asyncio.run(
            ppo_loop(
                stage, policy, value_model("policy", policy.model), TASKS, EvenTokens(), settings(steps=1, epochs=1)
            )
        )
    assert metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_ratio/region_mean"] == 0.0


# The recipe


def test_the_recipe_from_a_file_to_two_models(tmp_path: Path) -> None:
    policy = fresh(tmp_path)
    policy.save(tmp_path / "model")
    rows = [{"prompt": f"be {number}", "answer": "e"} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ppo.run_with(
        {
            "model": str(tmp_path / "model"),
            "data": tmp_path / "rows.jsonl",
            "grader": "exact",
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 2,
            "max_tokens": 3,
            "epochs": 1,
            "dtype": "float32",
            "kl_prompts": 2,
            "runs": tmp_path / "runs",
        }
    )
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert {"objective/kl", "val/explained_variance", "value/loss", "kl_spent/k3", "reward"} <= last.keys()
    assert models.load(run / "model").config.vocab_size == policy.model.config.vocab_size
    assert models.load_scored(run / "value_model").score.weight.shape == (1, 32)
