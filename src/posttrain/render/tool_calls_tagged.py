"""Tool calls whose arguments stand one by one between marks; values are text unless the schema says otherwise."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.core import RenderError, ToolCall, ToolSpec
from posttrain.render.tool_calls_json import MalformedCall, call_of, read_json, write_json

_NAME = re.compile(r"[\w.\-/]+")


def schema_of(tools: Sequence[ToolSpec], name: str, key: str) -> Mapping[str, Any] | None:
    """The JSON schema of one argument of one tool, where it is known."""
    tool = next((tool for tool in tools if tool.name == name), None)
    properties = {} if tool is None else tool.parameters.get("properties", {})
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return found if isinstance(found, Mapping) else None


def typed_value(text: str, schema: Mapping[str, Any] | None) -> Any:
    """A value from its text: text where the schema allows text, else JSON or a Python literal."""
    kinds = _kinds(schema)
    if "string" in kinds and not (text == "null" and "null" in kinds):
        return text
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        pass
    try:  # some templates print Python's True, None and quotes
        value = ast.literal_eval(text) if kinds else text
        write_json(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return value


def _kinds(schema: Mapping[str, Any] | None) -> set[str]:
    if schema is None:
        return set()
    kinds = schema.get("type", [])
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    if "enum" in schema:
        found |= {"string"} if any(isinstance(value, str) for value in schema["enum"]) else set()
    for part in schema.get("anyOf", ()):
        found |= _kinds(part)
    return found


def value_text(value: Any, *ends: str) -> str:
    """A value as its text.

    Raises:
        RenderError: it holds what ends a value.
    """
    text = value if isinstance(value, str) else write_json(value)
    for end in ends:
        if end in text:
            raise RenderError(f"this syntax of tool calls cannot write a value that holds {end!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class ParameterCalls:
    """Qwen3-Coder and its kin: <function=NAME> with a <parameter=KEY> for each argument, in a block for each call."""

    name: str
    tag: str = "tool_call"
    wrapped: bool = True  # a line break on either side of a value
    separator: str = "\n"

    @property
    def mark(self) -> str:
        """What begins a call."""
        return f"<{self.tag}>"

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        calls: list[ToolCall] = []
        rest: list[str] = []
        at = 0
        end = f"</{self.tag}>"
        while (found := text.find(self.mark, at)) >= 0:
            rest.append(text[at:found])
            head = re.compile(r"\s*<function=([^>\s]+)>\s*").match(text, found + len(self.mark))
            if head is None:
                raise MalformedCall(f"after {self.mark} comes <function=NAME>")
            arguments, at = self._parameters(text, head.end(), head.group(1), tools)
            tail = re.compile(r"\s*</function>\s*" + re.escape(end)).match(text, at)
            if tail is None:
                raise MalformedCall(f"the tool call does not end with </function> and {end}")
            at = tail.end()
            calls.append(call_of({"name": head.group(1), "arguments": arguments}))
        return "".join([*rest, text[at:]]).strip(), calls

    def _parameters(self, text: str, at: int, name: str, tools: Sequence[ToolSpec]) -> tuple[dict[str, Any], int]:
        arguments: dict[str, Any] = {}
        opening = re.compile(r"\s*<parameter=([^>\n]+)>")
        while head := opening.match(text, at):
            key, stop = head.group(1), text.find("</parameter>", head.end())
            if stop < 0:
                raise MalformedCall(f"the parameter {key!r} does not end with </parameter>")
            value = text[head.end() : stop]
            if self.wrapped:
                value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = typed_value(value, schema_of(tools, name, key))
            at = stop + len("</parameter>")
        return arguments, at

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        edge = "\n" if self.wrapped else ""
        texts = []
        for call in calls:
            lines = [self.mark, f"<function={call.name}>"]
            for key, value in call.arguments.items():
                lines.append(f"<parameter={key}>{edge}{value_text(value, '</parameter>')}{edge}</parameter>")
            texts.append("\n".join([*lines, "</function>", f"</{self.tag}>"]))
        return self.separator.join(texts)


@dataclass(frozen=True, kw_only=True)
class KeyValueCalls:
    """GLM: the name, then <arg_key> and <arg_value> in turn."""

    name: str
    edge: str = "\n"  # between the parts
    mark: str = "<tool_call>"
    _pair = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        calls: list[ToolCall] = []
        rest: list[str] = []
        at = 0
        while (found := text.find(self.mark, at)) >= 0:
            rest.append(text[at:found])
            head = re.compile(r"\s*([\w.\-/]+)").match(text, found + len(self.mark))
            if head is None:
                raise MalformedCall(f"after {self.mark} comes the tool's name")
            arguments: dict[str, Any] = {}
            at = head.end()
            while pair := self._pair.match(text, at):
                arguments[pair.group(1)] = typed_value(pair.group(2), schema_of(tools, head.group(1), pair.group(1)))
                at = pair.end()
            tail = re.compile(r"\s*</tool_call>").match(text, at)
            if tail is None:
                raise MalformedCall("the tool call does not end with </tool_call>")
            at = tail.end()
            calls.append(call_of({"name": head.group(1), "arguments": arguments}))
        return "".join([*rest, text[at:]]).strip(), calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        texts = []
        for call in calls:
            parts = [self.mark + call.name]
            for key, value in call.arguments.items():
                parts.append(f"<arg_key>{value_text(key, '</arg_key>')}</arg_key>")
                parts.append(f"<arg_value>{value_text(value, '</arg_value>')}</arg_value>")
            texts.append(self.edge.join([*parts, "</tool_call>"]))
        return self.edge.join(texts)


@dataclass(frozen=True, kw_only=True)
class InvokeCalls:
    """DeepSeek V3.2 and V4: <｜DSML｜invoke> with typed <｜DSML｜parameter>s, all in a block."""

    name: str
    block: str
    _head = re.compile(r'\s*<｜DSML｜invoke name="([^"]+)">')
    _value = re.compile(
        r'\s*<｜DSML｜parameter name="([^"]+)" string="(true|false)">(.*?)</｜DSML｜parameter>', re.DOTALL
    )
    _tail = re.compile(r"\s*</｜DSML｜invoke>")

    @property
    def mark(self) -> str:
        """What begins a call."""
        return f"<｜DSML｜{self.block}>"

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        before, found, region = text.partition(self.mark)
        if not found:
            return text.strip(), []
        calls: list[ToolCall] = []
        at = 0
        while head := self._head.match(region, at):
            arguments: dict[str, Any] = {}
            at = head.end()
            while value := self._value.match(region, at):
                key, kind, body = value.groups()
                arguments[key] = body if kind == "true" else read_json(body, 0)[0]
                at = value.end()
            tail = self._tail.match(region, at)
            if tail is None:
                raise MalformedCall("the tool call does not end with </｜DSML｜invoke>")
            at = tail.end()
            calls.append(call_of({"name": head.group(1), "arguments": arguments}))
        end = f"</｜DSML｜{self.block}>"
        if not calls or not region[at:].lstrip().startswith(end):
            raise MalformedCall(f"the tool calls do not end with {end}")
        return (before.strip() + "\n" + region[at:].lstrip().removeprefix(end).strip()).strip(), calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        lines = [self.mark]
        for call in calls:
            lines.append(f'<｜DSML｜invoke name="{call.name}">')
            for key, value in call.arguments.items():
                kind = "true" if isinstance(value, str) else "false"
                text = value_text(value, "</｜DSML｜parameter>")
                lines.append(f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>')
            lines.append("</｜DSML｜invoke>")
        return "\n".join([*lines, f"</｜DSML｜{self.block}>"])


@dataclass(frozen=True, kw_only=True)
class AddressedCalls:
    """Functionary 3.2: each part of the turn is addressed, after >>>, to a tool or to all; the prompt has the first."""

    name: str = "functionary3.2"
    mark: str = ">>>"

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        calls: list[ToolCall] = []
        said: list[str] = []
        at = len(text) - len(text.lstrip().removeprefix(self.mark))
        while at < len(text):
            to, line_end, _ = text[at:].partition("\n")
            if not line_end or to.strip() == "all":
                stop = text.find(self.mark, at)
                stop = len(text) if stop < 0 else stop
                said.append(text[at:stop].removeprefix("all\n"))
                at = stop + len(self.mark)
                continue
            if not _NAME.fullmatch(to.strip()):
                if not calls:
                    return text.strip(), []
                raise MalformedCall(f"after >>> comes a tool's name or all, not {to[:60]!r}")
            arguments, at = read_json(text, at + len(to) + 1)
            calls.append(call_of({"name": to.strip(), "arguments": arguments}))
            rest = text[at:].lstrip()
            if rest and not rest.startswith(self.mark):
                raise MalformedCall(f"text after the tool call: {rest[:60]!r}")
            at = len(text) - len(rest.removeprefix(self.mark))
        return "\n".join(said).strip(), calls

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        return self.mark.join(f"{call.name}\n{write_json(call.arguments)}" for call in calls)


@dataclass(frozen=True, kw_only=True)
class BraceCalls:
    """Gemma 4: call:NAME{key:value,…} with texts between marks of their own."""

    name: str = "gemma4"
    mark: str = "<|tool_call>"
    end: str = "<tool_call|>"
    quote: str = '<|"|>'
    _head = re.compile(r"\s*call:([\w.\-/]+)(?=\{)")
    _plain = re.compile(r"[^,{}\[\]<]+")

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """See `CallSyntax`."""
        calls: list[ToolCall] = []
        rest: list[str] = []
        at = 0
        while (found := text.find(self.mark, at)) >= 0:
            rest.append(text[at:found])
            head = self._head.match(text, found + len(self.mark))
            if head is None:
                raise MalformedCall(f"after {self.mark} comes call:NAME{{…}}")
            arguments, at = self._value(text, head.end(), 0)
            if not text[at:].lstrip().startswith(self.end):
                raise MalformedCall(f"the tool call does not end with {self.end}")
            at = text.index(self.end, at) + len(self.end)
            calls.append(call_of({"name": head.group(1), "arguments": arguments}))
        return "".join([*rest, text[at:]]).strip(), calls

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        if depth > 50:
            raise MalformedCall("the tool call is nested too deeply")
        if text.startswith(self.quote, at):
            stop = text.find(self.quote, at + len(self.quote))
            if stop < 0:
                raise MalformedCall(f"a text does not end with {self.quote}")
            return text[at + len(self.quote) : stop], stop + len(self.quote)
        if text[at : at + 1] in ("{", "["):
            return self._items(text, at, depth)
        plain = self._plain.match(text, at)
        if plain is None:
            raise MalformedCall(f"no value at {text[at : at + 40]!r}")
        return typed_value(plain.group().strip(), None), plain.end()

    def _items(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        """An object or a list."""
        in_object = text[at] == "{"
        closing = "}" if in_object else "]"
        found: dict[str, Any] = {}
        items: list[Any] = []
        at += 1
        while not text.startswith(closing, at):
            if in_object:
                if text.startswith(self.quote, at):
                    key, at = self._value(text, at, depth)
                else:
                    key, _, _ = text[at:].partition(":")
                    at += len(key)
                if not text.startswith(":", at) or len(key) > 200:
                    raise MalformedCall(f"an argument is key:value, not {text[at : at + 40]!r}")
                found[key.strip()], at = self._value(text, at + 1, depth + 1)
            else:
                item, at = self._value(text, at, depth + 1)
                items.append(item)
            if text.startswith(",", at):
                at += 1
            elif not text.startswith(closing, at):
                raise MalformedCall(f"the tool call lacks a {closing}")
        return (found if in_object else items), at + 1

    def write(self, calls: Sequence[ToolCall]) -> str:
        """See `CallSyntax`."""
        return "".join(f"{self.mark}call:{call.name}{self._text(call.arguments, True)}{self.end}" for call in calls)

    def _text(self, value: Any, outer: bool = False) -> str:
        if isinstance(value, str):
            return self.quote + value_text(value, self.quote) + self.quote
        if isinstance(value, Mapping):
            # The template sorts keys, and quotes those of inner objects.
            keys = {key: key if outer else self.quote + value_text(key, self.quote) + self.quote for key in value}
            return "{" + ",".join(f"{keys[key]}:{self._text(value[key])}" for key in sorted(value)) + "}"
        if isinstance(value, Sequence):
            return "[" + ",".join(map(self._text, value)) + "]"
        return write_json(value)


TAGGED_SYNTAXES = (
    ParameterCalls(name="qwen3-coder"),
    ParameterCalls(name="seed", tag="seed:tool_call", wrapped=False),
    KeyValueCalls(name="glm-4.6"),
    KeyValueCalls(name="glm-4.7", edge=""),
    InvokeCalls(name="deepseek-v3.2", block="function_calls"),
    InvokeCalls(name="deepseek-v4", block="tool_calls"),
    BraceCalls(),
    AddressedCalls(),
)
