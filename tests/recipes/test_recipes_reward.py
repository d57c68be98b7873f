"""Reward recipes: from rows to examples, where an answer is judged, a run from end to end, killed and resumed."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
import torch

from posttrain import models
from posttrain.core import Comparison, DataError, Message, RenderError, Task, read_metrics
from posttrain.data import StepsRow
from posttrain.evaluate import RewardReport, ScoredSteps
from posttrain.grade import RewardModel, prove, trajectory_from_text
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.process_reward import compare_steps, process_reward
from posttrain.recipes.reward_loop import split_by_prompt
from posttrain.recipes.reward_model import reward_model
from posttrain.recipes.reward_rows import load_ranked, ranked_examples, stepped_examples
from posttrain.recipes.reward_scoring import (
    FORMAT_FILE,
    RewardFormat,
    RewardPolicy,
    judged_at_end,
    judged_at_steps,
    load_reward,
    render_answers,
    step_ends,
)
from posttrain.recipes.workbench import Workbench
from posttrain.train import TIMING_METRICS


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny language model over bytes."""
    path = tmp_path_factory.mktemp("reward") / "lm"
    policy = new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=96,
        seed=0,
        path=path,
    )
    return policy.save(path)


@pytest.fixture
def policy(folder: Path) -> RewardPolicy:
    return load_reward(str(folder))


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def preferences(count: int) -> list[dict[str, object]]:
    rng = random.Random(0)
    return [
        {
            "prompt": f"q {index}?",
            "chosen": "yes it is",
            "rejected": "no " * rng.randint(1, 4),
            "margin": 1.5,
            "edited": "YES!" if index % 2 else None,
            "subset": "ab"[index % 3 == 0],
        }
        for index in range(count)
    ]


# Where an answer is judged


def test_an_answer_is_judged_at_the_token_that_ends_it(policy: RewardPolicy) -> None:
    for prompt in ("q?", (Message(role="user", content="q?"),)):
        (rendered,) = render_answers(policy.renderer, [(Task(id="t", prompt=prompt), "yes")])
        judged = judged_at_end(rendered)
        assert judged.positions == (len(judged.tokens) - 1,)
        assert judged.tokens[-1] in policy.renderer.stop_tokens
        assert "yes" in policy.tokenizer.decode(judged.tokens)


def test_steps_end_with_their_separator() -> None:
    assert step_ends("one\n\ntwo\n\nthree", "\n\n") == [5, 10, 15]
    assert step_ends("one\n\n\n\ntwo", "\n\n") == [7, 10]  # a blank step belongs to the one before
    assert step_ends("one\n\n", "\n\n") == [5]
    assert step_ends("one", "\n\n") == [3]
    with pytest.raises(RenderError, match="empty"):
        step_ends("  ", "\n")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("separator", ["\n\n", "\n", " ки "])
def test_steps_are_judged_where_they_end(policy: RewardPolicy, chat: bool, separator: str) -> None:
    steps = ["one = 1", "två 😀", "3 + 4 = 7"]
    answer = separator.join(steps)
    prompt = (Message(role="user", content="q?"),) if chat else "q?"
    (rendered,) = render_answers(policy.renderer, [(Task(id="t", prompt=prompt), answer)])
    assert not isinstance(rendered, RenderError)
    tokens, positions = judged_at_steps(policy.tokenizer, rendered, answer, step_ends(answer, separator))
    first = rendered.mask.index(True)
    texts = [policy.tokenizer.decode(tokens[first : place + 1]) for place in positions]
    assert texts == [steps[0] + separator, separator.join(steps[:2]) + separator, answer]
    assert positions[-1] == len(tokens) - 1
    for place in positions[:-1]:  # and not one token later than need be
        assert not policy.tokenizer.decode(tokens[first:place]).endswith(separator)


# Rows


def test_ranks_margins_and_tags(bench: Workbench, policy: RewardPolicy, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", preferences(6))
    ranked = load_ranked(bench, path, edited="edited", tags=("subset",))
    found = ranked_examples(bench, policy, ranked, 96, chat=True, margin=True)
    assert [len(row.answers) for row in found] == [2, 3, 2, 3, 2, 3]
    assert found[1].answers[0] == "YES!"
    assert [row.tags for row in found][:2] == [("subset:b",), ("subset:a",)]
    levels = [max(sequence.columns["levels"]) for sequence in found[1].example.sequences]
    assert levels == [1.5, 1.5, 0.0]  # edited, chosen, rejected
    assert found[0].example.num_targets() == 2
    assert found[0].lengths[0] == len("yes it is") + 1
    with pytest.raises(DataError, match="no column 'better'"):
        load_ranked(bench, path, edited="better")


def test_long_rows_are_left_out_and_counted(bench: Workbench, policy: RewardPolicy, tmp_path: Path) -> None:
    rows = preferences(5)
    rows[2]["chosen"] = "long " * 40
    ranked = load_ranked(bench, write(tmp_path / "pairs.jsonl", rows))
    assert len(ranked_examples(bench, policy, ranked, 64)) == 4
    with pytest.raises(DataError, match="5 too long"):
        ranked_examples(bench, policy, ranked, 2)


def test_after_the_first_error_nothing_is_learned(bench: Workbench, policy: RewardPolicy) -> None:
    row = StepsRow(id="r", prompt="q", completions=("a", "b", "c", "d"), labels=(True, False, True, False))
    (whole,) = stepped_examples(bench, policy, [row], 96, separator="\n")
    assert whole.labels == (1.0, 0.0, 1.0, 0.0)
    assert whole.example.num_targets() == 4
    (cut,) = stepped_examples(bench, policy, [row], 96, separator="\n", until_first_error=True)
    assert cut.labels == (1.0, 0.0, None, None)
    assert cut.example.num_targets() == 2


def test_no_prompt_is_on_both_sides(bench: Workbench, policy: RewardPolicy, tmp_path: Path) -> None:
    rows = preferences(30)
    for index, row in enumerate(rows):
        row["prompt"] = f"q {index // 3}"
    found = ranked_examples(bench, policy, load_ranked(bench, write(tmp_path / "p.jsonl", rows)), 96)
    kept, apart = split_by_prompt(found, 7, 0, example=lambda row: row.example)
    assert (len(kept), len(apart)) == (21, 9)  # whole prompts of three rows each
    assert not {row.prompt for row in kept} & {row.prompt for row in apart}
    with pytest.raises(DataError, match="nothing is left"):
        split_by_prompt(found, 30, 0, example=lambda row: row.example)


# Runs


SETTINGS = {"held_out": 10, "lr": 3e-3, "epochs": 2.0, "batch_size": 8, "dtype": "float32", "chat": True}


def test_a_reward_model_from_rows_to_grader(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "pairs.jsonl", preferences(60))
    run = reward_model(
        model=str(folder), data=path, edited="edited", tags=("subset",), margin=True, runs=tmp_path / "runs", **SETTINGS
    )
    report = RewardReport.from_json((run / "reward_report.json").read_bytes())
    assert report.accuracy.low > 0.5
    assert set(report.by_tag) == {"subset:a", "subset:b"}
    against = Comparison.from_json((run / "comparison.json").read_bytes())  # with the head as it was drawn
    assert against.wins + against.losses + against.ties == report.num_pairs
    assert "accuracy" in capsys.readouterr().out
    assert "Reliability" in (run / "report.html").read_text(encoding="utf-8")
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["eval/accuracy"] == pytest.approx(report.accuracy.value)
    form = RewardFormat.from_json((run / "model" / FORMAT_FILE).read_bytes())
    assert form.std == pytest.approx(report.std_reward)

    judge = load_reward(str(run / "model"))
    better = [
        (Task(id=str(n), prompt=(Message(role="user", content=f"q {n}?"),)), "yes it is", "no no") for n in (70, 71)
    ]
    grader = RewardModel(judge.scorer(), better=better)
    assert prove(grader).ok, prove(grader).problems
    # the value model of PPO starts from the same folder
    critic = models.load_scored(run / "model")
    task, answer, _ = better[0]
    (encoded,) = judge.encode([(task, answer)])
    with torch.no_grad():
        values_T = critic(torch.tensor([encoded.tokens]))[0]
    assert asyncio.run(grader.grade(trajectory_from_text(task, answer))).score == pytest.approx(
        values_T[-1].item(), abs=1e-5
    )


def test_a_process_reward_model_from_rows_to_grader(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = []
    for index in range(60):
        wrong = rng.randrange(4)
        steps = ["bad" if place == wrong else "good" for place in range(3)]
        rows.append({"prompt": f"q {index}", "completions": steps, "labels": [step == "good" for step in steps]})
    run = process_reward(
        model=str(folder),
        data=write(tmp_path / "steps.jsonl", rows),
        separator="\\n",
        runs=tmp_path / "runs",
        **{**SETTINGS, "epochs": 6.0},
    )
    report = json.loads((run / "step_report.json").read_text())
    assert report["positive_rate"] < 0.8
    assert report["accuracy_right"]["low"] > 0.5
    assert report["accuracy_wrong"]["low"] > 0.5
    against = Comparison.from_json((run / "comparison.json").read_bytes())
    assert against.wins + against.losses + against.ties == report["num_answers"]
    judge = load_reward(str(run / "model"))
    assert judge.format == RewardFormat(kind="process", separator="\n")
    grader = RewardModel(judge.scorer(), aggregate="min", probability=True)
    task = Task(id="t", prompt=(Message(role="user", content="q 99"),))
    good, bad = (
        asyncio.run(grader.grade(trajectory_from_text(task, text))) for text in ("good\ngood\ngood", "good\nbad\ngood")
    )
    assert good.parts["steps"] == 3
    assert good.score > 0.5 > bad.score
    empty = asyncio.run(grader.grade(trajectory_from_text(task, "  ")))
    assert empty.score is None
    assert "empty" in empty.error


def test_process_rewards_are_compared_by_answer() -> None:
    """By hand: shares of steps told rightly 1, 1, 1/2 against 1/2, 0, 1/2; unlabelled steps do not count."""

    def answers(*scores: tuple[float, ...]) -> list[ScoredSteps]:
        labels = ((1.0, 0.0), (1.0, None), (0.0, 0.0))
        return [ScoredSteps(id=str(n), scores=own, labels=labels[n]) for n, own in enumerate(scores)]

    after = answers((1.0, -1.0), (2.0, -5.0), (1.0, -1.0))
    before = answers((1.0, 1.0), (-2.0, 5.0), (-1.0, 1.0))
    found = compare_steps(after, before, names=("trained", "drawn"))
    assert (found.wins, found.losses, found.ties) == (2, 0, 1)
    assert found.difference.value == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert found.p_value == 0.5
    assert not found.better


def test_a_killed_run_goes_on_to_the_same_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.recipes import reward_loop as loop

    path = write(tmp_path / "pairs.jsonl", preferences(60))
    options = {"model": str(folder), "data": path, **SETTINGS}
    whole = reward_model(runs=tmp_path / "whole", **options)

    batch_at, seen = loop.batch_at, []

    def killed(*arguments: int) -> list[int]:
        seen.append(arguments)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return batch_at(*arguments)

    monkeypatch.setattr(loop, "batch_at", killed)
    every = loop.RewardLoop
    monkeypatch.setattr(
        "posttrain.recipes.reward_model.RewardLoop", lambda **settings: every(**settings, checkpoint_every=4)
    )
    with pytest.raises(KeyboardInterrupt):
        reward_model(runs=tmp_path / "cut", **options)
    (cut,) = (each.parent for each in (tmp_path / "cut").glob("*/run.json"))
    reward_model(runs=tmp_path / "cut", resume=cut, **options)
    name = "model.safetensors"
    assert (cut / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    drop = TIMING_METRICS | {"time"}
    first, second = (
        [{key: value for key, value in row.items() if key not in drop} for row in read_metrics(run / "metrics.jsonl")]
        for run in (whole, cut)
    )
    assert first == second
