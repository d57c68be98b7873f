"""A reward model from nothing on real preferences: HH-RLHF's harmless pairs, in one epoch on a CPU.

    python benchmarks/reward_model.py PAIRS.jsonl.gz [--seeds 3]

For each seed the prompts are split anew into two thirds to train on and one third to evaluate on; tokenizer, decoder
and head are made from the training texts alone, and `posttrain run reward_model` does the rest. What is printed is the
accuracy on held-out pairs with its interval, beside two rules that know no words: the longer answer is better, and the
shorter one. A model that only counts words scores what the better of them does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch

from posttrain import data
from posttrain.core import generator
from posttrain.evaluate import RewardReport
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.reward_model import reward_model


def split(rows: list[data.PreferenceRow], seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and evaluation rows: the last question with both answers; no question is on both sides."""
    plain: list[dict[str, object]] = []
    for row in rows:
        assert not isinstance(row.prompt, str)
        assert not isinstance(row.chosen, str)
        assert not isinstance(row.rejected, str)
        sides = {"prompt": row.prompt[-1:], "chosen": row.chosen[:1], "rejected": row.rejected[:1]}
        plain.append(
            {name: [{"role": turn.role, "content": turn.content} for turn in turns] for name, turns in sides.items()}
        )
    questions = sorted({json.dumps(row["prompt"]) for row in plain})
    generator(seed, "split").shuffle(questions)
    held = set(questions[: len(questions) // 3])
    return (
        [row for row in plain if json.dumps(row["prompt"]) not in held],
        [row for row in plain if json.dumps(row["prompt"]) in held],
    )


def run(rows: list[data.PreferenceRow], seed: int, folder: Path) -> RewardReport:
    """One training run and its report."""
    train, test = split(rows, seed)
    for name, side in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side), encoding="utf-8")
    texts = [turn["content"] for row in train for turns in row.values() for turn in turns]  # type: ignore[attr-defined]
    policy = new_policy(
        texts, vocab_size=2048, width=64, num_layers=1, num_heads=2, max_positions=256, seed=seed, path=folder / "lm"
    )
    policy.save(folder / "lm")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        path = reward_model(
            model=str(folder / "lm"),
            data=folder / "train.jsonl",
            eval_data=folder / "test.jsonl",
            lr=2e-3,
            warmup=0.05,
            weight_decay=0.1,
            batch_size=32,
            dtype="float32",
            seed=seed,
            runs=folder / "runs",
        )
    return RewardReport.from_json((path / "reward_report.json").read_bytes())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(data.load(options.pairs, kind="preference"))
    for seed in range(options.seeds):
        started_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = run(rows, seed, Path(folder))
        accuracy, length = report.accuracy, report.length
        assert length is not None
        longer = length.longer_is_better.value
        print(
            f"seed {seed}: accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] on "
            f"{report.num_pairs} pairs; longer is better {longer:.3f}, shorter {1 - longer:.3f}; the model prefers the "
            f"longer {length.longer_wins.value:.3f}; calibration error {report.calibration.ece:.3f}; "
            f"{time.perf_counter() - started_s:.0f} s"
        )


if __name__ == "__main__":
    main()
