"""Small instances of every verifier that needs no model, each able to prove itself here and now."""

from __future__ import annotations

import importlib.util

from posttrain.core import GradeCase, Grader, Task
from posttrain.grade.answer import right, wrong
from posttrain.grade.citation import Citations
from posttrain.grade.code import InputOutput, UnitTests
from posttrain.grade.compose import Gate, Product, Threshold, Veto
from posttrain.grade.instruction import Instructions
from posttrain.grade.json_schema import JsonSchema
from posttrain.grade.multiple_choice import MultipleChoice
from posttrain.grade.repetition import Repetition
from posttrain.grade.sandbox import Sandbox, SandboxLimits
from posttrain.grade.sandbox_process import SandboxUnavailable
from posttrain.grade.text import Exact, Length, Regex
from posttrain.grade.tool_call import ToolCalls
from posttrain.grade.word_overlap import Contains, WordF1


def verifier_graders() -> list[Grader]:
    """One of each.

    JsonSchema is left out where its extra is not installed, and those that run programs where no sandbox is to be had:
    `posttrain doctor` says so.
    """
    graders: list[Grader] = [
        WordF1(),
        WordF1(0.7, name="word_f1_cut"),
        Contains(),
        MultipleChoice(),
        Repetition(),
        Citations(),
        ToolCalls(),
        ToolCalls(partial=True, name="tool_calls_partial"),
        Instructions(),
        Instructions(loose=True, name="instructions_loose"),
        *_combinations(),
    ]
    if importlib.util.find_spec("jsonschema") is not None:
        graders.append(JsonSchema())
    sandbox = Sandbox(SandboxLimits(cpu_s=1))
    try:
        sandbox.start()
    except SandboxUnavailable:
        return graders
    return [*graders, UnitTests(sandbox), InputOutput(sandbox)]


def _combinations() -> list[Grader]:
    """Each with cases of its own for what it does with its parts."""
    task = Task(id="capital", prompt="The capital of France?", answer="Paris")
    form = [right(task, "<a>"), wrong(task, "a")]
    half = GradeCase(task=task, text="Paris, it is", low=0.5, high=0.5, why="two words too many, a quarter each")
    return [
        Gate(
            Regex("^<a>", cases=form),
            Contains(),
            cases=[right(task, "<a> Paris"), wrong(task, "Paris", "the gate is closed"), wrong(task, "<a> Lyon")],
        ),
        Veto(
            Contains(),
            [(Length(max=3, unit="words"), 1.0)],
            cases=[right(task, "It is Paris"), wrong(task, "Paris or else Lyon", "too long"), wrong(task, "Lyon")],
        ),
        Product(
            [Contains(), Length(max=1, unit="words", slope=0.25)],
            cases=[right(task, "Paris"), half, wrong(task, "Lyon")],
        ),
        Threshold(WordF1(), 0.8, cases=[right(task, "Paris"), wrong(task, "Paris, it is, by all means")]),
        Threshold(Exact(), 0.5, name="threshold_exact", cases=[right(task, "paris"), wrong(task, "pari")]),
    ]
