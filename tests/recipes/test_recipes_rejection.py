"""Best of K and rejection sampling: what is chosen, what is told of it, and that rounds raise what is graded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from posttrain import models
from posttrain.core import DataError, Grade, StopReason, Task, Trajectory, read_jsonl, read_metrics
from posttrain.recipes.best_of import Kept, example_of, select, selection_metrics, without_repetitions
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.rejection_sampling import (
    ChosenAnswer,
    RejectionSampling,
    rejection_sampling,
    rejection_sampling_loop,
)
from posttrain.recipes.workbench import Workbench
from posttrain.rollout import Group
from posttrain.train import TrainConfig, Trainer, nll_objective


def grades(*scores: float | None) -> list[Grade]:
    return [Grade(score=score, grader="toy", error=None if score is not None else "crashed") for score in scores]


def texts(kept: list[Kept]) -> list[str]:
    return [one.trajectory.text for one in kept]


def with_lengths(group: Group, lengths: list[int], clipped: tuple[int, ...] = ()) -> Group:
    siblings = []
    for index, (trajectory, length) in enumerate(zip(group.trajectories, lengths, strict=True)):
        tokens = (5,) + (6,) * length
        siblings.append(
            trajectory.replace(
                tokens=tokens,
                mask=(False,) + (True,) * length,
                logprobs=(0.0,) + (-1.0,) * length,
                policy_logprobs=(0.0,) + (-1.0,) * length,
                stop_reason=StopReason.LENGTH if index in clipped else StopReason.EOS,
            )
        )
    return group.replace(trajectories=tuple(siblings))


# Choosing


def test_best_takes_the_highest_scores_right_or_not(make_group) -> None:
    group = make_group("a", ["w", "x", "y", "z"])
    found = select([group], grades(0.1, 0.4, None, 0.3), keep="best", per_prompt=2)
    assert texts(found) == ["x", "z"]
    assert [one.score for one in found] == [0.4, 0.3]


def test_correct_takes_only_what_is_right_and_all_where_asked(make_group) -> None:
    groups = [make_group("a", ["w", "x", "y", "z"]), make_group("b", ["w", "x", "y", "z"])]
    scores = grades(1.0, 0.9, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5)
    assert sorted(texts(select(groups, scores, per_prompt=0))) == ["w", "y", "z"]
    assert len(select(groups, scores, per_prompt=2)) == 2
    assert sorted(texts(select(groups, scores, per_prompt=0, threshold=0.5))) == ["w", "x", "y", "z", "z"]
    assert select(groups, scores, per_prompt=0, max_solved=0.7) == [], "three of four right is above 0.7"


def test_the_draw_depends_on_the_seed_alone(make_group) -> None:
    group = make_group("a", [f"answer {number}" for number in range(12)])
    scores = grades(*[1.0] * 12)
    drawn = {tuple(texts(select([group], scores, per_prompt=2, seed=seed))) for seed in range(12)}
    assert len(drawn) > 4
    assert select([group], scores, per_prompt=2, seed=3) == select([group], scores, per_prompt=2, seed=3)


def test_shortest_first(make_group) -> None:
    group = with_lengths(make_group("a", ["w", "x", "y", "z"]), [9, 3, 5, 1])
    assert texts(select([group], grades(1.0, 1.0, 1.0, 0.0), keep="shortest", per_prompt=2)) == ["x", "y"]


@pytest.mark.parametrize("keep", ["best", "correct", "shortest"])
def test_never_failed_cut_ungraded_or_repeated(make_group, keep) -> None:
    group = with_lengths(make_group("a", ["same", "same ", " cut", "lost", "ungraded"]), [2, 2, 2, 2, 2], clipped=(2,))
    lost = group.trajectories[3].replace(stop_reason=StopReason.ERROR, error="lost")
    group = group.replace(trajectories=(*group.trajectories[:3], lost, group.trajectories[4]))
    found = select([group], grades(1.0, 1.0, 1.0, 1.0, None), keep=keep, per_prompt=0)
    assert len(found) == 1
    assert found[0].trajectory.text.strip() == "same"


def test_repetitions_are_of_one_prompt(make_group) -> None:
    one, two = make_group("a", ["same", "other"]), make_group("b", ["same", "other"])
    kept = [
        Kept(trajectory, 1.0) for group in (one, two) for trajectory in (*group.trajectories, group.trajectories[0])
    ]
    assert len(without_repetitions(kept)) == 4


def test_metrics_by_hand(make_group) -> None:
    groups = [make_group("a", ["w", "x", "y", "z"]), make_group("b", ["w", "x", "y", "z"])]
    scores = grades(1.0, 0.0, 0.0, 0.0, 0.5, None, 0.0, 0.0)
    chosen = select(groups, scores)
    metrics = selection_metrics(groups, scores, chosen)
    # one of four right in the first group, none in the second: pass@1 = (1/4 + 0) / 2, pass@2 = (1 − C(3,2)/C(4,2)) / 2
    assert metrics["pass@1"] == pytest.approx(0.125)
    assert metrics["pass@2"] == pytest.approx(0.25)
    assert metrics["pass@4"] == pytest.approx(0.5)
    assert metrics["best_of/mean_score"] == pytest.approx(0.75)
    assert metrics["selected/num"] == metrics["selected/prompts"] == 1
    assert metrics["selected/share_of_prompts"] == 0.5
    with pytest.raises(AssertionError, match="grades"):
        selection_metrics(groups, [*scores, *grades(1.0)], chosen)


def test_an_example_is_the_tokens_that_were_sampled(make_group) -> None:
    trajectory = make_group("a", ["w"]).trajectories[0]
    (sequence,) = example_of(trajectory).sequences
    assert (sequence.tokens, sequence.mask) == (trajectory.tokens, trajectory.mask)


# The loop

WORDS = ("yes", "no", "perhaps", "never")


class SaysYes:
    """Right is "yes"."""

    name = "yes"

    async def grade(self, trajectory: Trajectory) -> Grade:
        return Grade(score=float(trajectory.text.strip() == "yes"), grader=self.name)


TASKS = [Task(id=f"task-{number}", prompt=f"question {number}: ") for number in range(8)]


def guesser(path: Path) -> Policy:
    """A policy that has learned to answer with one of four words, each as likely."""
    policy = new_policy(
        ["question"], vocab_size=262, width=32, num_layers=1, num_heads=2, max_positions=64, seed=0, path=path
    )
    from posttrain.core import Example, TokenSequence

    examples = []
    for task in TASKS:
        for word in WORDS:
            rendered = policy.renderer.completion_pair(task.prompt, word)
            sequence = TokenSequence(tokens=rendered.tokens, mask=rendered.mask)
            examples.append(Example(id=f"{task.id}/{word}", sequences=(sequence,)))
    trainer = Trainer(policy.model, TrainConfig(lr=5e-3), nll_objective)
    for _ in range(40):
        trainer.step(examples)
    policy.save(path)
    return policy


def settings(**changes: object) -> RejectionSampling:
    values = {"samples": 8, "max_tokens": 12, "epochs": 6, "batch_size": 8, "lr": 3e-3, "dtype": "float32"}
    return RejectionSampling.from_dict({**values, **changes})


@pytest.mark.slow
def test_rounds_raise_the_share_of_right_answers_and_resume(bench: Workbench, tmp_path: Path) -> None:
    guesser(tmp_path / "model")
    config = settings(rounds=3, per_prompt=2, epochs=12, batch_size=4)
    asyncio.run(rejection_sampling_loop(bench, tmp_path / "model", TASKS, SaysYes(), config))
    rows = read_metrics(bench.run.path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["pass@1"] < 0.5
    assert rows[2]["pass@1"] > rows[0]["pass@1"] + 0.3
    assert rows[0]["pass@1"] <= rows[0]["pass@2"] <= rows[0]["pass@8"]
    chosen = read_jsonl(bench.run.path / "chosen-1.jsonl", ChosenAnswer)
    assert all(one.score == 1.0 and one.trajectory.text.strip() == "yes" for one in chosen)

    again = asyncio.run(rejection_sampling_loop(bench, tmp_path / "model", TASKS, SaysYes(), config))
    assert len(read_metrics(bench.run.path / "metrics.jsonl")) == 3, "no round is sampled twice"
    last = models.load(bench.run.path / "round-3")
    torch.testing.assert_close(again.model.embed.weight, last.embed.weight, atol=0, rtol=0)


def test_a_round_without_a_choice_says_what_to_do(bench: Workbench, tmp_path: Path) -> None:
    policy = new_policy(
        ["question"], vocab_size=262, width=32, num_layers=1, num_heads=2, max_positions=64, seed=0, path=tmp_path / "m"
    )
    policy.save(tmp_path / "m")
    with pytest.raises(DataError, match=r"none of 16 answers to 8 prompts was chosen \(pass@2 0\.000"):
        asyncio.run(rejection_sampling_loop(bench, tmp_path / "m", TASKS, SaysYes(), settings(samples=2)))


def test_the_recipe(tmp_path: Path) -> None:
    guesser(tmp_path / "model")
    lines = [{"prompt": task.prompt, "answer": "yes"} for task in TASKS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = rejection_sampling.run_with(
        {
            "model": str(tmp_path / "model"),
            "data": str(tmp_path / "data.jsonl"),
            "grader": "exact",
            "samples": 8,
            "max_tokens": 12,
            "epochs": 2,
            "lr": 1e-3,
            "dtype": "float32",
            "runs": str(tmp_path / "runs"),
        }
    )
    assert (run / "model" / "model.safetensors").is_file()
    metrics = read_metrics(run / "metrics.jsonl")[-1]
    assert metrics["selected/num"] > 0
    assert metrics["rewards/exact/mean"] == pytest.approx(metrics["pass@1"])
