"""`posttrain run`: recipes of Python files, their options, configuration files, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = '''
from pathlib import Path
from typing import Literal
import posttrain as pt
from posttrain.core import DataError
from posttrain.recipes.workbench import RUNS, open_workbench


@pt.recipe
def toy(
    *,
    data: Path,
    steps: int = 3,
    lr: float = 1e-5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    chat: bool = False,
    stop: tuple[str, ...] = ("a", "b"),
    fail: str = "",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> dict[str, object]:
    """Does nothing, well.

    Args:
        data: training rows.
        steps: optimiser steps.
        fail: how to end.
        resume: run to go on with.
    """
    options = dict(locals())
    with open_workbench("toy", options, runs=runs, resume=resume) as bench:
        bench.say("working")
        if fail == "stop" and bench.run.state.resumed == 0:
            raise KeyboardInterrupt
        if fail == "error":
            raise DataError("row 7 has no prompt")
        return {"data": data, "steps": steps, "lr": lr, "dtype": dtype, "chat": chat, "stop": stop, "id": bench.run.id}
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "json.py"  # the name of a module that is loaded already
    path.write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return path


def test_options_come_from_the_signature(posttrain: Callable[..., Any], toy: Path) -> None:
    words = ["--data=rows.jsonl", "--steps", "5", "--lr", "-1e-3", "--dtype", "bfloat16", "--chat", "--stop", "x,y"]
    said = posttrain("run", toy, *words, "--json")
    assert said.code == 0
    result = said.json()  # standard output is JSON alone, although the recipe speaks
    assert "working" in said.err
    assert {key: value for key, value in result.items() if key != "id"} == {
        "data": "rows.jsonl",
        "steps": 5,
        "lr": -1e-3,
        "dtype": "bfloat16",
        "chat": True,
        "stop": ["x", "y"],
    }
    assert json.dumps is not None  # the recipe's file did not take the place of the module of its name
    plain = posttrain("run", toy, "--data", "rows.jsonl", "--no-chat")
    assert (plain.code, plain.out) == (0, "working\n")


def test_help_lists_options_with_defaults_and_choices(posttrain: Callable[..., Any], toy: Path) -> None:
    lines = {line.split("\t")[0]: line for line in posttrain("run", toy, "--help").out.splitlines()}
    assert lines["--data"] == "--data\trequired\ttraining rows."
    assert lines["--steps"] == "--steps\t3\toptimiser steps."
    assert lines["--dtype"].endswith("One of float32, bfloat16.")
    assert lines["--stop"].split("\t")[1] == "a,b"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--step", "4"], "recipe 'toy' has no option --step; did you mean --steps?"),
        (["--quantise", "4"], "recipe 'toy' has no option --quantise; it has --data, --steps"),
        (["4"], "recipe 'toy': '4' belongs to no option; write options as --name value"),
        (["--steps", "many"], "--steps: 'many' is not a valid int"),
        (["--dtype", "int8"], "--dtype: 'int8' is not one of float32, bfloat16"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--chat"], "--steps needs a value"),
        (["--steps", "1", "--steps", "2"], "--steps is given twice"),
        (["--chat", "--no-chat"], "--chat is given twice"),
        (["--config", "absent.toml"], "absent.toml: no such configuration file"),
    ],
)
def test_errors_say_what_was_meant(posttrain: Callable[..., Any], toy: Path, words: list[str], told: str) -> None:
    said = posttrain("run", toy, "--data", "rows.jsonl", *words)
    assert said.code == 2
    assert told in said.err


def test_a_missing_option_is_named(posttrain: Callable[..., Any], toy: Path) -> None:
    said = posttrain("run", toy)
    assert (said.code, said.err) == (2, "posttrain: recipe 'toy' needs --data\n")


def test_a_configuration_file_gives_options_and_words_outweigh_it(
    posttrain: Callable[..., Any], toy: Path, tmp_path: Path
) -> None:
    config = tmp_path / "toy.toml"
    config.write_text('data = "rows.jsonl"\nsteps = 7\nlr = 1\nstop = ["z"]\n')
    result = posttrain("run", toy, "--config", config, "--steps", "8", "--json").json()
    assert (result["steps"], result["lr"], result["stop"]) == (8, 1.0, ["z"])
    config.write_text('data = "rows.jsonl"\nstep = 7\n')
    said = posttrain("run", toy, "--config", config)
    assert said.code == 2
    assert f"{config}: recipe 'toy' has no option step; did you mean steps?" in said.err
    config.write_text('data = "rows.jsonl"\nsteps = "many"\n')
    assert "--steps: Expected `int`, got `str`" in posttrain("run", toy, "--config", config).err


def test_recipes_that_are_not_there(posttrain: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    assert "no recipe 'grop'; did you mean grpo?" in posttrain("run", "grop").err
    assert "absent.py: no such file" in posttrain("run", "absent.py").err
    assert "has no recipe 'other'; it has toy" in posttrain("run", f"{toy}:other").err
    empty = tmp_path / "empty.py"
    empty.write_text("")
    said = posttrain("run", empty)
    assert said.code == 2
    assert "mark one with @pt.recipe" in said.err
    listed = posttrain("run")
    assert {"sft", "grpo", "evaluate", "flywheel"} <= {line.split("\t")[0] for line in listed.out.splitlines()}


def test_a_failed_run_ends_with_one_message(posttrain: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    said = posttrain("run", toy, "--data", "rows.jsonl", "--fail", "error")
    assert (said.code, said.err) == (1, "posttrain: row 7 has no prompt\n")
    runs = posttrain("runs", "--json").json()
    assert [run["status"] for run in runs] == ["failed"]
    assert "error: DataError: row 7 has no prompt" in posttrain("show", runs[0]["id"]).out


def test_an_interrupted_run_goes_on_with_its_own_options(posttrain: Callable[..., Any], toy: Path) -> None:
    said = posttrain("run", toy, "--data", "rows.jsonl", "--steps", "9", "--fail", "stop")
    assert said.code == 130
    (run,) = posttrain("runs", "--json").json()
    assert run["status"] == "interrupted"
    assert f"posttrain run --resume runs/{run['id']}" in said.err
    alone = posttrain("run", "--resume", f"runs/{run['id']}")
    assert alone.code == 2
    assert f"posttrain run FILE.py --resume runs/{run['id']}" in alone.err
    resumed = posttrain("run", toy, "--resume", f"runs/{run['id']}", "--json").json()
    assert (resumed["id"], resumed["steps"]) == (run["id"], 9)
    changed = posttrain("run", toy, "--resume", f"runs/{run['id']}", "--steps", "10")
    assert changed.code == 2
    assert "began with steps = 9, now it is 10" in changed.err


def test_resume_alone_takes_recipe_and_options_from_the_run(
    posttrain: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.recipes import evaluate
    from posttrain.registry import RunFolder

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluate.evaluate, "run_with", seen.append)
    config = {"model": "some/model", "data": "tasks.jsonl", "n": 4, "stop": ["."]}
    run = RunFolder.create(tmp_path, "evaluate", config)
    stage = RunFolder.create(tmp_path, "sft", {}, run_id=f"{run.id}-sft")
    for folder in (run, stage):
        folder.finish("interrupted")
    assert posttrain("run", "--resume", run.path).code == 0
    assert seen == [{**config, "resume": str(run.path)}]
    said = posttrain("run", f"--resume={stage.path}")
    assert said.code == 2
    assert f"is a stage of {run.path}; go on with: posttrain run --resume {run.path}" in said.err
    assert "no run here" in posttrain("run", "--resume", tmp_path / "absent").err
    assert "--resume needs a run folder" in posttrain("run", "--resume").err
