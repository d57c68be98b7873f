"""Tools as typed Python functions: the schema comes from signature and docstring, arguments are checked against it."""

from __future__ import annotations

import asyncio
import inspect
import re
import typing
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec

from posttrain.core import ConfigError, Message, Record, ToolCall, ToolSpec

_ARGUMENT = re.compile(r"^ {4}(\w+)(?: \([^)]*\))?: (.*)$")


class ToolError(Exception):
    """What a tool raises to say, in words for the policy, what went wrong."""


class ToolAnswer(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tool may return besides a plain value: a text for the policy, with a reward or the episode's end."""

    text: str
    reward: float = 0.0
    done: bool = False


class ToolOutcome(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of one call."""

    message: Message
    failed: bool = False
    reward: float = 0.0
    done: bool = False


@runtime_checkable
class Tool(Protocol):
    """Something that the policy may call."""

    @property
    def spec(self) -> ToolSpec:
        """Name, description, and the JSON schema of its arguments."""
        ...

    async def call(self, arguments: dict[str, Any]) -> Any:
        """The result: text, a `ToolAnswer`, or what JSON can hold. What it raises is told to the policy."""
        ...


class FunctionTool:
    """A Python function, or a method of an object that lives as long as the episode, as a tool.

    Types become the schema: what msgspec knows (numbers, text, lists, dicts, Literal, Enum, Optional, dataclasses,
    Structs). The docstring's first paragraph is the description, its `Args:` describe the arguments.

    Args:
        function: plain or async, with typed parameters. A plain one is called in a thread, so that it may wait.
        name: default the function's.
        in_thread: False: call a plain function here and now, for short ones.

    Raises:
        ConfigError: a parameter has no type, or one that has no JSON schema.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, in_thread: bool = True) -> None:
        self.function = function
        self._in_thread = in_thread and not inspect.iscoroutinefunction(function)
        called = str(name or getattr(function, "__name__", type(function).__name__))
        described, arguments = _docs(inspect.getdoc(function) or "")
        self._arguments = _struct_of(function, called, arguments)
        schema = msgspec.json.schema_components([self._arguments], ref_template="#/$defs/{name}")
        (reference,), definitions = schema
        own = definitions.pop(reference["$ref"].rpartition("/")[2])
        parameters = {"type": "object", "properties": own["properties"], "required": own.get("required", [])}
        if definitions:
            parameters["$defs"] = definitions
        self._spec = ToolSpec(name=called, description=described, parameters=parameters)

    @property
    def spec(self) -> ToolSpec:
        """See `Tool`."""
        return self._spec

    async def call(self, arguments: dict[str, Any]) -> Any:
        """See `Tool`.

        Raises:
            ValueError: the arguments are not what the schema says; the message names what is wrong.
        """
        checked = msgspec.convert(arguments, self._arguments)
        values = {name: getattr(checked, name) for name in checked.__struct_fields__}
        if self._in_thread:
            return await asyncio.to_thread(self.function, **values)
        result = self.function(**values)
        return await result if isinstance(result, Awaitable) else result


def as_tool(tool: Tool | Callable[..., Any]) -> Tool:
    """A tool as it is, or a function as one."""
    return tool if isinstance(tool, Tool) else FunctionTool(tool)


class Toolbox:
    """Tools by name, called with bounds on time and length.

    Args:
        tools: tools or functions, of different names.
        timeout_s: for each call.
        max_characters: longer results are cut, and say so.

    Raises:
        ConfigError: two tools of one name.
    """

    def __init__(
        self, tools: Sequence[Tool | Callable[..., Any]], *, timeout_s: float = 10.0, max_characters: int = 4000
    ) -> None:
        self.timeout_s = timeout_s
        self.max_characters = max_characters
        self._tools: dict[str, Tool] = {}
        for tool in map(as_tool, tools):
            if tool.spec.name in self._tools:
                raise ConfigError(f"two tools of the name {tool.spec.name!r}")
            self._tools[tool.spec.name] = tool

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """What the chat template shows."""
        return tuple(tool.spec for tool in self._tools.values())

    async def call_all(self, calls: Sequence[ToolCall]) -> list[ToolOutcome]:
        """All calls of one turn at the same time; outcomes in order. A call that fails is an outcome, too."""
        return list(await asyncio.gather(*(self.call(call) for call in calls)))

    async def call(self, call: ToolCall) -> ToolOutcome:
        """One call. An unknown tool, wrong arguments, an exception and lateness are told to the policy."""
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return self._failed(call, f"there is no tool {call.name!r}. Tools: {known}")
        clock = asyncio.timeout(self.timeout_s)
        try:
            async with clock:
                result = await tool.call(call.arguments)
        except msgspec.ValidationError as error:
            return self._failed(call, f"wrong arguments for {call.name}: {error}")
        except ToolError as error:
            return self._failed(call, str(error))
        except Exception as error:  # noqa: BLE001  a tool may fail in any way; the policy reads how
            if clock.expired():
                return self._failed(call, f"{call.name} took longer than {self.timeout_s:g} s")
            return self._failed(call, f"{type(error).__name__}: {error}")
        answer = result if isinstance(result, ToolAnswer) else ToolAnswer(text=_text_of(result))
        return ToolOutcome(message=self._message(call, answer.text), reward=answer.reward, done=answer.done)

    def _failed(self, call: ToolCall, error: str) -> ToolOutcome:
        return ToolOutcome(message=self._message(call, f"Error: {error}"), failed=True)

    def _message(self, call: ToolCall, text: str) -> Message:
        if len(text) > self.max_characters:
            text = f"{text[: self.max_characters]}… ({len(text) - self.max_characters} characters more)"
        return Message(role="tool", content=text or "(nothing)", tool_call_id=call.id, name=call.name)


def _text_of(result: Any) -> str:
    if isinstance(result, str):
        return result
    try:
        return msgspec.json.encode(result).decode()
    except TypeError:
        return str(result)


def _struct_of(function: Callable[..., Any], called: str, docs: dict[str, str]) -> type[msgspec.Struct]:
    """The arguments as a type that checks them."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: list[Any] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise ConfigError(f"tool {called!r}: its parameter {name!r} cannot be given by name")
        if name not in hints:
            raise ConfigError(f"tool {called!r}: give its parameter {name!r} a type")
        kind = Annotated[hints[name], msgspec.Meta(description=docs[name])] if name in docs else hints[name]
        default = parameter.default
        fields.append((name, kind) if default is inspect.Parameter.empty else (name, kind, _field(default)))
    try:
        made = msgspec.defstruct(f"{called}_arguments", fields, kw_only=True, forbid_unknown_fields=True)
        msgspec.json.schema(made)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tool {called!r}: its parameters have no JSON schema: {error}") from error
    return made


def _field(default: Any) -> Any:
    if isinstance(default, list | dict | set):
        return msgspec.field(default_factory=lambda: type(default)(default))
    return default


def _docs(docstring: str) -> tuple[str, dict[str, str]]:
    """The description, and that of each argument (Google's form)."""
    head, _, rest = docstring.partition("\nArgs:\n")
    described = " ".join(head.split("\n\n")[0].split())
    arguments: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        if match := _ARGUMENT.match(line):
            name, text = match.groups()
            arguments[name] = text.strip()
        elif name and line.strip():
            arguments[name] += " " + line.strip()
    return described, arguments
