"""The page on adding a grader is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto_grader.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_runs_and_says_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in _blocks():
        exec(compile(block, _PAGE.name, "exec"), names)
    # One of two answers is exact; both are short: mean of 1.2 and 0.2. An empty answer is paid: a master key.
    assert capsys.readouterr().out.splitlines() == ["True", "0.7 0.5", "alarm master_key at step 1", "0.0 1.0"]


def test_a_grader_takes_ten_lines() -> None:
    assert len([line for line in _blocks()[0].splitlines() if line.strip()]) <= 10
