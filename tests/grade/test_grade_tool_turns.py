"""BFCL's multi-turn categories: every turn's ground truth passes, changed calls fail."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import DataError, Task
from posttrain.grade import ToolCalls, bfcl_turns, trajectory_from_text

Rows = Callable[[str], list[dict[str, Any]]]
_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tool_calling" / "bfcl_v4"


def _functions() -> list[dict[str, Any]]:
    paths = sorted((_FOLDER / "multi_turn_func_doc").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]


def _score(task: Task, calls: list[dict[str, Any]]) -> float | None:
    text = json.dumps(calls) if calls else "There is nothing to call."
    return asyncio.run(ToolCalls().grade(trajectory_from_text(task, text))).score


def test_turns_by_hand() -> None:
    question = [[{"role": "user", "content": "Go to a, then sort b."}], [{"role": "user", "content": "Thanks."}]]
    row = {"id": "r", "question": question}
    sort = {"name": "sort", "parameters": {"properties": {"file_name": {"type": "string"}}}}
    first, second = bfcl_turns(row, {"ground_truth": [["cd(folder='a')", "sort('b')"], []]}, [sort])
    right = [{"name": "cd", "arguments": {"folder": "a"}}, {"name": "sort", "arguments": {"file_name": "b"}}]
    assert (_score(first, right), _score(first, right[:1]), _score(first, [])) == (1.0, 0.0, 0.0)
    assert (_score(second, []), _score(second, right)) == (1.0, 0.0)
    assert [message.role for message in second.prompt if not isinstance(message, str)] == ["user", "assistant", "user"]
    with pytest.raises(DataError, match="is no call that can be read"):
        bfcl_turns(row, {"ground_truth": [["cd(folder="], []]}, [])


@pytest.mark.parametrize("category", ["base", "long_context", "miss_func", "miss_param"])
def test_ground_truths_of_every_turn_pass_and_changed_ones_fail(data_rows: Rows, category: str) -> None:
    rows = data_rows(f"tool_calling/bfcl_v4/multi_turn_{category}.jsonl.gz")
    truths = data_rows(f"tool_calling/bfcl_v4/possible_answer/multi_turn_{category}.jsonl.gz")
    counts: Counter[str] = Counter()
    functions = _functions()
    for row, truth in zip(rows[::4], truths[::4], strict=True):
        for task in bfcl_turns(row, truth, functions):
            calls = [
                {"name": one["name"], "arguments": {key: value[0] for key, value in one["arguments"].items()}}
                for one in task.facts["calls"]
            ]
            counts["turns"] += 1
            counts["right"] += _score(task, calls) == 1.0
            counts["wrong"] += _score(task, [*calls, {"name": "ls", "arguments": {"surplus": True}}]) == 1.0
    assert counts["turns"] > 100
    assert counts["right"] == counts["turns"]
    assert counts["wrong"] == 0
