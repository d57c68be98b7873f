"""Python sessions: names live from cell to cell, effects of failures stay, and nothing else gets through."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass

import pytest

from posttrain.core import Sampling, Task, ToolCall
from posttrain.engine import ScriptedEngine
from posttrain.grade import Sandbox, SandboxLimits, SandboxUnavailable
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer
from posttrain.rollout import PythonSession, ToolError, TurnTokens, python_environment, run_episodes


@dataclass
class Ran:
    stdout: str
    stderr: str
    exit_status: int | None
    timed_out: bool = False


class Child:
    """Programs as child processes, without a sandbox: for tests whose programs are known."""

    async def run(self, program: str, /) -> Ran:
        try:
            done = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=20
            )
        except subprocess.TimeoutExpired:
            return Ran("", "", None, timed_out=True)
        return Ran(done.stdout, done.stderr, done.returncode)


class Late:
    """Everything takes too long."""

    async def run(self, program: str, /) -> Ran:
        return Ran("", "", None, timed_out=True)


def cells(session: PythonSession, *code: str) -> list[str]:
    async def run() -> list[str]:
        said = []
        for cell in code:
            try:
                said.append(await session.python(cell))
            except ToolError as error:
                said.append(f"! {error}")
        return said

    return asyncio.run(run())


def test_names_live_on_and_values_are_shown() -> None:
    said = cells(PythonSession(Child()), "x = 2", "print('hi')\nx + 1", "def f(y):\n    return y * x\nf(21)", "None")
    assert said == ["(no output)", "hi\n3", "42", "(no output)"]


def test_failures_are_told_and_what_they_did_stays() -> None:
    said = cells(
        PythonSession(Child(), setup="import math\nprint('unseen')"),
        "items = [1]\nitems.append(2)\n1 / 0",
        "items",
        "x = (",
        "math.pi > 3",
        "raise SystemExit(5)",
        "print('a')\nundefined",
    )
    assert said[0] == "! ZeroDivisionError: division by zero (line 3)"
    assert said[1] == "[1, 2]"
    assert said[2].startswith("! ")
    assert "SyntaxError" in said[2]
    assert said[3] == "True"
    assert said[4].startswith("! SystemExit: 5")
    assert said[5] == "! a\nNameError: name 'undefined' is not defined (line 2)"


def test_quotes_and_braces_of_any_kind_come_through() -> None:
    tricky = "text = '''{x!r} {{}} \\n \"\"\" % \\\\ é'''\nlen(text)"
    (said,) = cells(PythonSession(Child()), tricky)
    assert said == str(len('{x!r} {{}} \n """ % \\ é'))


def test_late_cells_are_undone() -> None:
    session = PythonSession(Late())
    assert cells(session, "while True: pass") == ["! the code took too long and was stopped; its effects are undone"]
    session._sandbox = Child()
    assert cells(session, "1 + 1") == ["2"]


def test_cells_are_limited() -> None:
    assert cells(PythonSession(Child(), max_cells=1), "1", "2") == ["1", "! no more than 1 cells may run"]


def test_an_episode_with_a_session() -> None:
    tokenizer = Tokenizer.train_bpe(["def f(x):"], 300, ("<|im_end|>", "<|im_start|>"))
    hermes = CALL_SYNTAXES["hermes"]
    says = iter(
        [hermes.write([ToolCall(name="python", arguments={"code": code})]) for code in ("y = base * 2", "y + 1")]
        + ["15"]
    )
    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(says), tokenizer),
            [Task(id="sum", prompt="What is 2 × 7 + 1?", answer="15", facts={"setup": "base = 7"})],
            python_environment(Child(), judge=lambda task, answer: float(answer == task.answer)),
            Sampling(max_tokens=120, n=1),
            turns=TurnTokens(Renderer(tokenizer)),
            seed=0,
        )
    )
    (trajectory,) = group.trajectories
    assert [m.content for m in trajectory.messages if m.role == "tool"] == ["(no output)", "15"]
    assert trajectory.metrics["reward"] == 1.0


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    made = Sandbox(SandboxLimits(cpu_s=2, wall_s=20.0))
    try:
        made.start()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox here: {error}")
    return made


def test_in_the_real_sandbox(sandbox: Sandbox) -> None:
    said = cells(
        PythonSession(sandbox),
        "x = 20",
        "x + 1",
        "import socket\nsocket.create_connection(('127.0.0.1', 22), timeout=1)",
        "open('/etc/passwd').read()",
        "x + 2",
    )
    assert (said[1], said[4]) == ("21", "22")
    assert all(text.startswith("! ") for text in said[2:4]), said
