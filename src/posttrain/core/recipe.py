"""`@recipe`: a typed Python function becomes a recipe: options for the command line, checked values, a config file.

@pt.recipe
def my_recipe(*, data: Path, steps: int = 100, lr: float = 1e-5) -> None:
    '''One line that says what it does.

    Args:
        data: training rows, JSONL.
        steps: optimiser steps.
        lr: peak learning rate.
    '''
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

import msgspec

from posttrain.core.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

REQUIRED = inspect.Parameter.empty


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option of a recipe."""

    name: str  # Python name; on the command line `--some-name`
    type: Any
    default: Any  # REQUIRED where there is none
    doc: str

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """True where the caller must give it."""
        return self.default is REQUIRED

    def parse(self, text: str) -> Any:
        """Turn command-line text into the option's type.

        Raises:
            ConfigError: it does not fit; says what was expected.
        """
        return parse_value(text, self.type, where=self.flag)


class Recipe(Generic[P, T]):
    """A recipe: call it like the function it wraps, or `run_with` plain values."""

    def __init__(self, function: Callable[P, T], name: str | None = None) -> None:
        self.function = function
        self.name = name or function.__name__
        self.__doc__ = function.__doc__
        self.__name__ = self.name
        self.__module__ = function.__module__
        self._options: tuple[Option, ...] | None = None

    @property
    def options(self) -> tuple[Option, ...]:
        """The typed options, in the order of the signature."""
        if self._options is None:
            self._options = _read_options(self.function)
        return self._options

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.function(*args, **kwargs)

    def run_with(self, values: Mapping[str, Any]) -> T:
        """Run with values by option name; unknown and missing options are errors that name the known ones."""
        known = {option.name: option for option in self.options}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"recipe {self.name!r} has no option {', '.join(unknown)}. Options: {', '.join(known)}")
        missing = [option.flag for option in self.options if option.required and option.name not in values]
        if missing:
            raise ConfigError(f"recipe {self.name!r} needs {', '.join(missing)}")
        checked = {name: _check(value, known[name]) for name, value in values.items()}
        return self.function(**checked)  # type: ignore[call-arg]


@overload
def recipe(function: Callable[P, T]) -> Recipe[P, T]: ...
@overload
def recipe(*, name: str) -> Callable[[Callable[P, T]], Recipe[P, T]]: ...
def recipe(function: Callable[P, T] | None = None, *, name: str | None = None) -> Any:
    """Make a recipe of a typed function with keyword-only parameters. See the head of this file."""
    if function is None:
        return lambda wrapped: Recipe(wrapped, name)
    return Recipe(function, name)


def _read_options(function: Callable[..., Any]) -> tuple[Option, ...]:
    hints = typing.get_type_hints(function)
    docs = _argument_docs(inspect.getdoc(function) or "")
    options = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise ConfigError(f"recipe {function.__name__}: make {parameter.name!r} keyword-only (put `*,` before it)")
        if parameter.name not in hints:
            raise ConfigError(f"recipe {function.__name__}: give {parameter.name!r} a type")
        options.append(
            Option(
                name=parameter.name,
                type=hints[parameter.name],
                default=parameter.default,
                doc=docs.get(parameter.name, ""),
            )
        )
    return tuple(options)


def _argument_docs(docstring: str) -> dict[str, str]:
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    docs: dict[str, str] = {}
    name = ""
    for line in match.group(1).splitlines() if match else []:
        head = re.match(r"^ {4}(\w+): (.*)$", line)
        if head:
            name = head.group(1)
            docs[name] = head.group(2).strip()
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs


def _check(value: Any, option: Option) -> Any:
    try:
        return msgspec.convert(value, option.type, strict=False, dec_hook=_decode, builtin_types=(Path,))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{option.flag}: {error}") from error


def _decode(kind: Any, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise NotImplementedError(f"no way to make a {kind} of {value!r}")


def parse_value(text: str, kind: Any, where: str = "value") -> Any:
    """Turn text into a value of a type: bool, int, float, str, Path, Enum, Literal, Optional, tuple or list (commas).

    Raises:
        ConfigError: the text does not fit the type.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(kind) if part is not types.NoneType]
        if text.lower() == "none" and types.NoneType in typing.get_args(kind):
            return None
        return _first_fit(text, inner, where)
    if origin is Literal:
        return _choice(text, {str(choice): choice for choice in typing.get_args(kind)}, where)
    if origin in (tuple, list):
        item = typing.get_args(kind)[0]
        items = [parse_value(part.strip(), item, where) for part in text.split(",") if part.strip()]
        return tuple(items) if origin is tuple else items
    if kind is bool:
        return _choice(
            text.lower(), {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}, where
        )
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice(text, {str(member.value): member for member in kind}, where)
    if kind is Path:
        return Path(text).expanduser()
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {text!r} is not a valid {getattr(kind, '__name__', kind)}") from None


def _first_fit(text: str, kinds: list[Any], where: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return parse_value(text, kind, where)
        except ConfigError:
            continue
    return parse_value(text, kinds[-1], where)


def _choice(text: str, choices: dict[str, Any], where: str) -> Any:
    if text not in choices:
        raise ConfigError(f"{where}: {text!r} is not one of {', '.join(choices)}")
    return choices[text]
