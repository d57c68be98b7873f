"""The benchmark of methods names what there is: every entry's options are its recipe's, and no method is left out."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from posttrain.cli.run import find_recipe
from posttrain.core import Task
from posttrain.grade import Exact, grade_all, trajectory_from_text
from posttrain.recipes.preference_methods import METHODS
from posttrain.recipes.rl_settings import VARIANTS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = {name: importlib.import_module(name) for name in ("methods_world", "methods_entries", "methods")}
    yield found
    for name in found:
        sys.modules.pop(name, None)


def test_every_entrys_options_are_those_of_its_recipe(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    world = modules["methods_world"].World(tmp_path, tmp_path / "start", tmp_path / "teacher", [], [])
    entries = modules["methods_entries"].entries()
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    made = {name: tmp_path / name for name in names}
    for entry in entries:
        recipe = find_recipe(entry.recipe)
        known = {option.name for option in recipe.options}
        options = entry.options(world, made)
        assert options.keys() - {"dtype"} <= known, entry.name
        required = {option.name for option in recipe.options if option.required}
        assert required <= options.keys(), entry.name
        assert set(entry.needs) <= set(names)


def test_every_loss_and_variant_has_a_row(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    world = modules["methods_world"].World(tmp_path, tmp_path / "start", tmp_path / "teacher", [], [])
    entries = [entry for entry in modules["methods_entries"].entries() if entry.family != "merging"]
    options = [(entry.recipe, entry.options(world, {})) for entry in entries]
    assert {given["loss"] for recipe, given in options if recipe == "dpo" and "loss" in given} == set(METHODS)
    assert {given["variant"] for recipe, given in options if recipe == "grpo"} == set(VARIANTS)
    recipes = {recipe for recipe, _ in options}
    assert {"sft", "distill", "on_policy_distill", "rejection_sampling", "ppo", "reward_model"} <= recipes


def test_the_worlds_answers_are_right_and_its_halves_apart(modules: dict[str, ModuleType]) -> None:
    world = modules["methods_world"]
    train, held_out = world.questions(300, 100, 0)
    assert len({task.prompt for task in train}) == 300
    assert not {frozenset(task.prompt[1:-1]) for task in train} & {frozenset(task.prompt[1:-1]) for task in held_out}
    by_hand = {"S": "bcde", "D": "edcb", "F": "dbec"}
    assert {rule: world.RULES[rule]("cebd") for rule in by_hand} == by_hand
    written = world.corpus(train, 0)
    right = sum(a.answer == b.answer for a, b in zip(train, written, strict=True)) / 300
    assert 0.3 < right < 0.55, "the corpus is wrong more often than not"
    rows = world.offline_rows([(Task(id="a", prompt="Sba=", answer="ab"), ["ab", "ba", "ba", ""])])
    assert rows["pairs"] == [{"prompt": "Sba=", "chosen": "ab", "rejected": "ba"}]
    # Of the wrong ones "bca" is commonest, with no letter in its place; "acb" has one, and is commoner than "cba".
    texts = ["bca", "bca", "bca", "acb", "acb", "abc", "cba"]
    lesser = world.lesser_pairs([(Task(id="a", prompt="Scab=", answer="abc"), texts)])
    assert lesser == [{"prompt": "Scab=", "chosen": "acb", "rejected": "bca"}]
    assert world.lesser_pairs([(Task(id="a", prompt="Sba=", answer="ab"), ["ab", "ba", ""])]) == []
    assert [row["label"] for row in rows["labels"]] == [True, False]
    assert [row["labels"] for row in rows["steps"]] == [[True, True], [False, False]]
    (grade,) = asyncio.run(grade_all(Exact(), [trajectory_from_text(train[0], train[0].answer or "")]))
    assert grade.score == 1.0


def test_p_values_are_corrected_for_the_whole_table(modules: dict[str, ModuleType]) -> None:
    """Holm by hand: the smallest of four times four, the next times three, never below the one before."""

    def row(name: str, p_value: float, wins: int = 9) -> dict[str, object]:
        return {"name": name, "p_value": p_value, "wins": wins, "losses": 4}

    rows = [row("c", 0.012), row("a", 0.01), row("d", 0.04), {"name": "reward model", "report": {}}, row("b", 0.001)]
    found = modules["methods"].holm(rows)
    assert {name: round(value, 4) for name, value in found.items()} == {"b": 0.004, "a": 0.03, "c": 0.03, "d": 0.04}
    assert modules["methods"].holm([row("worse", 1e-9, wins=1)]) == {"worse": 1.0}
