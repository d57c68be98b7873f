"""From a word on the command line to a grader: `number`, `sql:shop.db,shop_b.db`, or a function of a Python file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from posttrain.core import Grader, UsageError
from posttrain.grade import Exact, Maths, Number, SqlResult, open_database
from posttrain.recipes.judging import judge_from

WORDS = "exact, number, maths, sql:DATABASE[,DATABASE…], judge:URL#MODEL[,FILE.toml], or FILE.py:NAME"


def grader_from(text: str) -> Grader:
    """The grader that a word names.

    Args:
        text: `exact` (normalised text), `number` (the last number, GSM8K's convention), `maths` (math-verify),
            `sql:a.db,b.db` (result sets on these SQLite files, or `postgresql://…`), `judge:URL#MODEL,FILE.toml` (a
            served model, with its criteria and limits in the file), or `FILE.py:NAME`, a grader or what makes one.

    Raises:
        UsageError: no such grader, file or database.
    """
    word, _, rest = text.partition(":")
    if text in ("exact", "number", "maths"):
        plain: dict[str, Callable[[], Grader]] = {"exact": Exact, "number": Number, "maths": Maths}
        return plain[text]()
    if word == "sql":
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        if not parts:
            raise UsageError(f"grader {text!r}: no such database (none named)")
        return SqlResult([Path(part) if Path(part).is_file() else open_database(part) for part in parts])
    if word == "judge":
        return judge_from(rest)
    if word.endswith(".py") and rest:
        return _from_file(Path(word), rest)
    raise UsageError(f"no grader {text!r}; give {WORDS}")


def _from_file(path: Path, name: str) -> Grader:
    if not path.is_file():
        raise UsageError(f"grader: {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"grader: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UsageError(f"grader: {path} has no {name!r}")
    found = getattr(module, name)
    grader = found if isinstance(found, Grader) and not isinstance(found, type) else found()
    if not isinstance(grader, Grader):
        raise UsageError(f"grader: {path}:{name} is no grader: it needs a `name` and an async `grade(trajectory)`")
    return grader
