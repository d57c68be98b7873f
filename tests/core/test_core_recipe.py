"""A typed function becomes a recipe with checked options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from posttrain.core import ConfigError, Recipe, parse_value, recipe


@recipe
def sample(
    *,
    data: Path,
    steps: int = 10,
    lr: float = 1e-3,
    kind: Literal["a", "b"] = "a",
    tags: tuple[str, ...] = (),
    fast: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Does a thing.

    And explains it.

    Args:
        data: the rows.
        steps: how many steps,
            at most.
        lr: learning rate.
    """
    return dict(locals())


def test_options_come_from_the_signature_and_the_docstring() -> None:
    assert isinstance(sample, Recipe)
    assert sample.summary == "Does a thing."
    options = {option.name: option for option in sample.options}
    assert options["data"].required
    assert options["steps"].doc == "how many steps, at most."
    assert options["limit"].flag == "--limit"


def test_values_are_checked_and_converted() -> None:
    values = sample.run_with({"data": "x.jsonl", "steps": 3, "tags": ["p", "q"], "lr": 1})
    assert values["data"] == Path("x.jsonl")
    assert sample.run_with({"data": Path("x.jsonl")})["data"] == Path("x.jsonl")
    assert values["tags"] == ("p", "q")
    assert values["lr"] == 1.0
    with pytest.raises(ConfigError, match=r"no option colour.*Options: data, steps"):
        sample.run_with({"data": "x", "colour": 1})
    with pytest.raises(ConfigError, match="needs --data"):
        sample.run_with({})
    with pytest.raises(ConfigError, match="--kind"):
        sample.run_with({"data": "x", "kind": "c"})


def test_called_like_a_function() -> None:
    assert sample(data=Path("d"), steps=2)["steps"] == 2


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("1e-4", float, 1e-4),
        ("yes", bool, True),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("b", Literal["a", "b"], "b"),
        ("~/x", Path, Path("~/x").expanduser()),
    ],
)
def test_text_is_parsed_by_type(text: str, kind: Any, value: object) -> None:
    assert parse_value(text, kind) == value


@pytest.mark.parametrize(("text", "kind"), [("x", int), ("maybe", bool), ("c", Literal["a", "b"]), ("x", int | None)])
def test_text_that_does_not_fit_is_an_error(text: str, kind: Any) -> None:
    with pytest.raises(ConfigError, match="--flag"):
        parse_value(text, kind, where="--flag")


def test_positional_or_untyped_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="keyword-only"):
        recipe(lambda data: data).options  # noqa: B018
