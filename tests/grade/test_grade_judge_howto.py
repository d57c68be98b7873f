"""The page on judges is run as it stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from posttrain.recipes.judging import JudgeConfig

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto_judge.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_runs_and_says_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in _blocks("python"):
        exec(compile(block, _PAGE.name, "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "[1.0, 0.0, 0.0] the capital is Paris",
        "judge 'scripted': BudgetSpent: the judges' budget of 2 calls is spent",
        "2 0",
        "0.167 [0.056, 0.263]",
        "[1.0, 0.0]",
        "127.0.0.1 is 127.0.0.1",
        "ungraded: 0 of 1 people graded it within 0 s",
        "0.75",
    ]


def test_the_criteria_file_is_one() -> None:
    (text,) = _blocks("toml")
    config = JudgeConfig.from_dict(tomllib.loads(text))
    assert (config.kind, config.high, config.max_dollars) == ("scale", 10, 5.0)
