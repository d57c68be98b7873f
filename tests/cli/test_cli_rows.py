"""`posttrain data`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTION = "how many apples are in the basket that stands behind the old green door of the shop"


def test_inspect_says_what_it_found(posttrain: Callable[..., Any], write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"question {number}", "completion": "yes"} for number in range(4)]
    path = write_rows("rows.jsonl", [*rows, '{"prompt": ', {"prompt": "no completion"}])
    said = posttrain("data", "inspect", path)
    assert said.code == 0
    assert "format: prompt_completion; read as: completion" in said.out
    assert "6 rows read, 4 used, 2 bad (33.3 %)" in said.out
    bad = [line.split("\t") for line in said.out.splitlines() if line.startswith("rows.jsonl\t")]
    assert [(line[1], line[2]) for line in bad] == [("5", ""), ("6", "completion")]
    assert "broken JSON" in bad[0][3]
    assert said.out.count("\nexample ") == 2
    plain = posttrain("data", "inspect", path, "--kind", "prompt", "--limit", 2, "--json").json()
    assert (plain["report"]["kind"], plain["report"]["num_read"], len(plain["examples"])) == ("prompt", 2, 2)


def test_inspect_with_columns_and_without_a_known_format(
    posttrain: Callable[..., Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_rows("odd.jsonl", [{"ask": "one?", "say": "two"}])
    odd = posttrain("data", "inspect", path)
    assert odd.code == 1
    assert "ask" in odd.err
    said = posttrain("data", "inspect", path, "--columns", "prompt=ask,completion=say", "--json")
    assert said.json()["examples"][0]["completion"] == "two"
    assert posttrain("data", "inspect", tmp_path / "absent.jsonl").code == 1


def test_contamination_is_found_and_taken_out(
    posttrain: Callable[..., Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    train_rows = [
        {"prompt": "what is the capital of France", "completion": "Paris", "extra": 1},
        {"prompt": f"please tell me {QUESTION}", "completion": "seven", "extra": 2},
        "{broken",
        *({"prompt": f"something else, number {number}", "completion": "x", "extra": 3} for number in range(20)),
    ]
    train = write_rows("train.jsonl", train_rows)
    held_out = write_rows("test.jsonl", [{"question": QUESTION, "answer": "7"}, {"question": "unseen", "answer": "8"}])
    out = tmp_path / "clean" / "train.jsonl"
    said = posttrain("data", "contamination", train, held_out, "--out", out)
    assert said.code == 0
    assert "test.jsonl: 1 of 2 instances (50.0 %) are in the training data" in said.out
    assert "train.jsonl:2\ttest.jsonl: test.jsonl:1\tngram\t100%" in said.out
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == [row for row in train_rows if isinstance(row, dict) and row["extra"] != 2]
    strict = posttrain("data", "contamination", train, held_out, "--ngram", 50, "--json").json()
    assert (strict["ngram"], strict["matches"]) == (50, [])


def test_contamination_of_both_halves_of_a_pair(
    posttrain: Callable[..., Any], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in (QUESTION, "something else")]
    train, held_out = write_rows("pairs.jsonl", pairs), write_rows("test.jsonl", [{"prompt": QUESTION}])
    out = tmp_path / "clean.jsonl"
    assert posttrain("data", "contamination", train, held_out, "--out", out).code == 0
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["something else"]


def test_contamination_refuses_to_overwrite_its_source(
    posttrain: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    train, held_out = (
        write_rows("a.jsonl", [{"prompt": "x", "completion": "y"}]),
        write_rows("b.jsonl", [{"prompt": "x"}]),
    )
    said = posttrain("data", "contamination", train, held_out, "--out", train)
    assert (said.code, "write to another file" in said.err) == (2, True)
    assert posttrain("data", "contamination", train, held_out, held_out).code == 2
    assert posttrain("data", "contamination", train, held_out, "--threshold", 2).code == 2
