"""Reward models learn what they are asked to: people's preferences, and where a chain of sums goes wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from posttrain import data
from posttrain.core import Message
from posttrain.evaluate import RewardReport, StepReport
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.process_reward import process_reward
from posttrain.recipes.reward_model import reward_model

HARMLESS = Path(__file__).resolve().parents[2].parent / "shared/data/preference/hh_rlhf_harmless_base_test.jsonl.gz"


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(messages: str | tuple[Message, ...]) -> list[dict[str, str]]:
    assert not isinstance(messages, str)
    return [{"role": turn.role, "content": turn.content} for turn in messages]


@pytest.mark.slow
def test_a_reward_model_from_nothing_beats_chance_on_preferences_of_people(tmp_path: Path) -> None:
    """Measured over three splits: 0.58, 0.58, 0.59 of about 580 pairs, intervals from 0.54 (see benchmarks).

    "The shorter answer is better" alone would score 0.56 to 0.58 here: harmless answers are short, and that is most of
    what so small a model learns, as its report says.
    """
    if not HARMLESS.exists():
        pytest.skip("no HH-RLHF pairs beside the repository")
    rows = [
        {"prompt": turns(row.prompt)[-1:], "chosen": turns(row.chosen)[:1], "rejected": turns(row.rejected)[:1]}
        for row in data.load(HARMLESS, kind="preference")
    ]
    questions = sorted({json.dumps(row["prompt"]) for row in rows})
    random.Random(0).shuffle(questions)
    held = set(questions[: len(questions) // 3])
    train = [row for row in rows if json.dumps(row["prompt"]) not in held]
    test = [row for row in rows if json.dumps(row["prompt"]) in held]
    policy = new_policy(
        [turn["content"] for row in train for side in row.values() for turn in side],
        vocab_size=2048,
        width=64,
        num_layers=1,
        num_heads=2,
        max_positions=256,
        seed=0,
        path=tmp_path / "lm",
    )
    policy.save(tmp_path / "lm")
    run = reward_model(
        model=str(tmp_path / "lm"),
        data=write(tmp_path / "train.jsonl", train),
        eval_data=write(tmp_path / "test.jsonl", test),
        lr=2e-3,
        warmup=0.05,
        weight_decay=0.1,
        batch_size=32,
        dtype="float32",
        runs=tmp_path / "runs",
    )
    report = RewardReport.from_json((run / "reward_report.json").read_bytes())
    assert report.num_pairs > 500
    assert report.accuracy.low > 0.5, report.summary()
    assert report.length is not None


def chains(count: int) -> list[dict[str, object]]:
    """Counting up from a digit, modulo ten; four steps of ten are wrong, and the next goes on from what they say."""
    rng = random.Random(0)
    rows: list[dict[str, object]] = []
    for index in range(count):
        total, steps, labels = rng.randrange(10), [], []
        for _ in range(6):
            right = rng.random() < 0.6
            result = (total + 1 + (0 if right else rng.randint(1, 9))) % 10
            steps.append(f"{total}+1={result}")
            labels.append(right)
            total = result
        rows.append({"prompt": f"{index}: ", "completions": steps, "labels": labels})
    return rows


@pytest.mark.slow
def test_a_process_reward_model_finds_the_wrong_step(tmp_path: Path) -> None:
    """Measured with three seeds: every step of 150 held-out chains, where always saying "right" scores 60 %."""
    policy = new_policy(
        ["0 1 2 3 4 5 6 7 8 9 + = \n"],
        vocab_size=262,
        width=64,
        num_layers=2,
        num_heads=4,
        max_positions=128,
        seed=0,
        path=tmp_path / "lm",
    )
    policy.save(tmp_path / "lm")
    run = process_reward(
        model=str(tmp_path / "lm"),
        data=write(tmp_path / "chains.jsonl", chains(1500)),
        separator="\\n",
        held_out=150,
        lr=3e-3,
        schedule="cosine",
        epochs=12.0,
        batch_size=16,
        dtype="float32",
        runs=tmp_path / "runs",
    )
    report = StepReport.from_json((run / "step_report.json").read_bytes())
    assert report.accuracy.low > report.positive_rate, report.summary()  # better than always saying "right"
    assert report.accuracy_wrong is not None
    assert report.accuracy_wrong.low > 0.5, report.summary()
    assert report.f1 is not None
    assert report.f1 > 0.5
