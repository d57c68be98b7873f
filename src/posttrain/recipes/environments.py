"""From words on the command line to environments and the tasks that are played in them."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain import data as rows
from posttrain.core import Task, UsageError
from posttrain.grade import Sandbox, normalised, open_database, rows_match
from posttrain.rollout import (
    EnvironmentFactory,
    GuessNumber,
    Hangman,
    SqlTools,
    python_environment,
    sql_environment,
)

WORDS = "guess, hangman, sql:DATABASE, python, or FILE.py:NAME"


def environment_from(text: str) -> EnvironmentFactory:
    """The factory of environments that a word names.

    Args:
        text: `guess` and `hangman` (games in words), `sql:shop.db` (query the SQLite file, or `sql:postgresql://…`;
            the task's answer is a gold query or the result itself), `python` (a session in the sandbox; the answer is
            compared as text), or `FILE.py:NAME`: a class or function that makes one without arguments.

    Raises:
        UsageError: no such environment, file or database.
    """
    word, _, rest = text.partition(":")
    games: dict[str, EnvironmentFactory] = {"guess": GuessNumber, "hangman": Hangman}
    if text in games:
        return games[text]
    if text == "python":
        return python_environment(
            Sandbox(), judge=lambda task, answer: float(normalised(answer) == normalised(task.answer or ""))
        )
    if word == "sql":
        database = open_database(rest)
        return sql_environment(lambda task: database, judge=partial(same_result, database))
    if word.endswith(".py") and rest:
        return _factory_of(_module_of(Path(word)), rest, text)
    raise UsageError(f"no environment {text!r}; give {WORDS}")


def tasks_from(
    environment: str, data: Path | None, *, limit: int | None = None, columns: str | None = None
) -> list[Task]:
    """The tasks of a run: the rows of a file, or what the environment's own file offers.

    Args:
        environment: as for `environment_from`; a FILE.py may have a function `tasks()` that gives tasks.
        data: rows with prompts and answers; None: the file's `tasks()`.
        limit: at most so many.
        columns: which columns to read.

    Raises:
        UsageError: there is neither.
    """
    if data is not None:
        loaded = rows.load(data, kind="prompt", columns=columns, limit=limit)
        return [rows.to_task(row) for row in loaded.rows]
    word, _, _ = environment.partition(":")
    offered = getattr(_module_of(Path(word)), "tasks", None) if word.endswith(".py") else None
    if offered is None:
        raise UsageError(
            f"environment {environment!r} brings no tasks: give --data, or a FILE.py with a function tasks()"
        )
    found: Iterable[Task] = offered() if callable(offered) else offered
    return list(found)[:limit]


def same_result(run: Callable[[str], Any], task: Task, answer: str, used: SqlTools) -> float:
    """1 where the last query that ran gives the rows of the task's gold query, or the answer is the gold answer."""
    if normalised(answer) == normalised(task.answer or ""):
        return 1.0
    gold = run(task.answer or "")
    given = run(used.last_query) if used.last_query else None
    if gold.rows is None or given is None or given.rows is None:
        return 0.0
    return float(rows_match(gold.rows, given.rows, ordered="order by" in (task.answer or "").lower()))


def _module_of(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"environment: {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"environment: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _factory_of(module: ModuleType, name: str, text: str) -> EnvironmentFactory:
    found = getattr(module, name, None)
    if found is None or not callable(found):
        raise UsageError(f"environment {text!r}: the file has no class or function {name!r}")
    needed = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise UsageError(
            f"environment {text!r}: {name} needs {', '.join(needed)}; give what is called without arguments"
        )
    factory: EnvironmentFactory = found
    return factory
