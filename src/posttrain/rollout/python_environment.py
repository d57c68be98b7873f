"""A Python interpreter to work with: cells run in a sandbox, each after those before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Protocol

from posttrain.core import Message, Task
from posttrain.rollout.environment_tools import ToolEnvironment, Tools
from posttrain.rollout.tools import ToolError

# Earlier cells run again with their output unseen, failures too: what they did before they failed stays done.
_DRIVER = """
import ast, contextlib, io, json, sys, traceback
cells = json.loads({cells!r})
names = {{"__name__": "__main__"}}
def run(cell, show):
    tree = ast.parse(cell)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        if show and value is not None:
            print(repr(value))
for cell in cells[:-1]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            run(cell, False)
        except BaseException:
            pass
try:
    run(cells[-1], True)
except BaseException as error:
    lines = traceback.format_exception_only(type(error), error)
    place = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<cell>"]
    print("".join(lines).strip() + (f" (line {{place[-1]}})" if place else ""), file=sys.stderr)
    sys.exit(1)
"""


class ProgramRun(Protocol):
    """How a program ended. `grade.SandboxRun` is one."""

    @property
    def stdout(self) -> str:
        """What it printed."""
        ...

    @property
    def stderr(self) -> str:
        """What went wrong."""
        ...

    @property
    def exit_status(self) -> int | None:
        """0 where nothing went wrong."""
        ...

    @property
    def timed_out(self) -> bool:
        """It was stopped for its time."""
        ...


class RunsPrograms(Protocol):
    """A place where a program can do no harm. `grade.Sandbox` is one."""

    async def run(self, program: str, /) -> ProgramRun:
        """Run a Python program to its end or its limits."""
        ...


class PythonSession:
    """An interpreter whose names live on from cell to cell.

    Every cell is a run of its own in which the earlier cells run first, unseen: nothing but the sandbox's own limits
    has to hold, and a cell that never ends costs that cell only. What depends on the clock or on chance may differ from
    one cell to the next; seed chance in a cell.

    Args:
        sandbox: runs programs.
        setup: run before the first cell, unseen.
        max_cells: then no more cells run.
    """

    def __init__(self, sandbox: RunsPrograms, *, setup: str = "", max_cells: int = 20) -> None:
        self._sandbox, self._max_cells = sandbox, max_cells
        self._cells = [setup] if setup else []
        self._num_run = 0

    async def python(self, code: str) -> str:
        """Run Python code; names stay for the next call. The value of a last expression is shown.

        Args:
            code: the code.
        """
        if self._num_run == self._max_cells:
            raise ToolError(f"no more than {self._max_cells} cells may run")
        self._num_run += 1
        run = await self._sandbox.run(_DRIVER.format(cells=json.dumps([*self._cells, code])))
        if run.timed_out:
            raise ToolError("the code took too long and was stopped; its effects are undone")
        self._cells.append(code)
        if run.exit_status != 0:
            said = run.stderr.strip() or f"the interpreter ended with status {run.exit_status}"
            raise ToolError("\n".join(part for part in (run.stdout.strip(), said) if part))
        return run.stdout.rstrip("\n") or "(no output)"


def python_environment(
    sandbox: RunsPrograms,
    *,
    judge: Callable[[Task, str], float] | None = None,
    system: str | None = None,
    max_cells: int = 20,
    timeout_s: float = 30.0,
) -> Callable[[], ToolEnvironment]:
    """A factory of environments with the tool `python`; each episode has a session of its own.

    Args:
        sandbox: runs programs; shared by the episodes.
        judge: the reward at the end, from the task and the policy's answer. None: 0.
        system: a system message before the task's prompt.
        max_cells: of an episode.
        timeout_s: for each call, the sandbox's queue included.

    A task's `facts["setup"]` is run before its first cell.
    """

    def make() -> ToolEnvironment:
        def tools(task: Task) -> Tools:
            return [PythonSession(sandbox, setup=str(task.facts.get("setup", "")), max_cells=max_cells).python]

        def judged(task: Task, messages: Sequence[Message]) -> float:
            return 0.0 if judge is None else judge(task, messages[-1].content)

        return ToolEnvironment(tools, judge=judged, system=system, timeout_s=timeout_s)

    return make
