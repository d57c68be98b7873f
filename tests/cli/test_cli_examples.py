"""The recipes of examples/, run as a user runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MAX_LINES = 80


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_compare_models(
    posttrain: Callable[..., Any], tiny_model: Path, own_model: Path, write_rows: Callable[..., Path]
) -> None:
    greedy = ("--max-tokens", 4, "--temperature", 0, "--json")
    prompts = [f"{number} and {number} is" for number in range(10)]
    written = posttrain("generate", "--model", tiny_model, "--prompt", *prompts, *greedy).json()
    tasks = write_rows("tasks.jsonl", [{"prompt": each["prompt"], "answer": each["text"] or "-"} for each in written])
    words = ("run", EXAMPLES / "compare_models.py", "--data", tasks, "--max-tokens", 4)
    said = posttrain(*words, "--candidate", tiny_model, "--champion", own_model)
    assert said.code == 0
    assert f"{tiny_model}: accuracy" in said.out
    assert "difference +0.0% [+0.0%, +0.0%] with 95% confidence; 0 tasks only the candidate" in said.out
    assert "that the candidate is better is not shown" in said.out
    result = posttrain(*words, "--candidate", tiny_model, "--champion", own_model, "--json").json()
    assert (result["wins"], result["losses"], result["ties"]) == (0, 0, 10)


@pytest.mark.slow
def test_word_count_learns(posttrain: Callable[..., Any], tmp_path: Path) -> None:
    words = ("run", EXAMPLES / "word_count.py", "--runs", tmp_path, "--grpo-steps", 25)
    result = posttrain(*words, "--json").json()
    assert result["after_grpo"] > result["after_sft"] + 0.15
    listed = posttrain("runs", "--runs", tmp_path, "--json").json()
    assert {(run["recipe"], run["status"]) for run in listed} == {("word_count", "finished"), ("sft", "finished")}
    (whole,) = [run for run in listed if run["recipe"] == "word_count"]
    answer = posttrain("generate", "--model", tmp_path / whole["id"] / "model", "--prompt", "3 words:", "--seed", 0)
    assert answer.code == 0
