"""Configuration: frozen, strict, TOML in and out, with a fingerprint.

A config class is a `Config` whose fields carry one line of documentation each:

    class Optimiser(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
        lr: Annotated[float, doc("peak learning rate")] = 1e-5
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from posttrain.core.errors import ConfigError
from posttrain.core.record import content_hash

C = TypeVar("C", bound="Config")


def doc(text: str, **constraints: Any) -> msgspec.Meta:
    """One line that documents a field, with its unit; `constraints` are msgspec's (ge, gt, le, lt …)."""
    return msgspec.Meta(description=text, **constraints)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all configuration."""

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], where: str = "") -> C:
        """Build from plain values.

        Raises:
            ConfigError: an unknown key (the known ones are named), a missing one, a wrong type or range.
        """
        try:
            return msgspec.convert(values, type=cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"{where or cls.__name__}: {error}. Known keys: {known}") from error

    @classmethod
    def from_toml(cls: type[C], path: Path) -> C:
        """Read a TOML file."""
        return cls.from_dict(read_toml(path), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested configs as dicts."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    def to_toml(self) -> str:
        """TOML text. Fields that are None are left out: their default is None."""
        return write_toml(self.to_dict())

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed, checked like new."""
        return type(self).from_dict({**self.to_dict(), **msgspec.to_builtins(changes)})

    def fingerprint(self) -> str:
        """Twelve hex digits that are the same for the same settings, whatever their order."""
        return content_hash(self.to_dict())[:12]


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain values; an error names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def write_toml(values: dict[str, Any]) -> str:
    """TOML text of plain values; None, which TOML lacks, is left out."""
    return tomli_w.dumps(_without_none(values))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
