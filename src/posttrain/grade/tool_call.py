"""The grader of tool calls: names and arguments against accepted ones, as the "AST" categories of BFCL compare them.

Source: Berkeley Function-Calling Leaderboard, Patil et al., 2025 (ICML; gorilla.cs.berkeley.edu).
"""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import Grade, GradeCase, GradeError, Task, ToolCall, Trajectory
from posttrain.grade.answer import answer_text, right, wrong
from posttrain.grade.json_schema import NoJson, json_in

_TAGGED = re.compile(r"<(tool_call|function_call)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[ \t]*[\w+-]*[^\n]*\n(.*?)```", re.DOTALL)
_LOOSE_MARKS = re.compile(r"[ ,./\-_*^()]")
_MAX_CHARACTERS = 50_000
_MAX_CALLS = 64


class NoToolCall(ValueError):
    """A text holds no tool call, or one that cannot be read."""


def tool_calls_in(text: str) -> tuple[ToolCall, ...]:
    """The calls that a text makes, in order.

    Read are `<tool_call>` tags around JSON; JSON in the forms `{"name": …, "arguments": {…}}`, `{"function": {…}}` and
    `{"name of the tool": {…}}`, one or a list; and Python calls with named literal arguments, one or a list.

    Raises:
        NoToolCall: it makes none, or one that cannot be read.
    """
    text = text.strip()[:_MAX_CHARACTERS]
    tagged = [body for _, body in _TAGGED.findall(text)]
    if tagged:
        return tuple(call for body in tagged for call in _calls_of(_json(body)))
    for body in [*reversed(_FENCE.findall(text)), text]:
        for read in (lambda body: _calls_of(_json(body, anywhere=False)), _python_calls):
            try:
                return tuple(read(body.strip()))
            except NoToolCall:
                continue
    return tuple(_calls_of(_json(text)))


def _json(text: str, *, anywhere: bool = True) -> Any:
    try:
        return json_in(text, anywhere=anywhere)
    except NoJson as error:
        raise NoToolCall(f"no tool call: {error}") from error


def _calls_of(value: Any) -> list[ToolCall]:
    """Calls in parsed JSON."""
    if isinstance(value, list):
        if len(value) > _MAX_CALLS:
            raise NoToolCall(f"more than {_MAX_CALLS} calls")
        return [call for item in value for call in _calls_of(item)]
    if not isinstance(value, dict):
        raise NoToolCall(f"no tool call: {str(value)[:80]!r}")
    if isinstance(value.get("tool_calls"), list):
        return _calls_of(value["tool_calls"])
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    if isinstance(name, str):
        given = value.get("arguments", value.get("parameters", {}))
        arguments = _json(given, anywhere=False) if isinstance(given, str) else given
        if isinstance(arguments, dict):
            return [ToolCall(name=name, arguments=arguments)]
    elif value and all(isinstance(arguments, dict) for arguments in value.values()):
        return [ToolCall(name=name, arguments=arguments) for name, arguments in value.items()]
    raise NoToolCall(f"no tool call: {str(value)[:80]!r}")


def _python_calls(text: str) -> list[ToolCall]:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NoToolCall(f"no tool call: {error}") from error
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    calls: list[ToolCall] = []
    for node in nodes[:_MAX_CALLS]:
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise NoToolCall("no tool call: not a call with named arguments")
        try:
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        except (ValueError, TypeError, RecursionError) as error:
            raise NoToolCall("an argument is no literal") from error
        calls.append(ToolCall(name=ast.unparse(node.func), arguments=arguments))
    if not calls:
        raise NoToolCall("no tool call: an empty list")
    return calls


def accepts(accepted: Any, given: Any, *, depth: int = 0) -> bool:
    """Whether a value is the accepted one.

    Texts are compared without case, blanks and the marks `,./-_*^()`, and either quote is the other; a number equals a
    number of the same value, and no truth value; lists item by item. In an accepted object each name has a list of
    accepted values, and may be left out where the empty text is among them; an object within that one is compared as
    it stands.
    """
    if isinstance(accepted, bool) or isinstance(given, bool):
        return accepted is given
    if isinstance(accepted, str) and isinstance(given, str):
        return _plain(accepted) == _plain(given)
    if isinstance(accepted, int | float) and isinstance(given, int | float):
        return accepted == given
    if isinstance(accepted, list | tuple) and isinstance(given, list | tuple):
        pairs = zip(accepted, given, strict=False)
        return len(accepted) == len(given) and all(accepts(one, other, depth=depth) for one, other in pairs)
    if isinstance(accepted, Mapping) and isinstance(given, Mapping):
        if depth == 0:
            return why_not(accepted, given, depth=1) == ""
        return accepted.keys() == given.keys() and all(accepts(accepted[n], given[n], depth=2) for n in given)
    return accepted is None and given is None


def why_not(accepted: Mapping[str, Any], given: Mapping[str, Any], *, depth: int = 0) -> str:
    """What keeps arguments from being accepted; empty where nothing does."""
    for name in given:
        if name not in accepted:
            return f"an argument {name!r} that is not wanted"
    for name, values in accepted.items():
        choices = values if isinstance(values, list | tuple) else [values]
        choices = choices or [[], ""]  # nothing at all is accepted: an empty list, or none
        if name not in given:
            if "" not in choices:
                return f"no argument {name!r}"
        elif not any(accepts(choice, given[name], depth=depth) for choice in choices):
            return f"{name!r} is {str(given[name])[:60]!r}"
    return ""


def _plain(text: str) -> str:
    return _LOOSE_MARKS.sub("", text).lower().replace("'", '"')


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "float": (float, int), "number": (float, int), "boolean": (bool,),
    "array": (list, tuple), "tuple": (list, tuple), "dict": (dict,), "object": (dict,), "null": (type(None),),
}  # fmt: skip


def mistyped(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What keeps arguments from being of the tool's own types; empty where nothing does.

    A value is of the type that the tool declares, or of that of an accepted value (a variable's name for a number); a
    whole number will do for a float, a float for no integer. An argument that the tool requires may not be left out.

    Args:
        wanted: a wanted call, with `types` by argument and the `required` ones, where they are known.
        given: the arguments.
    """
    for name in wanted.get("required", ()):
        if name not in given and name in wanted.get("arguments", {}):
            return f"no argument {name!r}, which the tool requires"
    for name, kind in wanted.get("types", {}).items():
        allowed = _TYPES.get(str(kind).lower())
        if allowed is None or name not in given:
            continue
        choices = wanted.get("arguments", {}).get(name, ())
        kinds = {
            type(choice) for choice in (choices if isinstance(choices, list | tuple) else [choices]) if choice != ""
        }
        if type(given[name]) not in kinds.union(allowed):
            return f"{name!r} is {str(given[name])[:60]!r}, not of the type {kind}"
    return ""


class ToolCalls:
    """1 where the answer makes the calls that the task wants and no other, else 0.

    The task's facts: `calls`, a list of `{"name": …, "arguments": {argument: [accepted value, …]}}`. An argument may be
    left out where the empty text is among its accepted values. With `types` (type name by argument) and `required` (a
    list of arguments) those are checked too, as the tool declares them. An empty list wants no call at all; `"any"`
    wants at least one call to one of the task's tools.

    Calls are the `tool_calls` of the trajectory's last assistant message, or else those that its text makes.

    Parts: `names`, the share of wanted calls whose name is called; `arguments`, the share that match wholly; `calls`,
    how many were made.

    Args:
        ordered: whether the calls must come in the order in which they are listed.
        partial: whether the score is the share of wanted calls that match, over the larger of both numbers of calls.
        name: the grader's name.
    """

    def __init__(self, *, ordered: bool = False, partial: bool = False, name: str = "tool_calls") -> None:
        self.name = name
        self._ordered = ordered
        self._partial = partial

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Read and match the calls; raises GradeError where the task does not say which are wanted."""
        started_s = time.perf_counter()
        task = trajectory.task
        wanted = task.facts.get("calls")
        made, problem = _made(trajectory)
        if wanted == "any":
            known = {tool.name for tool in task.tools}
            found = bool(made) and all(not known or call.name in known for call in made)
            return self._grade(float(found), {"calls": float(len(made))}, problem, started_s)
        if not isinstance(wanted, list | tuple):
            raise GradeError(f"task {task.id!r}: facts['calls'] must be a list of calls or 'any', not {wanted!r}")
        if not wanted:
            why = f"called {made[0].name}" if made else ""
            return self._grade(float(not made), {"calls": float(len(made))}, why, started_s)
        matched, why = self._match(wanted, made)
        names = sum(any(call.name == item["name"] for call in made) for item in wanted)
        parts = {"names": names / len(wanted), "arguments": matched / len(wanted), "calls": float(len(made))}
        share = matched / max(len(wanted), len(made))
        score = share if self._partial else float(share == 1.0)
        return self._grade(score, parts, problem or why or "other calls than wanted", started_s)

    def _match(self, wanted: Sequence[Mapping[str, Any]], made: Sequence[ToolCall]) -> tuple[int, str]:
        """The largest number of wanted calls that can be paired with calls made, and why one cannot."""
        why = f"{len(made)} calls, {len(wanted)} wanted" if len(made) != len(wanted) else ""
        fits: list[list[int]] = []
        for place, item in enumerate(wanted):
            candidates = [place] if self._ordered else range(len(made))
            fitting: list[int] = []
            for index in candidates:
                if index >= len(made) or made[index].name != item["name"]:
                    continue
                given = made[index].arguments
                reason = why_not(item.get("arguments", {}), given) or mistyped(item, given)
                if reason:
                    why = why or f"{item['name']}: {reason}"
                else:
                    fitting.append(index)
            fits.append(fitting)
        return _pairs(fits), why

    def _grade(self, score: float, parts: dict[str, float], why: str, started_s: float) -> Grade:
        seconds = time.perf_counter() - started_s
        rationale = "" if score == 1.0 else why[:300]
        return Grade(score=score, grader=self.name, parts=parts, rationale=rationale, seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """Calls in several forms, and near misses."""
        weather = {"name": "get_weather", "arguments": {"city": ["New York", "NYC"], "days": [3], "unit": ["C", ""]}}
        stock = {
            "name": "stock.price",
            "arguments": {"codes": [["A", "B"]], "when": [{"day": [1], "at": ["noon", ""]}]},
        }
        one = Task(id="one", prompt="?", facts={"calls": [weather]})
        two = Task(id="two", prompt="?", facts={"calls": [weather, stock]})
        none = Task(id="none", prompt="?", facts={"calls": []})
        city = '{"name": "get_weather", "arguments": {"city": "NYC", "days": 3}}'
        both = ['get_weather(city="new york", days=3.0, unit="C")', 'stock.price(codes=["A", "B"], when={"day": 1})']
        half = 0.5 if self._partial else 0.0
        other_order = wrong if self._ordered else right
        misses = (
            city.replace("3", '"3"'), city.replace("NYC", "Boston"), city.replace(', "days": 3', ""),
            f"[{city}, {city}]", city.replace("get_weather", "weather"), city.replace('"days"', '"num_days"'),
            city.replace("3", "true"),
            city.replace("3", '3, "x": 1'), "It is sunny.", "get_weather('NYC', 3)", "",
        )  # fmt: skip
        as_text = json.dumps({"function": {"name": "get_weather", "arguments": '{"city": "nyc", "days": 3}'}})
        partly = {3: half}  # the wanted call, and the same again
        return (
            right(one, city),
            right(one, f"<tool_call>\n{city}\n</tool_call>"),
            right(one, f"Let me see.\n```json\n{as_text}\n```"),
            right(one, 'get_weather(city="New-York", days=3)'),
            right(one, '{"get_weather": {"city": "New York", "days": 3, "unit": "c"}}'),
            *(
                wrong(one, text).replace(low=partly.get(n, 0.0), high=partly.get(n, 0.0))
                for n, text in enumerate(misses)
            ),
            right(two, f"[{both[0]}, {both[1]}]"),
            other_order(two, f"[{both[1]}, {both[0]}]", "the other order"),
            wrong(two, both[0], "one of two").replace(low=half, high=half),
            wrong(two, f"[{both[0]}, {both[0]}]", "one of them twice").replace(low=half, high=half),
            wrong(two, f"[{both[0]}, {both[1].replace('1', '2')}]", "another day").replace(low=half, high=half),
            right(none, "I have no tool for that."),
            wrong(none, city, "a call where none is wanted"),
        )


def _pairs(fits: Sequence[Sequence[int]]) -> int:
    """The size of a largest matching, by augmenting paths."""
    owner: dict[int, int] = {}

    def place(item: int, seen: set[int]) -> bool:
        for index in fits[item]:
            if index not in seen:
                seen.add(index)
                if index not in owner or place(owner[index], seen):
                    owner[index] = item
                    return True
        return False

    return sum(place(item, set()) for item in range(len(fits)))


def _made(trajectory: Trajectory) -> tuple[tuple[ToolCall, ...], str]:
    last = trajectory.messages[-1] if trajectory.messages else None
    if last is not None and last.role == "assistant" and last.tool_calls:
        return last.tool_calls, ""
    try:
        return tool_calls_in(answer_text(trajectory)), ""
    except NoToolCall as error:
        return (), str(error)


def bfcl_task(row: Mapping[str, Any], truth: Mapping[str, Any] | None = None) -> Task:
    """A task for `ToolCalls` from a row of a single-turn BFCL category and its row of possible answers.

    Args:
        row: id, question, function.
        truth: id, ground_truth; None for the categories in which no call is right.
    """
    declared = {function["name"]: function["parameters"] for function in row["function"]}
    calls = []
    for call in truth["ground_truth"] if truth else ():
        for name, arguments in call.items():
            parameters = declared.get(name, {})
            types = {key: value.get("type", "") for key, value in parameters.get("properties", {}).items()}
            required = list(parameters.get("required", ()))
            calls.append({"name": name, "arguments": arguments, "types": types, "required": required})
    prompt = "\n".join(message["content"] for turn in row["question"] for message in turn)
    return Task(id=str(row["id"]), prompt=prompt, facts={"calls": calls})
