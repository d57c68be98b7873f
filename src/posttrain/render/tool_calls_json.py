"""Tool calls whose arguments are JSON: alone, in a list, or after the tool's name."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core import RenderError, ToolCall, ToolSpec

_DECODER = json.JSONDecoder()
_SHOWN = 60  # characters of a bad call in an error


class MalformedCall(RenderError):
    """A tool call was begun, and it is not one. The message is fit for the model to read."""


def read_json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, white space skipped, and where it ends.

    Raises:
        MalformedCall: there is none.
    """
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise MalformedCall(f"invalid JSON in the tool call: {error.msg} at {text[error.pos :][:_SHOWN]!r}") from error
    except RecursionError as error:
        raise MalformedCall("invalid JSON in the tool call: nested too deeply") from error


def write_json(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def call_of(value: Any, name_key: str = "name", arguments_key: str = "arguments", id_key: str = "id") -> ToolCall:
    """A call from the object that a model wrote.

    Raises:
        MalformedCall: it lacks a name, or its arguments are no object.
    """
    if not isinstance(value, dict) or not isinstance(value.get(name_key), str):
        raise MalformedCall(f"a tool call is an object with {name_key!r} and {arguments_key!r}")
    arguments = value.get(arguments_key, {})
    if isinstance(arguments, str):  # some models write the object as text
        arguments, _ = read_json(arguments, 0)
    if not isinstance(arguments, dict):
        raise MalformedCall(f"{arguments_key!r} of a tool call is an object, not {write_json(arguments)[:_SHOWN]}")
    found = value.get(id_key)
    return ToolCall(name=value[name_key], arguments=arguments, id=found if isinstance(found, str) else None)


@dataclass(frozen=True, kw_only=True)
class JsonCalls:
    """Objects between marks, one call in each, or a list of them."""

    name: str
    opening: str
    closing: str = ""
    separator: str = "\n"
    in_list: bool = False
    name_key: str = "name"
    arguments_key: str = "arguments"
    id_key: str = "id"

    @property
    def mark(self) -> str:
        """What begins a call."""
        return self.opening.strip()

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        calls: list[ToolCall] = []
        rest: list[str] = []
        at = 0
        mark, end = self.mark, self.closing.strip()
        while (found := text.find(mark, at)) >= 0:
            rest.append(text[at:found])
            value, at = read_json(text, found + len(mark))
            at += len(text[at:]) - len(text[at:].lstrip())
            if not text.startswith(end, at):
                raise MalformedCall(f"the tool call does not end with {end}")
            at += len(end)
            values = value if self.in_list and isinstance(value, list) else [value]
            calls.extend(call_of(one, self.name_key, self.arguments_key, self.id_key) for one in values)
        return "".join([*rest, text[at:]]).strip(), calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        values = [self._object(call) for call in calls]
        if self.in_list:
            return self.opening + write_json(values) + self.closing
        return self.separator.join(self.opening + write_json(value) + self.closing for value in values)

    def _object(self, call: ToolCall) -> dict[str, Any]:
        value = {self.name_key: call.name, self.arguments_key: call.arguments}
        return value if call.id is None or not self.in_list else {**value, self.id_key: call.id}


@dataclass(frozen=True, kw_only=True)
class BareJsonCalls:
    """Llama 3: the turn is the object, perhaps after a mark; several are separated by semicolons."""

    name: str = "llama3"
    mark: str = "<|python_tag|>"
    _keys = ("parameters", "arguments")

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`. A turn that is other JSON than a call is content."""
        body = text.strip()
        marked = body.startswith(self.mark)
        body = body.removeprefix(self.mark).lstrip()
        if not body.startswith("{") or not (marked or re.match(r'\{\s*"(?:name|type|function)"', body)):
            if marked:
                raise MalformedCall('a tool call is {"name": …, "parameters": {…}}')
            return text.strip(), []
        calls: list[ToolCall] = []
        at = 0
        while at < len(body):
            value, at = read_json(body, at)
            key = next((key for key in self._keys if isinstance(value, dict) and key in value), self._keys[0])
            calls.append(call_of(value, arguments_key=key))
            rest = body[at:].lstrip()
            if rest and not rest.startswith((";", "{", self.mark)):
                raise MalformedCall(f"text after the tool call: {rest[:_SHOWN]!r}")
            at = len(body) - len(rest.removeprefix(";").lstrip().removeprefix(self.mark))
        return "", calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        return "; ".join(write_json({"name": call.name, "parameters": call.arguments}) for call in calls)


@dataclass(frozen=True, kw_only=True)
class NamedCalls:
    """A tool's name, then its arguments as JSON, between marks; perhaps all calls in a section."""

    name: str
    opening: str
    middle: str
    closing: str = ""
    separator: str = ""
    section: tuple[str, str] = ("", "")
    id_mark: str = ""  # an id may stand between name and arguments, after this mark
    name_form: str = "{name}"  # how the name is written; {place} is the call's number
    _name = re.compile(r"[\w.\-/]+")

    @property
    def mark(self) -> str:
        """What begins a call."""
        return self.section[0] or self.opening.strip()

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        if self.mark not in text:
            return text.strip(), []
        before, _, region = text.partition(self.mark)
        if not self.section[0]:
            region = self.mark + region
        calls: list[ToolCall] = []
        at = 0
        opening, middle, closing = self.opening.strip(), self.middle.strip(), self.closing.strip()
        while (found := region.find(opening, at)) >= 0:
            # Up to the first mark the name stands; only an id may come between.
            start = found + len(opening)
            stop = region.find(middle, start) if middle else region.find("\n", start)
            if stop < 0:
                raise MalformedCall(f"the tool call has no {self.middle.strip() or 'line end'} after its name")
            call_name, _, call_id = region[start:stop].partition(self.id_mark or "\0")
            arguments, at = read_json(region, stop + len(middle))
            at += len(region[at:]) - len(region[at:].lstrip())
            if not region.startswith(closing, at):
                raise MalformedCall(f"the tool call does not end with {closing}")
            at += len(closing)
            calls.append(self._call(call_name.strip(), call_id.strip() or None, arguments))
        if self.section[1] and not region[at:].lstrip().startswith(self.section[1]):
            raise MalformedCall(f"the tool calls do not end with {self.section[1]}")
        after = region[at:].strip().removeprefix(self.section[1])
        return (before.strip() + "\n" + after.strip()).strip(), calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        texts = []
        for place, call in enumerate(calls):
            name = self.name_form.format(name=call.name, place=place)
            marked_id = self.id_mark + call.id if self.id_mark and call.id else ""
            texts.append(self.opening + name + marked_id + self.middle + write_json(call.arguments) + self.closing)
        return self.section[0] + self.separator.join(texts) + self.section[1]

    def _call(self, name: str, call_id: str | None, arguments: Any) -> ToolCall:
        if not self._name.match(name):
            raise MalformedCall(f"a tool call has the tool's name, not {name[:_SHOWN]!r}")
        if self.name_form != "{name}" and (numbered := re.fullmatch(r"(?:functions\.)?([\w.\-/]+?):\d+", name)):
            name, call_id = numbered.group(1), name
        return call_of({"name": name, "arguments": arguments, "id": call_id})


@dataclass(frozen=True, kw_only=True)
class HarmonyCall:
    """gpt-oss: a message to a function, on the commentary channel. One call in a turn."""

    name: str = "harmony"
    mark: str = "to=functions."
    _call = re.compile(r"\s*(?:<\|channel\|>\w+\s*)?to=functions\.([\w.\-]+)([^{]*?)<\|message\|>")

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        if self.mark not in text:
            return text.strip(), []
        found = self._call.search(text)
        if found is None:
            raise MalformedCall("a tool call is to=functions.NAME<|channel|>commentary json<|message|>{…}")
        arguments, at = read_json(text, found.end())
        if rest := text[at:].strip().removeprefix("<|call|>"):
            raise MalformedCall(f"text after the tool call: {rest[:_SHOWN]!r}")
        return text[: found.start()].strip(), [call_of({"name": found.group(1), "arguments": arguments})]

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        if len(calls) != 1:
            raise RenderError(f"the harmony syntax has one tool call in a turn, not {len(calls)}")
        (call,) = calls
        return f" to=functions.{call.name}<|channel|>commentary json<|message|>{write_json(call.arguments)}"


@dataclass(frozen=True, kw_only=True)
class KeyedCalls:
    """Apertus: a list of objects whose only key is the tool's name."""

    name: str = "apertus"
    mark: str = "<|tools_prefix|>"
    end: str = "<|tools_suffix|>"

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        before, found, region = text.partition(self.mark)
        if not found:
            return text.strip(), []
        values, at = read_json(region, 0)
        if not isinstance(values, list) or not all(isinstance(value, dict) and len(value) == 1 for value in values):
            raise MalformedCall('tool calls are a list of {"NAME": {…}}')
        if not region[at:].lstrip().startswith(self.end):
            raise MalformedCall(f"the tool calls do not end with {self.end}")
        calls = [
            call_of({"name": name, "arguments": arguments}) for value in values for name, arguments in value.items()
        ]
        return (before.strip() + "\n" + region[at:].strip().removeprefix(self.end).strip()).strip(), calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        return self.mark + write_json([{call.name: call.arguments} for call in calls]) + self.end


@dataclass(frozen=True, kw_only=True)
class PythonCalls:
    """LFM2, Llama 4: a list of Python calls with literal keyword arguments."""

    name: str
    opening: str = ""
    closing: str = ""

    @property
    def mark(self) -> str:
        """What begins a call."""
        return self.opening or "["

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        if self.opening:
            before, found, region = text.partition(self.opening)
            if not found:
                return text.strip(), []
            body, closed, after = region.rpartition(self.closing)
            if not closed:
                raise MalformedCall(f"the tool calls do not end with {self.closing}")
        else:
            before, body, after = "", text.strip(), ""
            if not re.match(r"\[\s*[A-Za-z_][\w.]*\s*\(", body):
                return body, []
        return (before.strip() + "\n" + after.strip()).strip(), self._calls(body.strip())

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        texts = []
        for call in calls:
            if not all(key.isidentifier() for key in call.arguments):
                raise RenderError(f"arguments of {call.name!r} are no Python names: {', '.join(call.arguments)}")
            texts.append(f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})")
        return f"{self.opening}[{', '.join(texts)}]{self.closing}"

    @staticmethod
    def _calls(body: str) -> list[ToolCall]:
        try:
            tree = ast.parse(body, mode="eval").body
            nodes = tree.elts if isinstance(tree, ast.List) else [tree]
            calls = []
            for node in nodes:
                if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
                    raise MalformedCall("tool calls are [name(argument=value, …), …]")
                arguments = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
                json.dumps(arguments, allow_nan=False)
                calls.append(ToolCall(name=ast.unparse(node.func), arguments=arguments))
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise MalformedCall(f"the tool call is no Python call with literal arguments: {error}") from error
        return calls


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

JSON_SYNTAXES = (
    JsonCalls(name="hermes", opening="<tool_call>\n", closing="\n</tool_call>"),
    BareJsonCalls(),
    JsonCalls(name="mistral", opening="[TOOL_CALLS]", in_list=True),
    NamedCalls(name="mistral-named", opening="[TOOL_CALLS]", middle="[ARGS]", id_mark="[CALL_ID]"),
    JsonCalls(name="apriel", opening="<tool_calls>", closing="</tool_calls>", in_list=True),
    JsonCalls(name="granite", opening="<|tool_call|>", in_list=True),
    JsonCalls(
        name="cohere",
        opening="<|START_ACTION|>",
        closing="<|END_ACTION|>",
        in_list=True,
        name_key="tool_name",
        arguments_key="parameters",
        id_key="tool_call_id",
    ),
    JsonCalls(
        name="command-r",
        opening="Action:\n```json\n",
        closing="```",
        in_list=True,
        name_key="tool_name",
        arguments_key="parameters",
    ),
    JsonCalls(name="firefunction", opening="functools", in_list=True),
    KeyedCalls(),
    JsonCalls(name="gigachat3.1", opening="<|function_call|>"),
    JsonCalls(name="gigachat3", opening="<|message_sep|>\n\nfunction call<|role_sep|>\n"),
    NamedCalls(name="functionary3.1", opening="<function=", middle=">", closing="</function>"),
    NamedCalls(
        name="deepseek-r1",
        opening="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        closing="\n```<｜tool▁call▁end｜>",
        separator="\n",
        section=_DEEPSEEK,
    ),
    NamedCalls(
        name="deepseek-v3.1",
        opening="<｜tool▁call▁begin｜>",
        middle="<｜tool▁sep｜>",
        closing="<｜tool▁call▁end｜>",
        section=_DEEPSEEK,
    ),
    NamedCalls(
        name="kimi",
        opening="<|tool_call_begin|>",
        middle="<|tool_call_argument_begin|>",
        closing="<|tool_call_end|>",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        name_form="functions.{name}:{place}",
    ),
    HarmonyCall(),
    PythonCalls(name="lfm2", opening="<|tool_call_start|>", closing="<|tool_call_end|>"),
    PythonCalls(name="pythonic"),
)
