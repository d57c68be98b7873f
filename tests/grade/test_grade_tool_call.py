from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.core import GradeError, Message, Task, ToolCall, ToolSpec
from posttrain.grade import NoToolCall, ToolCalls, bfcl_task, prove, tool_calls_in, trajectory_from_text

Rows = Callable[[str], list[dict[str, Any]]]
CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "live_simple",
    "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip


@pytest.mark.parametrize("grader", [ToolCalls(), ToolCalls(partial=True), ToolCalls(ordered=True)])
def test_it_proves_itself(grader: ToolCalls) -> None:
    assert prove(grader).problems == ()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": -1}}',
        '{"name": "f", "parameters": {"a": -1}}',
        '{"name": "f", "arguments": "{\\"a\\": -1}"}',
        '[{"function": {"name": "f", "arguments": {"a": -1}}}]',
        '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": -1}}}]}',
        '{"f": {"a": -1}}',
        "f(a=-1)",
        "[f(a=-1)]",
        "```python\nf(a=-1)\n```",
        'I call it.\n<tool_call>\n{"name": "f", "arguments": {"a": -1}}\n</tool_call>',
        'Sure: {"name": "f", "arguments": {"a": -1}} there.',
    ],
)
def test_one_call_in_many_forms(text: str) -> None:
    assert tool_calls_in(text) == (ToolCall(name="f", arguments={"a": -1}),)


@pytest.mark.parametrize(
    "text", ["", "hello", "f", "f(1)", "f(a=b)", "f(**a)", "3", '{"name": "f", "arguments": 3}', "((((("]
)
def test_what_is_no_call(text: str) -> None:
    with pytest.raises(NoToolCall):
        tool_calls_in(text)


def test_an_empty_list_is_no_call() -> None:
    assert tool_calls_in("[]") == ()


def test_calls_of_the_message_come_first() -> None:
    task = Task(id="t", prompt="?", facts={"calls": [{"name": "f", "arguments": {"a": [1]}}]})
    message = Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"a": 1}),))
    trajectory = trajectory_from_text(task, "calling").replace(messages=(message,))
    assert asyncio.run(ToolCalls().grade(trajectory)).score == 1.0


def test_parts_by_hand() -> None:
    calls = [
        {"name": "f", "arguments": {"a": [1]}},
        {"name": "g", "arguments": {}},
        {"name": "f", "arguments": {"a": [2]}},
    ]
    task = Task(id="t", prompt="?", facts={"calls": calls})
    grade = asyncio.run(ToolCalls(partial=True).grade(trajectory_from_text(task, "[f(a=2), f(a=3), f(a=2), h()]")))
    assert grade.parts == {"names": pytest.approx(2 / 3), "arguments": pytest.approx(1 / 3), "calls": 4.0}
    assert grade.score == pytest.approx(1 / 4)  # over the larger number of calls


def test_pairing_is_the_largest_one() -> None:
    # The first call fits both, the second only the first: taking greedily would lose one.
    calls = [{"name": "f", "arguments": {"a": [1, 2]}}, {"name": "f", "arguments": {"a": [1]}}]
    task = Task(id="t", prompt="?", facts={"calls": calls})
    assert asyncio.run(ToolCalls().grade(trajectory_from_text(task, "[f(a=1), f(a=2)]"))).score == 1.0


def test_types_and_requirements_that_the_tool_declares() -> None:
    wanted = {
        "name": "f",
        "arguments": {"n": [5], "x": [2.0, ""], "who": ["", "me"]},
        "types": {"n": "integer", "x": "float", "who": "string"},
        "required": ["n", "who"],
    }
    task = Task(id="t", prompt="?", facts={"calls": [wanted]})
    scores = {
        text: asyncio.run(ToolCalls().grade(trajectory_from_text(task, text))).score
        for text in ("f(n=5, who='me')", "f(n=5.0, who='me')", "f(n=5, x=2, who='me')", "f(n=5)", "f(n=5, who='')")
    }
    assert list(scores.values()) == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_any_call_and_no_word_on_calls() -> None:
    task = Task(id="t", prompt="?", facts={"calls": "any"}, tools=(ToolSpec(name="f"),))
    scores = [asyncio.run(ToolCalls().grade(trajectory_from_text(task, text))).score for text in ("f()", "g()", "no")]
    assert scores == [1.0, 0.0, 0.0]
    with pytest.raises(GradeError, match="must be a list of calls or 'any'"):
        asyncio.run(ToolCalls().grade(trajectory_from_text(Task(id="t", prompt="?"), "f()")))


def _written(accepted: Any, depth: int = 0) -> Any:
    """An accepted value as a model would write it."""
    if isinstance(accepted, dict) and depth == 0:
        found = {}
        for name, values in accepted.items():
            choices = [value for value in (values if isinstance(values, list) else [values]) if value != ""]
            if choices:
                found[name] = _written(choices[0], 1)
        return found
    return [_written(item, depth) for item in accepted] if isinstance(accepted, list) else accepted


def _calls(row: dict[str, Any], truth: dict[str, Any]) -> list[dict[str, Any]]:
    required = {function["name"]: function["parameters"].get("required", ()) for function in row["function"]}
    calls = []
    for call in truth["ground_truth"]:
        for name, arguments in call.items():
            written = {}
            for key, values in arguments.items():
                chosen = [value for value in values if value != ""]
                if chosen:
                    written[key] = _written(chosen[0])
                elif key in required.get(name, ()):  # nothing is accepted but nothing
                    written[key] = "" if values else []
            calls.append({"name": name, "arguments": written})
    return calls


def _mutant(calls: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    calls = copy.deepcopy(calls)
    call = rng.choice(calls)
    kind = rng.choice(("name", "extra", "again", "value"))
    if kind == "extra":
        call["arguments"]["surplus"] = 1
    elif kind == "again":
        calls.append(copy.deepcopy(call))
    elif kind == "value" and call["arguments"]:
        name = rng.choice(sorted(call["arguments"]))
        value = call["arguments"][name]
        changed: dict[type, Any] = {
            bool: lambda: not value, int: lambda: value + 7, float: lambda: value + 7.5, str: lambda: value + "q",
            list: lambda: [*value, "q"], dict: lambda: {**value, "q": 1},
            type(None): lambda: "q",
        }  # fmt: skip
        call["arguments"][name] = changed[type(value)]()
    else:
        call["name"] += "_x"
    return calls


@pytest.mark.parametrize("category", CATEGORIES)
def test_ground_truths_of_bfcl_pass_and_mutants_fail(data_rows: Rows, category: str) -> None:
    rows = data_rows(f"tool_calling/bfcl_v4/{category}.jsonl.gz")
    truths = data_rows(f"tool_calling/bfcl_v4/possible_answer/{category}.jsonl.gz")
    rng = random.Random(0)

    async def check() -> Counter[str]:
        counts: Counter[str] = Counter()
        for row, truth in zip(rows, truths, strict=True):
            assert row["id"] == truth["id"]
            task, calls = bfcl_task(row, truth), _calls(row, truth)
            tagged = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in reversed(calls))
            for text in (json.dumps(calls), tagged):
                counts["gold"] += (await ToolCalls().grade(trajectory_from_text(task, text))).score == 1.0
            mutant = json.dumps(_mutant(calls, rng))
            counts["mutants that pass"] += (await ToolCalls().grade(trajectory_from_text(task, mutant))).score == 1.0
        return counts

    assert asyncio.run(check()) == {"gold": 2 * len(rows), "mutants that pass": 0}


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance"])
def test_no_call_is_right_where_no_tool_fits(data_rows: Rows, category: str) -> None:
    async def check() -> None:
        for row in data_rows(f"tool_calling/bfcl_v4/{category}.jsonl.gz"):
            task = bfcl_task(row)
            call = json.dumps({"name": row["function"][0]["name"], "arguments": {}}) if row["function"] else "f()"
            scores = [(await ToolCalls().grade(trajectory_from_text(task, t))).score for t in ("No tool fits.", call)]
            assert scores == [1.0, 0.0]

    asyncio.run(check())
