"""The command tree, exit codes, and what is not loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.cli import artifacts
from posttrain.core import ConfigError, DataError, GateRefused

COMMANDS = "run evaluate generate serve runs show promote rollback feedback data doctor".split()


def test_help_names_every_command(posttrain: Callable[..., Any]) -> None:
    said = posttrain("--help")
    assert said.code == 0
    assert [command for command in COMMANDS if f"\n    {command} " not in said.out] == []
    assert posttrain().out == said.out


def test_no_torch_is_loaded_for_help_or_for_the_package() -> None:
    script = (
        "import sys, posttrain\n"
        "from posttrain import cli\n"
        "codes = [cli.main(words) for words in (['--help'], ['run'], ['data', 'inspect', '--help'], ['runs'])]\n"
        "print(codes, [name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0] []"


def test_wrong_words_end_with_code_2(posttrain: Callable[..., Any]) -> None:
    unknown = posttrain("trian")
    assert unknown.code == 2
    assert "'trian'" in unknown.err
    group = posttrain("data")
    assert group.code == 2
    assert "inspect" in group.out


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("row 3 is odd"), 1, "posttrain: row 3 is odd\n"),
        (ConfigError("no such key"), 2, "posttrain: no such key\n"),
        (GateRefused("not better"), 3, "posttrain: not better\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.jinja"),
            1,
            "posttrain: x.jinja: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_each_error_has_its_exit_code(
    posttrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str
) -> None:
    def fail(chosen: object) -> int:
        raise error

    monkeypatch.setattr(artifacts, "list_all", fail)
    monkeypatch.delenv("POSTTRAIN_TRACEBACK", raising=False)
    said = posttrain("runs")
    assert (said.code, said.err) == (code, told)


def test_a_traceback_on_request_and_for_errors_nobody_raised_on_purpose(
    posttrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(chosen: object) -> int:
        raise errors.pop()

    errors: list[Exception] = [DataError("row 3 is odd"), ZeroDivisionError("a bug")]
    monkeypatch.setattr(artifacts, "list_all", fail)
    with pytest.raises(ZeroDivisionError):
        posttrain("runs")
    monkeypatch.setenv("POSTTRAIN_TRACEBACK", "1")
    with pytest.raises(DataError):
        posttrain("runs")
