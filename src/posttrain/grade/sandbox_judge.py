"""Tests in one sandbox, the code under test in another, and a socket between them.

The judge runs the tests and never the code under test: it calls the candidate's functions through the socket and gets
plain data back, rebuilt here from JSON, so that no object with an `__eq__` of its own, no changed built-in and no early
exit can decide a test. The verdict goes out through a descriptor that the candidate does not have.

Imports the standard library only; see `sandbox_worker`.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
import types
from typing import Any

_MAX_FRAME = 16_000_000  # bytes of one message between candidate and judge


class Channel:
    """Messages of JSON, each after its length in four bytes.

    Args:
        descriptor: to read from and, where there is no other for that, to write to.
        write: to write to.
    """

    def __init__(self, descriptor: int, write: int | None = None) -> None:
        self._descriptor = descriptor
        self._write = descriptor if write is None else write

    def send(self, message: Any) -> None:
        """Write one message."""
        data = json.dumps(message).encode()
        if len(data) > _MAX_FRAME:
            raise ValueError("more data than may be passed")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        while view:
            view = view[os.write(self._write, view) :]

    def receive(self) -> Any:
        """Read one message; EOFError where the other side is gone."""
        length = int.from_bytes(self._read(4), "big")
        if length > _MAX_FRAME:
            raise ValueError("more data than may be passed")
        return json.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = os.read(self._descriptor, min(length, 1 << 20))
            if not part:
                raise EOFError("the code under test has ended")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


def encode(value: Any, other: Any) -> list[Any]:
    """A value as JSON; what is no plain data goes through `other`. Subclasses become their plain base."""
    simple = _encode_scalar(value)
    if simple is not None:
        return simple
    kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
    for tag, kind in kinds.items():
        if isinstance(value, kind):
            return [tag, [encode(item, other) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["d", [[encode(key, other), encode(item, other)] for key, item in dict.items(value)]]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in ("collections.deque", "builtins.dict_keys", "builtins.dict_values", "builtins.dict_items"):
        return ["k" if name == "collections.deque" else "l", [encode(item, other) for item in value]]
    if isinstance(value, types.GeneratorType) or name in _ITERATORS:
        return ["l", [encode(item, other) for item in value]]
    if name.startswith("builtins.type") and builtins.__dict__.get(getattr(value, "__name__", "")) is value:
        return ["u", getattr(value, "__name__", "")]
    if name in _BY_PARTS:
        return ["o", name, [encode(part, other) for part in _BY_PARTS[name](value)]]
    made: list[Any] = other(value)
    return made


_ITERATORS = {f"builtins.{name}" for name in "map filter zip enumerate reversed list_iterator tuple_iterator".split()}
_BY_PARTS: dict[str, Any] = {
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "builtins.slice": lambda value: (value.start, value.stop, value.step),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
    "decimal.Decimal": lambda value: (str(value),),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.time": lambda value: (value.hour, value.minute, value.second, value.microsecond),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "datetime.datetime": lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
}


def _encode_scalar(value: Any) -> list[Any] | None:
    if value is None or value is True or value is False:
        return ["v", value]
    if isinstance(value, int):
        return ["i", format(int(value), "x")]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, str):
        return ["v", str.__str__(value)]
    if isinstance(value, complex):
        return ["c", value.real.hex(), value.imag.hex()]
    if isinstance(value, bytes | bytearray):
        return ["b" if isinstance(value, bytes) else "y", bytes(value).hex()]
    if value is Ellipsis or value is NotImplemented:
        return ["n", repr(value)]
    return None


def decode(data: Any, other: Any) -> Any:
    """The value of `encode`, of plain types only; anything else is for `other`."""
    tag = data[0]
    if tag == "v" and (data[1] is None or type(data[1]) in (bool, str)):
        return data[1]
    if tag == "i":
        return int(data[1], 16)
    if tag == "f":
        return float.fromhex(data[1])
    if tag == "c":
        return complex(float.fromhex(data[1]), float.fromhex(data[2]))
    if tag in "by":
        return bytes.fromhex(data[1]) if tag == "b" else bytearray.fromhex(data[1])
    if tag == "n":
        return Ellipsis if data[1] == "Ellipsis" else NotImplemented
    if tag == "u" and isinstance(getattr(builtins, data[1], None), type):
        return getattr(builtins, data[1])
    if tag == "d":
        return {decode(key, other): decode(item, other) for key, item in data[1]}
    if tag == "o" and data[1] in _BY_PARTS:
        module, _, name = data[1].rpartition(".")
        return getattr(importlib.import_module(module), name)(*(decode(part, other) for part in data[2]))
    kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
    if tag in kinds:
        return kinds[tag]([decode(item, other) for item in data[1]])
    if tag == "k":
        return importlib.import_module("collections").deque([decode(item, other) for item in data[1]])
    return other(data)


class Candidate:
    """The code under test, answering what the judge asks of it."""

    def __init__(self, descriptor: int, write: int | None = None) -> None:
        self._channel = Channel(descriptor, write)
        self._objects: list[Any] = []

    def serve(self, program: str) -> int:
        """Run the program, then answer until the judge is gone."""
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module
        failure: BaseException | None = None
        try:
            exec(compile(program, "candidate.py", "exec"), module.__dict__)
        except BaseException as error:  # noqa: BLE001  what the code raises is told to whoever asks for its names
            failure = error
        while True:
            try:
                request = self._channel.receive()
            except EOFError:
                return 0
            try:
                if failure is not None:
                    raise failure
                answer = self._answer(request, module.__dict__)
            except BaseException as error:  # noqa: BLE001  passed on to the judge
                answer = ["x", type(error).__name__, _said(error)]
            self._channel.send(answer)

    def _answer(self, request: Any, names: dict[str, Any]) -> list[Any]:
        what, subject, *arguments = request
        if what == "name":
            if subject not in names:
                raise NameError(f"name {subject!r} is not defined")
            return ["r", encode(names[subject], self._keep), []]
        target = self._objects[subject]
        given = [decode(argument, self._kept) for argument in arguments[0]]
        if what == "call":
            named = {key: decode(value, self._kept) for key, value in arguments[1].items()}
            result = encode(target(*given, **named), self._keep)
        else:
            operations: dict[str, Any] = {
                "get": getattr, "set": setattr, "item": lambda a, b: a[b], "len": len, "list": list, "str": str,
            }  # fmt: skip
            result = encode(operations[what](target, *given), self._keep)
        changed = [encode(value, self._keep) if isinstance(value, list | dict | set) else None for value in given]
        return ["r", result, changed]

    def _keep(self, value: Any) -> list[Any]:
        self._objects.append(value)
        return ["h", len(self._objects) - 1, type(value).__name__]

    def _kept(self, data: Any) -> Any:
        return self._objects[data[1]]


def _said(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:  # noqa: BLE001  an exception may fail even at this
        return ""


class CandidateError(Exception):
    """The code under test raised something that is no built-in exception."""


# A failed test is the judge's to say; and one that ends an iteration would end a test's `all(map(…))` before its time.
_NEVER_RAISED = (AssertionError, StopIteration, StopAsyncIteration)


class Remote:
    """An object that lives with the candidate. It is equal to itself only, whatever its class says."""

    def __init__(self, judge: Judge, index: int, kind: str) -> None:
        self.__dict__.update(_judge=judge, _index=index, _kind=kind)

    def _ask(self, what: str, *arguments: Any) -> Any:
        return self._judge.ask(what, self._index, list(arguments))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it, in the candidate's process."""
        return self._judge.ask("call", self._index, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __iter__(self) -> Any:
        return iter(self._ask("list"))

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._index == self._index

    def __hash__(self) -> int:
        return hash(self._index)


class Judge:
    """Runs the tests, with the candidate's names standing for calls through the socket."""

    def __init__(self, descriptor: int, verdict: int, write: int | None = None) -> None:
        self._channel = Channel(descriptor, write)
        self._verdict = verdict

    def judge(self, payload: dict[str, Any]) -> int:
        """Run setup and tests; writes a line for each test: null where it holds, else what went wrong."""
        names: dict[str, Any] = {"__name__": "judge"}
        setup = _without_names(payload["setup"], set(payload["names"]))
        try:
            trees = [ast.parse(text) for text in (setup, *payload["tests"])]
        except SyntaxError as error:
            self._say({"broken": f"the tests cannot be read: {error}"})
            return 1
        try:
            for name in payload["names"] or _free_names(trees):
                if payload["names"] or not hasattr(builtins, name):
                    names[name] = self.ask("name", name)
        except BaseException as error:  # noqa: BLE001  the code did not load, or lacks the name
            for _ in payload["tests"]:
                self._say(f"{type(error).__name__}: {error}"[:500])
            return 0
        try:
            exec(compile(setup, "setup.py", "exec"), names)
        except BaseException as error:  # noqa: BLE001  with a setup that itself uses the candidate, it may be at fault
            for _ in payload["tests"]:
                self._say(f"in the setup: {type(error).__name__}: {error}"[:500])
            return 0
        for test in payload["tests"]:
            try:
                exec(compile(test, "test.py", "exec"), names)
                self._say(None)
            except BaseException as error:  # noqa: BLE001  a failing test is a result
                self._say(f"{type(error).__name__}: {error}"[:500])
        return 0

    def ask(self, what: str, subject: Any, arguments: list[Any] | None = None, named: Any = None) -> Any:
        """Have the candidate do something; what it raises is raised here, what it changes in place is changed here."""
        given = arguments or []
        keywords = {key: encode(value, self._pass) for key, value in (named or {}).items()}
        self._channel.send([what, subject, [encode(value, self._pass) for value in given], keywords])
        answer = self._channel.receive()
        if answer[0] == "x":
            kind = getattr(builtins, str(answer[1]), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and kind not in _NEVER_RAISED:
                raise kind(str(answer[2]))
            raise CandidateError(f"{answer[1]}: {answer[2]}")
        for value, now in zip(given, answer[2], strict=False):
            if now is not None:
                _update(value, decode(now, self._meet))
        return decode(answer[1], self._meet)

    def _pass(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["h", value._index]
        raise TypeError(f"{type(value).__name__} cannot be passed to the code under test")

    def _meet(self, data: Any) -> Remote:
        if data[0] != "h" or type(data[1]) is not int:
            raise ValueError("not a value")
        return Remote(self, data[1], str(data[2]))

    def _say(self, result: Any) -> None:
        os.write(self._verdict, json.dumps(result).encode() + b"\n")


def _update(value: Any, now: Any) -> None:
    if isinstance(value, list) and isinstance(now, list):
        value[:] = now
    elif isinstance(value, dict | set) and type(now) is type(value):
        value.clear()
        value.update(now)


def _free_names(trees: list[ast.Module]) -> list[str]:
    """Names that are read and never given a value in these modules: those that the candidate must supply."""
    read: dict[str, None] = {}
    bound: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                read[node.id] = None
            else:
                bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return [name for name in read if name not in bound and not hasattr(builtins, name)]


def _without_names(setup: str, names: set[str]) -> str:
    """The setup without its own definitions of what is to be tested, such as the stub that a prompt ends with."""
    if not names:
        return setup
    tree = ast.parse(setup)
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in names]
    return ast.unparse(tree)
