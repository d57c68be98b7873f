"""`posttrain run RECIPE [--option value …]`: find a recipe, read its options from its signature, run it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.cli.printing import print_json, print_table
from posttrain.core import ConfigError, Option, Recipe, UsageError, read_toml
from posttrain.recipes import BUILT_IN

USAGE = """usage: posttrain run RECIPE [--option value …] [--config FILE.toml] [--json]
       posttrain run --resume RUN_FOLDER [--json]

RECIPE is a built-in name, or a Python file with an @pt.recipe function (FILE.py; FILE.py:function if it has several).
`posttrain run RECIPE --help` shows its options. `--resume` goes on with an interrupted run and its options.
"""


def run_command(words: Sequence[str]) -> int:
    """Run one recipe from command-line words."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        print_table(("recipe", "what it does"), [(name, summary) for name, (_, summary) in BUILT_IN.items()])
        return 0
    if words[0] == "--resume":
        words = _resumed_words(words)
    recipe = find_recipe(words[0])
    rest = list(words[1:])
    if any(word in ("-h", "--help") for word in rest):
        print_options(recipe)
        return 0
    as_json = "--json" in rest
    rest = [word for word in rest if word != "--json"]
    result = recipe.run_with(parse_options(recipe, rest))
    if as_json:
        print_json(result)
    return 0


def _resumed_words(words: Sequence[str]) -> list[str]:
    """`--resume FOLDER` alone: the recipe and its options are those of the run."""
    from posttrain.registry import RunFolder

    if len(words) < 2:
        raise UsageError("--resume needs a run folder")
    run = RunFolder.open(Path(words[1]), read_only=True)
    return [run.state.recipe, "--config", str(run.path / "config.toml"), *words]


def find_recipe(name: str) -> Recipe[..., Any]:
    """A built-in recipe by name, or the recipe of a Python file.

    Raises:
        UsageError: there is none; says what there is.
    """
    if name in BUILT_IN:
        module = importlib.import_module(BUILT_IN[name][0])
        found: Recipe[..., Any] = getattr(module, name)
        return found
    file, _, function = name.partition(":")
    if not file.endswith(".py"):
        raise UsageError(f"no recipe {name!r}. Built in: {', '.join(BUILT_IN)}; or give a Python file")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    recipes = _recipes_of(path)
    if function:
        if function not in recipes:
            raise UsageError(f"{path} has no recipe {function!r}; it has {', '.join(recipes) or 'none'}")
        return recipes[function]
    if len(recipes) != 1:
        raise UsageError(
            f"{path} has {len(recipes)} recipes ({', '.join(recipes) or 'mark one with @pt.recipe'}); "
            f"name one as {path}:function"
        )
    return next(iter(recipes.values()))


def _recipes_of(path: Path) -> dict[str, Recipe[..., Any]]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file that can be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that the recipe's type hints resolve
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return {
        item.name: item
        for item in vars(module).values()
        if isinstance(item, Recipe) and item.__module__ == module.__name__
    }


def parse_options(recipe: Recipe[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Options from words: `--name value`, `--name=value`, `--flag` and `--no-flag` for booleans, `--config FILE`.

    Raises:
        ConfigError: an option is unknown (near names are suggested), has no value, is given twice, or does not parse.
    """
    import difflib

    options = {option.flag: option for option in recipe.options}
    values: dict[str, Any] = {}
    given: set[str] = set()
    queue = list(words)
    while queue:
        flag, equals, text = queue.pop(0).partition("=")
        if flag == "--config":
            values = {**read_toml(Path(text if equals else _next(queue, flag))), **values}
            continue
        positive = "--" + flag[5:] if flag.startswith("--no-") else flag
        if flag not in options and positive in options and options[positive].type is bool:
            values[options[positive].name] = False
            continue
        if flag not in options:
            near = difflib.get_close_matches(flag, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(options)}"
            raise ConfigError(f"recipe {recipe.name!r} has no option {flag}; {hint}")
        option = options[flag]
        if flag in given:
            raise ConfigError(f"{flag} is given twice")
        given.add(flag)
        if option.type is bool and not equals and (not queue or queue[0].startswith("--")):
            values[option.name] = True
            continue
        values[option.name] = option.parse(text if equals else _next(queue, flag))
    return values


def _next(queue: list[str], flag: str) -> str:
    if not queue:
        raise ConfigError(f"{flag} needs a value")
    return queue.pop(0)


def print_options(recipe: Recipe[..., Any]) -> None:
    """The help page of one recipe."""
    print(f"usage: posttrain run {recipe.name} [--option value …]\n\n{recipe.summary}\n")
    print_table(("option", "default", "what it is"), [_option_row(option) for option in recipe.options])


def _option_row(option: Option) -> tuple[str, str, str]:
    default = "required" if option.required else "" if option.default is None else str(option.default)
    return option.flag, default, option.doc
