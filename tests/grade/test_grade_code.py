from __future__ import annotations

import ast
import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from posttrain.core import ConfigError, Grade, GradeError, Task
from posttrain.grade import (
    InputOutput,
    Sandbox,
    SandboxLimits,
    SandboxUnavailable,
    UnitTests,
    code_in,
    grade_all,
    human_eval_task,
    mbpp_task,
    prove,
    trajectory_from_text,
)

Rows = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(SandboxLimits(cpu_s=5, wall_s=30.0))
    try:
        made.start()
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel or container refuses a layer: {error}")
    yield made
    made.close()


def _grade(sandbox: Sandbox, program: str, tests: Sequence[str], **facts: Any) -> Grade:
    task = Task(id="t", prompt="?", facts={"tests": list(tests), **facts})
    return asyncio.run(UnitTests(sandbox).grade(trajectory_from_text(task, program)))


def test_the_program_in_an_answer() -> None:
    assert code_in("First:\n```python\na = 1\n```\nthen\n```py\nb = 2\n```\nrun `b`") == "b = 2\n"
    assert code_in("```python\na = 1\n```\n```json\n{}\n```") == "a = 1\n"
    assert code_in("```\na = 1") == "a = 1"
    assert code_in("a = 1") == "a = 1"
    assert code_in('```python\ns = """```"""\n```') == 's = """```"""\n'


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("kind", [UnitTests, InputOutput])
def test_the_graders_prove_themselves(sandbox: Sandbox, kind: Any, partial: bool) -> None:
    quick = Sandbox(SandboxLimits(cpu_s=1))
    assert prove(kind(quick, partial=partial)).problems == ()
    quick.close()


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("f = lambda: (1, [2.5, None], {'a': {1, 2}}, b'x', 1j)", "assert f() == (1, [2.5, None], {'a': {1, 2}}, b'x', 1j)"),  # noqa: E501
        ("f = lambda: float('nan')", "import math\nassert math.isnan(f())"),
        ("f = lambda: 10 ** 5000", "assert f() == 10 ** 5000"),
        ("from collections import *\nf = lambda: Counter('aab')", "assert f() == {'a': 2, 'b': 1}"),
        ("from collections import *\nf = lambda: deque([1])", "from collections import deque\nassert f() == deque([1])"),  # noqa: E501
        ("from fractions import *\nf = lambda: Fraction(1, 3)", "from fractions import Fraction\nassert f() == Fraction(1, 3)"),  # noqa: E501
        ("import datetime as d\nf = lambda: d.date(2020, 1, 2)", "import datetime\nassert f() == datetime.date(2020, 1, 2)"),  # noqa: E501
        ("f = lambda: range(3)", "assert f() == range(3)"),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2]"),
        ("def f(x): x.append(4)", "x = [3]\nf(x)\nassert x == [3, 4]"),
        ("def f(x): raise KeyError('no')", "try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    raise ValueError"),
        ("class P:\n    def __init__(self, a): self.a = a\ndef f(ps): return [p.a for p in ps]", "assert f([P(1), P(2)]) == [1, 2]"),  # noqa: E501
        ("class P:\n    def up(self, n=1): return n + 1\nf = P", "p = f()\np.n = 5\nassert p.up(n=3) == 4 and p.n == 5"),  # noqa: E501
        ("def f(*a, **k): return a, k", "assert f(1, b=2) == ((1,), {'b': 2})"),
        ("def f(kind): return isinstance(1, kind)", "assert f(int) is True"),
    ],
)  # fmt: skip
def test_values_pass_between_judge_and_program(sandbox: Sandbox, program: str, test: str) -> None:
    grade = _grade(sandbox, program, [test])
    assert grade.score == 1.0, grade.rationale


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "def f(x): raise SystemExit(0)",
        "class A:\n    def __eq__(self, o): return True\n    __ne__ = __hash__ = None\ndef f(x): return A()",
        "class A(float):\n    def __eq__(self, o): return True\ndef f(x): return A(0)",
        "class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A()",
        "import builtins\nbuiltins.__dict__['AssertionError'] = KeyboardInterrupt\ndef f(x): return 0",
        "import gc, sys\nfor m in list(sys.modules.values()):\n    m.__dict__['passed'] = True\ndef f(x): return 0",
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame: frame.f_locals.clear(); frame = frame.f_back\n    return 0",  # noqa: E501
        "def f(x): raise AssertionError",
        "import threading\nthreading.Thread(target=lambda: print('all tests passed')).start()\ndef f(x): return 0",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'null\\n' * 9)\n    except OSError: pass\ndef f(x): return 0",  # noqa: E501
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'\\x00\\x00\\x00\\x10["r",["i","7"],[]]\' )\n    except OSError: pass\n'  # noqa: E501
        "def f(x): return 0",
    ],
)
def test_a_verdict_cannot_be_forged(sandbox: Sandbox, program: str) -> None:
    grade = _grade(sandbox, program, ["assert f(3) == 7", "assert f(4) == 8"])
    assert grade.score == 0.0
    assert (
        grade.parts["passed"] == 0.0 or "xff" in program or "x10" in program
    )  # it may guess one value, as any program may


def test_the_tests_are_not_in_the_program_s_memory(sandbox: Sandbox) -> None:
    """A program looks through all of its memory for what the tests expect, which went to another process."""
    program = """
import re
def f(x):
    found = []
    import gc
    for o in gc.get_objects():
        if isinstance(o, (str, bytes)) and 'MARK-' + 'ED' in str(o):
            found.append(o)
    import ctypes
    try:
        with open('/proc/self/maps') as maps:
            found.append(maps.read())
    except OSError:
        pass
    return len(found)
"""
    grade = _grade(sandbox, program, ["expected = 'MARK-ED'\nassert f(1) == 0"])
    assert grade.score == 1.0, grade.rationale


def test_time_and_memory_are_limits_not_errors() -> None:
    short = Sandbox(SandboxLimits(cpu_s=1, wall_s=5.0))
    endless = _grade(short, "def f(x):\n    while True: pass", ["assert f(3) == 7"])
    assert (endless.score, endless.parts["timeout"]) == (0.0, 1.0)
    asleep = Sandbox(SandboxLimits(wall_s=0.7))
    started_s = time.monotonic()
    grade = _grade(asleep, "import time\ndef f(x): time.sleep(60)", ["assert 1", "assert f(3) == 7", "assert 1"])
    assert (grade.score, grade.parts["timeout"]) == (0.0, 1.0)
    assert grade.parts["passed"] == pytest.approx(1 / 3)
    assert time.monotonic() - started_s < 5
    hungry = _grade(short, "def f(x): return len([0] * 10**10)", ["assert f(3) == 10**10"])
    assert hungry.score == 0.0
    assert "MemoryError" in hungry.rationale
    huge = _grade(short, "def f(x): return 'x' * 10**8", ["assert f(3)"])
    assert huge.score == 0.0
    for made in (short, asleep):
        made.close()


def test_tests_that_cannot_be_run_are_the_grader_s_failure(sandbox: Sandbox) -> None:
    with pytest.raises(GradeError, match="cannot be read"):
        _grade(sandbox, "f = 1", ["assert ("])
    with pytest.raises(GradeError, match="facts\\['tests'\\] must be a list"):
        _grade(sandbox, "f = 1", [])
    task = Task(id="t", prompt="?", facts={"inputs": ["1", "2"], "outputs": ["1"]})
    with pytest.raises(GradeError, match="2 inputs and 1 outputs"):
        asyncio.run(InputOutput(sandbox).grade(trajectory_from_text(task, "print(1)")))
    with pytest.raises(ConfigError, match="tolerance"):
        InputOutput(sandbox, tolerance=-1)


def test_setup_names_and_prefix(sandbox: Sandbox) -> None:
    setup = "def helper(x): return x * 2\ndef f(x): return 'a stub'"
    good = _grade(sandbox, "def f(x): return 3 * x", ["assert f(helper(1)) == 6"], setup=setup, names=["f"])
    assert good.score == 1.0, good.rationale
    forged = "def helper(x): return 0\ndef f(x): return 6 if x == 0 else 0"
    assert _grade(sandbox, forged, ["assert f(helper(1)) == 6"], setup=setup, names=["f"]).score == 0.0
    prefix = "def f(x):\n"
    assert _grade(sandbox, "    return x", ["assert f(1) == 1"], names=["f"], prefix=prefix).score == 1.0
    whole = "def g(): pass\ndef f(x):\n    return x"
    assert _grade(sandbox, whole, ["assert f(1) == 1"], names=["f"], prefix=prefix).score == 1.0


def test_input_output_by_hand(sandbox: Sandbox) -> None:
    task = Task(id="t", prompt="?", facts={"inputs": ["1\n", "2\n", "4\n"], "outputs": ["0.5\n", "1.0\n", "2.0\n"]})
    half = "print(int(input()) / 2 + (1e-9 if {} else 0))"

    def graded(program: str, **options: Any) -> Grade:
        return asyncio.run(InputOutput(sandbox, **options).grade(trajectory_from_text(task, program)))

    assert graded(half.format(0)).score == 1.0
    assert graded(half.format(1)).score == 0.0
    assert graded(half.format(1), tolerance=1e-6).score == 1.0
    assert graded("print(0.5)", partial=True).score == pytest.approx(1 / 3)
    assert graded("while True: print('x' * 9999)").score == 0.0
    assert "ZeroDivisionError" in graded("1 / 0").rationale


def test_many_at_once_through_grade_all(sandbox: Sandbox) -> None:
    task = Task(id="t", prompt="?", facts={"tests": ["assert f(2) == 4"]})
    texts = [f"def f(x): return x * {n}" for n in (1, 2, 3, 2)]
    grades = asyncio.run(
        grade_all(UnitTests(sandbox), [trajectory_from_text(task, text) for text in texts], deadline_s=60)
    )
    assert [grade.score for grade in grades] == [0.0, 1.0, 0.0, 1.0]


def mutant(source: str, seed: int) -> str | None:
    """The source with one small change in what it does; None where there is nothing to change."""
    tree = ast.parse(source)
    swaps: dict[type, type] = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
        ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Mod: ast.Mult,
    }  # fmt: skip
    places: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in swaps:
            places.append((node, "op"))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            places.append((node, "ops"))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            places.append((node, "value"))
        elif isinstance(node, ast.Return) and node.value is not None:
            places.append((node, "return"))
    if not places:
        return None
    node, _ = random.Random(seed).choice(places)
    if isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = swaps[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = swaps[type(node.ops[0])]()
    elif isinstance(node, ast.Constant):
        node.value = int(str(node.value)) + 1
    elif isinstance(node, ast.Return):
        node.value = ast.Constant(None)
    return ast.unparse(tree)


def tasks_and_solutions(data_rows: Rows) -> list[tuple[Task, str]]:
    """Every task of HumanEval and MBPP with its reference solution."""
    found = [
        (human_eval_task(row), row["prompt"] + row["canonical_solution"])
        for row in data_rows("code/humaneval.jsonl.gz")
    ]
    for name in ("code/mbpp_test.jsonl.gz", "code/mbpp_train_prompt.jsonl.gz"):
        found += [(mbpp_task(row, challenge=True), row["code"]) for row in data_rows(name)]
    return found


def _count(sandbox: Sandbox, chosen: Sequence[tuple[Task, str]]) -> tuple[list[str], int, int]:
    """Ids whose reference fails; how many mutants there are, and how many of them pass."""

    async def all_of_them() -> tuple[list[Grade], list[Grade]]:
        grader = UnitTests(sandbox)
        references = [trajectory_from_text(task, code) for task, code in chosen]
        changed = [(task, mutant(code, seed)) for seed, (task, code) in enumerate(chosen)]
        mutants = [trajectory_from_text(task, code) for task, code in changed if code]
        return [await grade_all(grader, items, deadline_s=60.0) for items in (references, mutants)]  # type: ignore[return-value]

    references, mutants = asyncio.run(all_of_them())
    assert all(grade.error is None for grade in [*references, *mutants])
    failed = [task.id for (task, _), grade in zip(chosen, references, strict=True) if grade.score != 1.0]
    return failed, len(mutants), sum(grade.score == 1.0 for grade in mutants)


def test_references_of_human_eval_and_mbpp_pass_and_mutants_fail_on_a_sample(sandbox: Sandbox, data_rows: Rows) -> None:
    failed, num_mutants, survived = _count(sandbox, tasks_and_solutions(data_rows)[::50])
    assert failed == []
    assert num_mutants >= 15
    assert survived <= 0.35 * num_mutants  # some changes change nothing that the tests look at


@pytest.mark.slow
def test_references_of_human_eval_and_mbpp_pass_and_mutants_fail(sandbox: Sandbox, data_rows: Rows) -> None:
    # Every sixth task; all 1,006 were run once and pass.
    failed, num_mutants, survived = _count(sandbox, tasks_and_solutions(data_rows)[3::6])
    assert failed == []
    assert num_mutants >= 150
    assert survived <= 0.25 * num_mutants
