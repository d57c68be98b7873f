"""The page on adding an environment is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto_environment.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_runs_and_says_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in _blocks():
        exec(compile(block, _PAGE.name, "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "['2', '2', '2']",
        "[0.0, 0.0, 1.0] 1.0 3.0",
        "tool 3.00",
        'assistant <tool_call>{"name": "ring_up"',
        "user Error: invalid JSON in the tool call: Ex",
        "assistant 3.00",
        "1.0",
    ]


def test_an_environment_takes_forty_lines() -> None:
    assert len([line for line in _blocks()[0].splitlines() if line.strip()]) <= 40


def test_the_page_names_what_there_is() -> None:
    from posttrain import rollout

    table = re.findall(r"\| .* \| (.*) \|", _PAGE.read_text(encoding="utf-8"))
    named = {name for row in table for name in re.findall(r"`(?:await )?([A-Za-z_]+)", row)} - {"session", "take"}
    missing = [name for name in named if not hasattr(rollout, name) and name != "grade"]
    assert not missing
