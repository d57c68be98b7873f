"""Tasks of several turns with tools: BFCL's multi-turn categories, each turn a task for `ToolCalls`.

A turn is right where its calls are those of the ground truth, with the turns before it as they should have been. BFCL
itself runs the calls and compares the state that they leave; another way to the same state is wrong here.

Source: Patil et al., Berkeley Function Calling Leaderboard v3, multi-turn.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.core import DataError, Message, Task


def bfcl_turns(row: Mapping[str, Any], truth: Mapping[str, Any], functions: Iterable[Mapping[str, Any]]) -> list[Task]:
    """A task for each turn; one whose ground truth is empty is right where nothing is called.

    Args:
        row: id, question: one list of messages for each turn.
        truth: ground_truth: one list of calls for each turn, as Python.
        functions: what the involved classes declare (`multi_turn_func_doc`): name, parameters.

    Raises:
        DataError: a call of the ground truth cannot be read.
    """
    declared = {function["name"]: function["parameters"] for function in functions}
    said: list[Message] = []
    tasks = []
    for number, (asked, calls) in enumerate(zip(row["question"], truth["ground_truth"], strict=True)):
        said += [Message(role=message["role"], content=message["content"]) for message in asked]
        wanted = [_call(text, declared, str(row["id"])) for text in calls]
        tasks.append(Task(id=f"{row['id']}/{number}", prompt=tuple(said), facts={"calls": wanted}))
        done = [{"name": one["name"], "arguments": {k: v[0] for k, v in one["arguments"].items()}} for one in wanted]
        said.append(Message(role="assistant", content=json.dumps(done)))
    return tasks


def _call(text: str, declared: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """`mv(source='a', destination='b')` as what `ToolCalls` compares with: one accepted value for each argument."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            raise ValueError("no call")
        name = ast.unparse(node.func).rpartition(".")[2]
        parameters = declared.get(name, {})
        names: Sequence[str] = list(parameters.get("properties", {}))
        given = dict(zip(names, map(ast.literal_eval, node.args), strict=False))
        given |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{where}: the ground truth {text!r} is no call that can be read: {error}") from error
    types = {key: value.get("type", "") for key, value in parameters.get("properties", {}).items()}
    arguments = {key: [_plain(value)] for key, value in given.items()}
    return {"name": name, "arguments": arguments, "types": types, "required": list(given)}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
