"""`posttrain run RECIPE [--option value …]`: find a recipe, read its options from its signature, run it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
import typing
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
With `--json`, standard output has the recipe's result alone; what it says on its way goes to standard error.
"""


def run_command(words: Sequence[str]) -> int:
    """Run one recipe from command-line words."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        print_table(("recipe", "what it does"), [(name, summary) for name, (_, summary) in BUILT_IN.items()])
        return 0
    flag, _, folder = words[0].partition("=")
    if flag == "--resume":
        words = _resumed_words([flag, folder, *words[1:]] if folder else words)
    recipe = find_recipe(words[0])
    rest = list(words[1:])
    if any(word in ("-h", "--help") for word in rest):
        print_options(recipe)
        return 0
    values = _with_text_paths(parse_options(recipe, [word for word in rest if word != "--json"]))
    if "--json" not in rest:
        recipe.run_with(values)
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        result = recipe.run_with(values)
    print_json(result)
    return 0


def _with_text_paths(value: Any) -> Any:
    """Paths as text: `Recipe.run_with` takes plain values, and makes paths of them itself."""
    if isinstance(value, dict):
        return {name: _with_text_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_text_paths(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _resumed_words(words: Sequence[str]) -> list[str]:
    """`--resume FOLDER` alone: the recipe and its options are those of the run."""
    from posttrain.registry import RunFolder

    if len(words) < 2:
        raise UsageError("--resume needs a run folder")
    run = RunFolder.open(Path(words[1]), read_only=True)
    recipe = run.state.recipe
    whole = run.path.with_name(run.path.name.removesuffix(f"-{recipe}"))
    if whole != run.path and (whole / "run.json").is_file():
        raise UsageError(f"{run.path} is a stage of {whole}; go on with: posttrain run --resume {whole}")
    if recipe not in BUILT_IN:
        raise UsageError(
            f"{run.path} is a run of the recipe {recipe!r}, which is not built in; "
            f"name its file: posttrain run FILE.py --resume {run.path}"
        )
    return [recipe, *words]


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
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no recipe {name!r}; {hint}Built in: {', '.join(BUILT_IN)}; or give a Python file")
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
    name = f"posttrain_recipe_{path.stem}"  # never the name of another module: `json.py` is a fine recipe file
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file that can be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python FILE.py` does
    spec.loader.exec_module(module)
    return {
        item.name: item
        for item in vars(module).values()
        if isinstance(item, Recipe) and item.__module__ == module.__name__
    }


def parse_options(recipe: Recipe[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Options from words: `--name value`, `--name=value`, `--flag` and `--no-flag` for booleans, `--config FILE`.

    What the words say outweighs the file. With `--resume FOLDER` and no file, the run's own config.toml is the file.

    Raises:
        ConfigError: an option is unknown (near names are suggested), has no value, is given twice, or does not parse.
    """
    options = {option.flag: option for option in recipe.options}
    values: dict[str, Any] = {}
    configs: list[Path] = []
    given: set[str] = set()
    queue = list(words)
    while queue:
        flag, equals, text = queue.pop(0).partition("=")
        positive = "--" + flag[5:] if flag.startswith("--no-") and flag not in options else flag
        if positive in given:
            raise ConfigError(f"{positive} is given twice")
        given.add(positive)
        if flag == "--config":
            configs.append(Path(text if equals else _next(queue, flag, options)))
            continue
        if positive != flag and positive in options and options[positive].type is bool and not equals:
            values[options[positive].name] = False
            continue
        if flag not in options:
            raise ConfigError(_unknown(recipe, flag, list(options)))
        option = options[flag]
        if option.type is bool and not equals and (not queue or queue[0].startswith("--")):
            values[option.name] = True
            continue
        values[option.name] = option.parse(text if equals else _next(queue, flag, options))
    resume = values.get("resume")
    if isinstance(resume, Path) and not configs:
        configs.append(_config_of_run(resume))
    for path in configs:
        values = {**_read_config(recipe, path), **values}
    return values


def _config_of_run(folder: Path) -> Path:
    from posttrain.registry import RunFolder

    return RunFolder.open(folder, read_only=True).path / "config.toml"


def _read_config(recipe: Recipe[..., Any], path: Path) -> dict[str, Any]:
    """A configuration file's values; `-` in a name counts as `_`."""
    values = {name.replace("-", "_"): value for name, value in read_toml(path).items()}
    known = [option.name for option in recipe.options]
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: {_unknown(recipe, name, known)}")
    return values


def _unknown(recipe: Recipe[..., Any], name: str, known: Sequence[str]) -> str:
    bare = {each.lstrip("-"): each for each in known}  # or the dashes would count as likeness
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    hint = f"did you mean {bare[near[0]]}?" if near else f"it has {', '.join(known) or 'none'}"
    if not name.startswith("-") and known and known[0].startswith("--"):
        return f"recipe {recipe.name!r}: {name!r} belongs to no option; write options as --name value"
    return f"recipe {recipe.name!r} has no option {name}; {hint}"


def _next(queue: list[str], flag: str, options: dict[str, Option]) -> str:
    if not queue or queue[0].partition("=")[0] in options:
        raise ConfigError(f"{flag} needs a value")
    return queue.pop(0)


def print_options(recipe: Recipe[..., Any]) -> None:
    """The help page of one recipe."""
    print(f"usage: posttrain run {recipe.name} [--option value …] [--config FILE.toml] [--json]\n\n{recipe.summary}\n")
    print_table(("option", "default", "what it is"), [_option_row(option) for option in recipe.options])


def _option_row(option: Option) -> tuple[str, str, str]:
    default = "required" if option.required else "" if option.default is None else _plain(option.default)
    choices = typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else ()
    doc = option.doc + (f" One of {', '.join(map(str, choices))}." if choices else "")
    return option.flag, default, doc


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
