"""Graders of programs, which run in the sandbox: by unit tests, or by what they print for given inputs.

Sources: HumanEval, Chen et al., 2021 (arXiv 2107.03374); MBPP, Austin et al., 2021 (arXiv 2108.07732); input/output
pairs as in APPS, Hendrycks et al., 2021 (arXiv 2105.09938).
"""

from __future__ import annotations

import ast
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import answer_text, right, wrong
from posttrain.grade.combine import in_daemon_thread
from posttrain.grade.sandbox import JudgedTests, Sandbox, SandboxLimits
from posttrain.grade.sandbox_protocol import RunsPrograms

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset(("", "py", "python", "python3"))
_MAX_RATIONALE = 300
_MANY = 10  # programs, one for each input, that one grade has time for even if each uses up its own


def code_in(text: str) -> str:
    """The program in an answer: the last fenced block of Python, or else the whole text."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else text


class UnitTests:
    """1 where the program in the answer passes all of the task's tests, else 0.

    The task's facts: `tests`, a list of Python statements, each of which raises where the program is wrong; `setup`,
    source that the tests need (optional); `names`, what is taken from the program (optional: whatever the tests use and
    do not define); `prefix`, source that comes before the program where the program does not define the first of
    `names` itself (optional: the head that a completion goes on from).

    Tests run in one sandbox and the program in another, so the program can neither see nor forge the verdict. A program
    that crashes, hangs or leaves early scores 0; a sandbox that cannot be had, or tests that cannot be read, raise.

    Parts: `passed`, the share of tests that hold; `timeout`, 1 where the time was over.

    Args:
        sandbox: where programs run: `Sandbox`, `DockerSandbox` or `RemoteSandbox`.
        partial: whether the score is the share of tests that hold.
        extract: from the answer's text to its program; `code_in` if not given.
        name: the grader's name.
    """

    def __init__(
        self,
        sandbox: RunsPrograms | None = None,
        *,
        partial: bool = False,
        extract: Callable[[str], str] | None = None,
        name: str = "unit_tests",
    ) -> None:
        self.name = name
        self.sandbox: RunsPrograms = sandbox or Sandbox()
        self.max_concurrency = max(1, os.cpu_count() or 1)
        self.deadline_s = _patience_s(self.sandbox)
        self.waits = bool(getattr(self.sandbox, "waits", False))
        self._partial = partial
        self._extract = extract or code_in

    async def prepare(self) -> None:
        """See that the sandbox is to be had."""
        await in_daemon_thread(self.sandbox.start)

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Run the tests; raises GradeError where the task has none or the sandbox is at fault."""
        started_s = time.perf_counter()
        task = trajectory.task
        tests, names = _texts(task, "tests"), _texts(task, "names", needed=False)
        program = self._extract(answer_text(trajectory))
        prefix = task.facts.get("prefix", "")
        if prefix and names and not re.search(rf"^(?:async )?(?:def|class)\s+{re.escape(names[0])}\b", program, re.M):
            program = prefix + program
        judged = await self.sandbox.judge(program, tests, setup=task.facts.get("setup", ""), names=names)
        return self._grade(judged, started_s)

    def _grade(self, judged: JudgedTests, started_s: float) -> Grade:
        share = sum(result is None for result in judged.results) / len(judged.results)
        failed = next((result for result in judged.results if result is not None), "")
        return Grade(
            score=share if self._partial else float(judged.passed),
            grader=self.name,
            parts={"passed": share, "timeout": float(judged.timed_out)},
            rationale=failed[:_MAX_RATIONALE],
            seconds=time.perf_counter() - started_s,
        )

    def cases(self) -> Sequence[GradeCase]:
        """Right and wrong programs, and programs that try to pass without being right."""
        tests = ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add([1], [2]) == [1, 2]"]
        task = Task(id="add", prompt="Write add(a, b).", facts={"tests": tests, "names": ["add"]})
        head = "def add(a, b):\n"
        completed = task.replace(id="completed", facts={**task.facts, "prefix": head})
        share = self._partial
        bad = [
            (f"{head}    return a - b", "another operator"),
            (f"{head}    return a + b + 0.1", "off by a little"),
            (f"{head}    pass", "nothing comes back"),
            ("def plus(a, b):\n    return a + b", "another name"),
            (f"{head}    return (", "no Python"),
            ("import sys\nsys.exit(0)", "leaves before the tests"),
            (f"{head}    import os\n    os._exit(0)", "leaves within a test"),
            (f"class Same(int):\n    __eq__ = lambda *_: True\n{head}    return Same()", "equal to everything"),
            (f"class Same:\n    __eq__ = lambda *_: True\n{head}    return Same()", "an object equal to everything"),
            (f"import builtins\nbuiltins.AssertionError = Exception\n{head}    return 0", "another AssertionError"),
            (f"{head}    while True:\n        pass", "never ends"),
            ("I do not know.", "no program"),
        ]
        return (
            right(task, f"```python\n{head}    return a + b\n```"),
            right(task, f"{head}    return a + b"),
            right(completed, "    return a + b", "a completion of the head"),
            *(wrong(task, text, why).replace(high=0.99 if share else 0.0) for text, why in bad),
        )


class InputOutput:
    """1 where the program in the answer prints what the task expects for every input, else 0.

    The task's facts: `inputs`, what the program reads from standard input, and `outputs`, what it must print, as lists
    of the same length. Output is compared line by line without white space at the ends of lines and of the text.

    Parts: `passed`, the share of pairs that hold; `timeout`, the share that ran out of time.

    Args:
        sandbox: where programs run: `Sandbox`, `DockerSandbox` or `RemoteSandbox`.
        partial: whether the score is the share of pairs that hold.
        tolerance: largest difference of two numbers, relative or absolute, where a whole line does not match as text;
            None compares text only.
        extract: from the answer's text to its program; `code_in` if not given.
        name: the grader's name.
    """

    def __init__(
        self,
        sandbox: RunsPrograms | None = None,
        *,
        partial: bool = False,
        tolerance: float | None = None,
        extract: Callable[[str], str] | None = None,
        name: str = "input_output",
    ) -> None:
        if tolerance is not None and tolerance < 0:
            raise ConfigError(f"grader {name!r}: tolerance must be 0 or more, not {tolerance}")
        self.name = name
        self.sandbox: RunsPrograms = sandbox or Sandbox()
        self.max_concurrency = max(1, os.cpu_count() or 1)
        self.deadline_s = _MANY * _patience_s(self.sandbox)
        self.waits = bool(getattr(self.sandbox, "waits", False))
        self._partial = partial
        self._tolerance = tolerance
        self._extract = extract or code_in

    async def prepare(self) -> None:
        """See that the sandbox is to be had."""
        await in_daemon_thread(self.sandbox.start)

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Run the program on every input; stops at the first that fails, unless shares count."""
        started_s = time.perf_counter()
        task = trajectory.task
        inputs, outputs = _texts(task, "inputs"), _texts(task, "outputs")
        if len(inputs) != len(outputs):
            raise GradeError(f"task {task.id!r}: {len(inputs)} inputs and {len(outputs)} outputs")
        program = self._extract(answer_text(trajectory))
        held = late = 0
        why = ""
        for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
            run = await self.sandbox.run(program, given)
            if not run.timed_out and run.exit_status == 0 and self._same(expected, run.stdout):
                held += 1
                continue
            late += run.timed_out
            said = "out of time" if run.timed_out else run.stderr.strip()[-150:] or f"printed {run.stdout[:100]!r}"
            why = why or f"input {number}: {said}"
            if not self._partial:
                break
        share = held / len(inputs)
        return Grade(
            score=share if self._partial else float(held == len(inputs)),
            grader=self.name,
            parts={"passed": share, "timeout": late / len(inputs)},
            rationale=why[:_MAX_RATIONALE],
            seconds=time.perf_counter() - started_s,
        )

    def _same(self, expected: str, printed: str) -> bool:
        wanted, got = (
            [line.rstrip() for line in text.rstrip().replace("\r\n", "\n").split("\n")] for text in (expected, printed)
        )
        if len(wanted) != len(got):
            return False
        return all(one == other or self._same_numbers(one, other) for one, other in zip(wanted, got, strict=True))

    def _same_numbers(self, wanted: str, got: str) -> bool:
        if self._tolerance is None or len(wanted.split()) != len(got.split()):
            return False
        try:
            pairs = [(float(one), float(other)) for one, other in zip(wanted.split(), got.split(), strict=True)]
        except ValueError:
            return False
        tolerance = self._tolerance
        return all(math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) for one, other in pairs)

    def cases(self) -> Sequence[GradeCase]:
        """Right and wrong programs."""
        facts = {"inputs": ["2 3\n", "10 -4\n"], "outputs": ["5\n", "6\n"]}
        task = Task(id="sum", prompt="Read two numbers, print their sum.", facts=facts)
        most = 0.99 if self._partial else 0.0
        bad = [
            ("print(5)", "the answer to the first input"),
            ("a, b = map(int, input().split())\nprint(a - b)", "another operator"),
            ("a, b = map(int, input().split())\nprint('sum:', a + b)", "says more"),
            ("a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)", "fails after printing"),
            ("import sys\nsys.exit(0)", "prints nothing"),
        ]
        return (
            right(task, "```python\nprint(sum(map(int, input().split())))\n```"),
            right(task, "a, b = input().split()\nprint(int(a) + int(b), ' ')", "blanks at the end"),
            *(wrong(task, text, why).replace(high=most) for text, why in bad),
        )


def human_eval_task(row: Mapping[str, Any]) -> Task:
    """A task for `UnitTests` from a row of HumanEval (task_id, prompt, entry_point, test).

    What the prompt defines besides the function to be written (helpers, imports) belongs to the tests too.
    """
    entry = row["entry_point"]
    facts = {
        "tests": [f"check({entry})"],
        "setup": f"{row['prompt']}\n    pass\n{row['test']}",
        "names": [entry],
        "prefix": row["prompt"],
    }
    return Task(id=str(row["task_id"]), prompt=row["prompt"], facts=facts)


def mbpp_task(row: Mapping[str, Any], *, challenge: bool = False) -> Task:
    """A task for `UnitTests` from a row of MBPP (task_id, text, code, test_list, test_setup_code, challenge_test_list).

    Args:
        row: the row.
        challenge: whether to add the harder tests, which the prompt does not show.
    """
    shown = list(row["test_list"])
    tests = [*shown, *(row["challenge_test_list"] if challenge else ())]
    source = "\n".join([row["test_setup_code"], *tests])
    # What the tests take from the program is what the reference defines: a task may ask for a function named `sum`, and
    # no program may bring a `len` of its own into the tests.
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    reference = ast.parse(row["code"]).body
    names = [name for node in reference if (name := getattr(node, "name", "")) in used]
    imports = [ast.unparse(node) for node in reference if isinstance(node, ast.Import | ast.ImportFrom)]
    facts = {"tests": tests, "setup": "\n".join([*imports, row["test_setup_code"]]), "names": names}
    prompt = f"{row['text']} Your code should pass these tests:\n\n" + "\n".join(shown)
    return Task(id=f"mbpp/{row['task_id']}", prompt=prompt, facts=facts)


def _patience_s(sandbox: RunsPrograms) -> float:
    """Seconds for one program: more than the sandbox gives it, so that one which hangs scores 0 and is no error."""
    limits: SandboxLimits | None = getattr(sandbox, "limits", None)
    return 70.0 + 4 * (limits.wall_s if limits is not None else 60.0)


def _texts(task: Task, field: str, *, needed: bool = True) -> list[str]:
    found = task.facts.get(field, [])
    if isinstance(found, str) or not all(isinstance(text, str) for text in found) or (needed and not found):
        raise GradeError(f"task {task.id!r}: facts[{field!r}] must be a list of texts, not {str(found)[:100]!r}")
    return list(found)
