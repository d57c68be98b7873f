from __future__ import annotations

import asyncio
import importlib.util
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from posttrain.core import GradeError, MissingExtraError, Task
from posttrain.grade import (
    INSTRUCTION_KINDS,
    Instructions,
    Tools,
    instruction_task,
    loose_forms,
    prove,
    trajectory_from_text,
)
from posttrain.grade.instruction_cases import instruction_cases
from posttrain.grade.instruction_forms import FORMS
from posttrain.grade.instruction_ifbench import COUNTING
from posttrain.grade.instruction_ifeval import IFEVAL
from posttrain.grade.instruction_text import is_verb, sentences, syllables, word_tokens

Rows = Callable[[str], list[dict[str, Any]]]
FILES = ("instruction_following/ifeval_input_data.jsonl.gz", "instruction_following/ifbench_test.jsonl.gz")


def test_there_are_25_and_58_kinds() -> None:
    assert len(IFEVAL) == 25
    assert len(COUNTING) + len(FORMS) == 58
    assert len(INSTRUCTION_KINDS) == 83


@pytest.mark.parametrize("loose", [False, True])
def test_every_kind_has_an_answer_that_follows_and_a_near_miss(loose: bool) -> None:
    assert prove(Instructions(loose=loose)).problems == ()
    listed = Counter((kind, holds) for kind, _, _, holds in instruction_cases())
    language = set() if importlib.util.find_spec("langdetect") else {
        "change_case:english_capital", "change_case:english_lowercase", "language:response_language"
    }  # fmt: skip
    for kind in INSTRUCTION_KINDS.keys() - language:
        assert listed[kind, True] >= 1
        assert listed[kind, False] >= 1


def test_every_instruction_of_the_data_is_understood(data_rows: Rows) -> None:
    texts = ["A short answer.", "It says, one: two; three! Is it? (Yes.)\n\n* a\n* b"]
    kinds: Counter[str] = Counter()
    for name in FILES:
        for row in data_rows(name):
            task = instruction_task(row)
            kinds.update(task.facts["instructions"])
            for text in texts:
                grade = asyncio.run(Instructions(tools=Tools(detect_language=lambda text: "en")).grade(
                    trajectory_from_text(task, text)
                ))  # fmt: skip
                assert grade.score in (0.0, 1.0)
                assert grade.parts.keys() == {"followed", *task.facts["instructions"]}
    assert sum(kinds.values()) >= 900
    assert len(kinds) == 81
    assert INSTRUCTION_KINDS.keys() - kinds.keys() == {"custom:character_reverse", "custom:date_format_list"}


def test_no_text_makes_a_check_fail_in_another_way(data_rows: Rows) -> None:
    """Each check gives a verdict on odd texts: an exception would be a grade with an error."""
    texts = [
        "",
        " ",
        "\n",
        ".",
        "...",
        '"',
        "*",
        "-",
        "((((",
        "a",
        "É",
        "水",
        "😀",
        "1.",
        "<i>",
        "﹏" * 3,
        "\x00",
        "a\n\n\nb",
    ]
    random.seed(0)
    texts += ["".join(random.choices("ab .,!?\n*-\"'()[]<>#19é水", k=40)) for _ in range(20)]
    tools = Tools(detect_language=lambda text: "en")
    options: dict[str, list[dict[str, Any]]] = {}
    for kind, given, _, _ in instruction_cases():
        options.setdefault(kind, []).append(given)
    for kind, (check, _) in INSTRUCTION_KINDS.items():
        for given in options.get(kind, [{"language": "en"}]):
            for text in texts:
                assert check(text, given, tools) in (True, False)


def test_parts_share_and_rationale() -> None:
    facts = {"instructions": ["punctuation:no_comma", "startend:quotation"], "options": [{}, {}]}
    trajectory = trajectory_from_text(Task(id="t", prompt="?", facts=facts), "no marks")
    strict = asyncio.run(Instructions().grade(trajectory))
    assert (strict.score, strict.parts["followed"]) == (0.0, 0.5)
    assert strict.parts["punctuation:no_comma"] == 1.0
    assert strict.rationale == "not followed: startend:quotation"
    assert asyncio.run(Instructions(partial=True).grade(trajectory)).score == 0.5
    reasoned = trajectory_from_text(trajectory.task, '<think>a, b</think>"none"')
    assert asyncio.run(Instructions().grade(reasoned)).score == 1.0


def test_loose_forms_by_hand() -> None:
    assert loose_forms("*a*\nb\nc") == ["*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "must be a list of kinds"),
        ({"instructions": ["a:b"]}, "no instruction 'a:b' is known"),
        ({"instructions": ["count:numbers"]}, "count:numbers needs N"),
        ({"instructions": ["count:numbers"], "options": [{"N": 1, "M": 2}]}, "takes N, not M"),
        ({"instructions": ["count:numbers"], "options": [{"N": 1}, {}]}, "1 instructions and 2 options"),
        ({"instructions": ["keywords:existence"], "options": [{"keywords": ["("]}]}, "keywords:existence with"),
    ],
)
def test_what_cannot_be_checked_is_never_a_zero(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(GradeError, match=message):
        asyncio.run(Instructions().grade(trajectory_from_text(Task(id="t", prompt="?", facts=facts), "x")))


def test_without_langdetect_a_language_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    facts = {"instructions": ["language:response_language"], "options": [{"language": "de"}]}
    trajectory = trajectory_from_text(Task(id="t", prompt="?", facts=facts), "Das Wetter ist schön.")
    with pytest.raises(MissingExtraError, match=r"posttrain\[instructions\]"):
        asyncio.run(Instructions().grade(trajectory))
    own = Instructions(tools=Tools(detect_language=lambda text: "de"))
    assert asyncio.run(own.grade(trajectory)).score == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Fox ran. He fell!", ["Mr. Fox ran.", "He fell!"]),
        ("Is it? Yes... it is. No.", ["Is it?", "Yes... it is.", "No."]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("The U.S. Army and J. Smith, e.g. here.", ["The U.S. Army and J. Smith, e.g. here."]),
        ("Version 3.5 came. it was late.", ["Version 3.5 came.", "it was late."]),
        ("One\n\ntwo", ["One\n\ntwo"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_tokens_syllables_verbs() -> None:
    assert word_tokens("Don't go, it's 3.5% well-made (U.S.)...") == [
        "Do", "n't", "go", ",", "it", "'s", "3.5", "%", "well-made", "(", "U.S.", ")", "...",
    ]  # fmt: skip
    counted = {
        "the": 1,
        "paper": 2,
        "banana": 3,
        "table": 2,
        "walked": 1,
        "wanted": 2,
        "boxes": 2,
        "tree": 1,
        "idea": 3,
    }
    assert {word: syllables(word) for word in counted} == counted
    assert all(map(is_verb, ["Write", "writing", "made", "running", "tries", "stopped", "Is"]))
    assert not any(map(is_verb, ["The", "a", "table", "writer", "12", ""]))


@pytest.mark.skipif(importlib.util.find_spec("langdetect") is None, reason="langdetect is not installed")
def test_languages() -> None:
    for language, text in (
        ("en", "The weather is very nice today and we go out."),
        ("fr", "Il fait très beau aujourd'hui et nous sortons."),
        ("hi", "आज मौसम बहुत अच्छा है और हम बाहर जा रहे हैं।"),
        ("sw", "Hali ya hewa ni nzuri sana leo na tunatoka nje."),
    ):
        facts = {"instructions": ["language:response_language"], "options": [{"language": language}]}
        task = Task(id="t", prompt="?", facts=facts)
        assert asyncio.run(Instructions().grade(trajectory_from_text(task, text))).score == 1.0
    assert asyncio.run(Instructions().grade(trajectory_from_text(task, "This is English."))).score == 0.0
