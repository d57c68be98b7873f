"""The house stands as drawn: rooms, doors, what imports what, and how large things are."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import posttrain

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "posttrain"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
WITHOUT_TORCH = ["core", "data", "render", "registry", "rollout", "grade", "feedback"]
FILES = sorted(PACKAGE.rglob("*.py"))
VAGUE = {"utils", "util", "common", "misc", "helpers", "manager"}

# Files over 400 lines and functions over 60, each with the reason why it is not cut.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
    "recipes/grpo.py:grpo_loop": "the whole loop in sight",
}


def test_the_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_rooms_without_torch_load_none() -> None:
    script = (
        "import importlib, json, sys, time\n"
        f"[importlib.import_module('posttrain.' + room) for room in {WITHOUT_TORCH!r}]\n"
        "print(json.dumps(sorted(name for name in sys.modules if name in ('torch', 'transformers', 'pandas'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_import_posttrain_loads_no_room_but_core() -> None:
    script = "import posttrain, sys; print([n for n in sys.modules if n.startswith('posttrain.')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = ast.literal_eval(done.stdout)
    assert all(name.startswith("posttrain.core") for name in names), names


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_has_a_door(room: str) -> None:
    door = importlib.import_module(f"posttrain.{room}")
    assert door.__doc__, f"{room} does not say what it takes and gives"
    assert door.__doc__.startswith(f"{room}:"), f"{room}'s docstring begins with its name"
    names = door.__all__
    assert list(names) == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name)), (
        f"{room}.__all__ is sorted: constants, classes, functions"
    )
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(door, name)]
    assert not missing, f"{room}.__all__ names what is not there: {missing}"


def test_the_public_surface() -> None:
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None
    assert posttrain.Sampling(max_tokens=3).max_tokens == 3
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        posttrain.nonsense  # noqa: B018


def test_every_module_imports() -> None:
    failed = []
    for module in pkgutil.walk_packages([str(PACKAGE)], "posttrain."):
        if module.name.endswith("_worker") or module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed.append(f"{module.name}: {error}")
    assert not failed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_and_names(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    text = path.read_text(encoding="utf-8")
    assert path.stem not in VAGUE, f"{place}: a name without a noun"
    assert text.count("\n") <= 400 or place in LONG_FILES, f"{place} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begin = node.body[1].lineno if _is_recipe(node) else node.lineno  # a recipe's options are its manual
            size = (node.end_lineno or begin) - begin + 1
            known = f"{place}:{node.name}" in LONG_FUNCTIONS or node.name == "__init__"
            assert size <= 80 or known, f"{place}:{node.lineno} {node.name} has {size} lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{place}:{node.lineno}: a bare except"


def _is_recipe(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "recipe" for mark in node.decorator_list)


def test_recipes_are_one_page_each() -> None:
    for path in (PACKAGE / "recipes").glob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 300, f"{path.name} is longer than 300 lines"


def test_built_in_recipes_say_what_the_list_says() -> None:
    from posttrain.recipes import BUILT_IN

    for name, (module, summary) in BUILT_IN.items():
        recipe = getattr(importlib.import_module(module), name)
        assert recipe.summary == summary
        undocumented = [option.name for option in recipe.options if not option.doc]
        assert not undocumented, f"{name}: no documentation of {undocumented}"


def test_every_objective_has_a_worked_number_test() -> None:
    from posttrain import objectives

    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "objectives").glob("*.py"))
    functions = [name for name in objectives.__all__ if name.islower()]
    missing = [name for name in functions if f"{name}(" not in tests]
    assert not missing


def test_every_built_in_grader_proves_itself() -> None:
    from posttrain import grade

    graders = grade.all_graders()
    assert len(graders) >= 5
    for grader in graders:
        assert hasattr(grader, "cases"), f"{grader.name} has no cases"


def test_nothing_speaks_of_a_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".html"} and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.search(r"(?<![\w/.])/wor[k]/", text)  # a folder of that name at the root, not below another
            assert not found, f"{name} holds a path of one machine"


def test_the_wheel_carries_every_file_that_is_not_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["posttrain"]
    carried = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert {path.suffix for path in others} >= {".c", ".h", ".html"}
    assert not others - carried
