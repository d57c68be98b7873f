from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.core import GradeError, Task
from posttrain.grade import MultipleChoice, choice_task, chosen_option, normalised, prove, trajectory_from_text

Rows = Callable[[str], list[dict[str, Any]]]
FORMS = (
    "{letter}", "({letter})", "{letter}.", "The answer is {letter}", "\\boxed{{{letter}}}", "**Answer: {letter}**",
    "{text}",    "({letter}) {text}", "{letter}. {text}", "It follows.\nSo the final answer is {letter}.",
    "The correct answer is {text}",
)  # fmt: skip
FILES = (
    "multiple_choice/agieval_lsat-ar", "multiple_choice/agieval_lsat-lr", "multiple_choice/agieval_sat-en",
    "multiple_choice/mmlu_stem", "multiple_choice/arc_challenge", "multiple_choice/arc_easy",
    "multiple_choice/openbook_qa",
    "multiple_choice/commonsense_qa", "multiple_choice/piqa", "multiple_choice/copa",
    "multiple_choice/boolq",
    "math/agieval_aqua-rat", "math/agieval_sat-math", "math/math_qa",
)  # fmt: skip


def test_it_proves_itself() -> None:
    assert prove(MultipleChoice()).problems == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is a tree", None),
        ("A tree is a plant.", None),
        ("The answer is A.", 0),
        ("Answer: A and B", None),
        ("the answer isn't (A)", None),
        ("\\boxed{A} no, \\boxed{C}", 2),
        ("It is 5 apples", 3),
        ("<b>B</b>", None),
        ("(A) is too big, (B) too small", None),
        ("Final Answer: $\\boxed{D}$", 3),
        ("I would go with C", 2),
        ("C) 5", 2),
    ],
)
def test_by_hand(text: str, expected: int | None) -> None:
    assert chosen_option(text, ["oak", "elm", "5", "5 apples"]) == expected


@pytest.mark.parametrize(("answer", "gold"), [("B", 1), ("(b)", 1), ("elm", 1), ("1", 1), ("0", 0)])
def test_the_right_option_by_letter_text_or_index(answer: str, gold: int) -> None:
    task = Task(id="t", prompt="?", answer=answer, facts={"options": ["oak", "elm", "ash"]})
    scores = [asyncio.run(MultipleChoice().grade(trajectory_from_text(task, letter))).score for letter in "ABC"]
    assert scores == [float(place == gold) for place in range(3)]


def test_a_task_without_a_right_option_is_an_error() -> None:
    for task in (
        Task(id="t", prompt="?", answer="E", facts={"options": ["a", "b"]}),
        Task(id="t", prompt="?", answer="A"),
        Task(id="t", prompt="?", facts={"options": ["a", "b"]}),
    ):
        with pytest.raises(GradeError, match="task 't'"):
            asyncio.run(MultipleChoice().grade(trajectory_from_text(task, "A")))


@pytest.mark.parametrize("name", FILES)
def test_every_question_of_the_data_in_every_form(data_rows: Rows, name: str) -> None:
    """The right option scores 1 and the next one 0, in eleven forms; an option whose text is a letter is let out."""
    grader = MultipleChoice()

    async def check() -> list[str]:
        problems = []
        for number, row in enumerate(data_rows(f"{name}.jsonl.gz")[::40]):
            task = choice_task(row, id=f"{name}/{number}")
            options = task.facts["options"]
            alike = len({normalised(option) for option in options}) < len(options)
            gold = "ABCDEFGHIJ".index(task.answer or "")
            assert row.get("gold", gold) == gold
            for form in FORMS:
                by_text = "{text}" in form and "{letter}" not in form
                if by_text and (alike or any(len(normalised(option)) < 2 for option in options)):
                    continue
                for place, expected in ((gold, 1.0), ((gold + 1) % len(options), 0.0)):
                    text = form.format(letter="ABCDEFGHIJ"[place], text=options[place])
                    if (await grader.grade(trajectory_from_text(task, text))).score != expected:
                        problems.append(f"{task.id} {text!r} did not score {expected}")
        return problems

    assert asyncio.run(check()) == []
