"""Words shared, answers held, citations and repetition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import ConfigError, Grade, GradeError, Grader, Task
from posttrain.grade import (
    Citations,
    Contains,
    Repetition,
    WordF1,
    citations_in,
    longest_loop,
    prove,
    quoted_from,
    repeated_ngrams,
    trajectory_from_text,
    word_f1,
)

GradeText = Callable[..., Grade]
Rows = Callable[[str], list[dict[str, Any]]]


@pytest.mark.parametrize(
    "grader",
    [
        WordF1(),
        WordF1(0.7),
        WordF1(0.9),
        Contains(),
        Contains(5),
        Citations(),
        Repetition(),
        Repetition(max_loop=None),
        Repetition(n=3, free=0.3),
        Repetition(n=2, free=0.0, max_loop=100),
    ],
    ids=lambda grader: grader.name,
)
def test_they_prove_themselves(grader: Grader) -> None:
    assert prove(grader).problems == ()


def test_f1_by_hand(grade_text: GradeText) -> None:
    # Given: big red red dog; gold: red dog dog. Shared: red, dog = 2. p = 2/4, r = 2/3, F1 = 2·(1/3)/(7/6) = 4/7.
    assert word_f1("big red red dog".split(), "red dog dog".split()) == pytest.approx((4 / 7, 1 / 2, 2 / 3))
    assert word_f1([], []) == (1.0, 1.0, 1.0)
    assert word_f1([], ["a"]) == (0.0, 0.0, 0.0)
    grade = grade_text(WordF1(), "The rock's stars.", "rocks stars", answers=["x", "stars"])
    assert (grade.score, grade.parts["exact"]) == (1.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
def test_f1_is_symmetric_and_1_only_for_the_same_words(one: list[str], other: list[str]) -> None:
    f1, precision, recall = word_f1(one, other)
    assert word_f1(other, one) == (f1, recall, precision)
    assert 0 <= f1 <= 1
    assert (f1 == 1) == (sorted(one) == sorted(other))


def test_every_alias_of_triviaqa_is_accepted_and_the_next_question_s_answer_is_not(data_rows: Rows) -> None:
    rows = data_rows("qa/triviaqa_3k.jsonl.gz")[::10]

    async def scores(grader: Grader) -> tuple[int, int, int]:
        right = wrong = aliases = 0
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
            task = Task(id="t", prompt="?", answer=row["answer"], facts={"answers": row["aliases"]})
            for alias in [row["answer"], *row["aliases"]]:
                aliases += 1
                right += (await grader.grade(trajectory_from_text(task, f"{alias}."))).score == 1.0
            wrong += (await grader.grade(trajectory_from_text(task, other["answer"]))).score == 1.0
        return right, aliases, wrong

    for grader in (WordF1(), Contains()):
        right, aliases, wrong = asyncio.run(scores(grader))
        assert right == aliases > 2000
        assert wrong == 0


def test_citations_by_hand(grade_text: GradeText) -> None:
    assert citations_in("a [1] b [2, 3] c [4](http://x) [x] [2]") == [1, 2, 3, 2]
    assert quoted_from("The  OAK is … park.", "the oak is the largest tree of the park")
    assert not quoted_from("park … oak", "the oak of the park")
    assert not quoted_from("…", "anything")
    facts = {"sources": ["one source here", "another source here"]}
    free = grade_text(Citations(), "It is so [2].", **facts)
    assert (free.score, free.parts["exist"]) == (1.0, 1.0)
    assert grade_text(Citations(), 'It says "another source here" [2].', **facts).score == 1.0
    untrue = grade_text(Citations(), 'It says "another source there" [2].', **facts)
    assert (untrue.score, untrue.parts["quotations"]) == (0.0, 0.0)
    assert grade_text(Citations(need_quotation=True), "It is so [2].", **facts).score == 0.0
    with pytest.raises(GradeError, match="must be a list of texts"):
        grade_text(Citations(), "x")
    with pytest.raises(GradeError, match="there are sources 1 to 2"):
        grade_text(Citations(), "x", cited=[3], **facts)


def test_repetition_by_hand(grade_text: GradeText) -> None:
    assert repeated_ngrams("a b a b a".split(), 2) == pytest.approx(0.5)  # ab ba ab ba: 2 of 4 came before
    assert repeated_ngrams(["a"], 2) == 0.0
    assert longest_loop("a b c a b c a b c".split()) == 6
    assert longest_loop("a a a a".split()) == 3
    assert longest_loop("a b a c".split()) == 0
    assert longest_loop([]) == 0
    grade = grade_text(Repetition(n=2, free=0.0, max_loop=None), "a b a b a")
    assert (grade.score, grade.parts) == (0.5, {"repeated": 0.5, "loop": 3.0})
    assert grade_text(Repetition(max_loop=2), "a b a b a").score == 0.0
    tokens = trajectory_from_text(Task(id="t", prompt="?"), "a b c").replace(tokens=(9, 5, 5, 5))
    assert asyncio.run(Repetition(n=1, free=0.0, unit="tokens").grade(tokens)).parts["repeated"] == pytest.approx(2 / 3)


def test_prose_is_not_repetition(data_rows: Rows) -> None:
    texts = [row["text"] for row in data_rows("corpora/c4_demo.jsonl.gz")]
    scores = [
        asyncio.run(Repetition().grade(trajectory_from_text(Task(id="t", prompt="?"), text))).score for text in texts
    ]
    assert sum(score == 1.0 for score in scores) >= 0.95 * len(texts)


def test_settings_that_cannot_be() -> None:
    for make in (lambda: WordF1(0.0), lambda: Contains(0), lambda: Repetition(0), lambda: Repetition(unit="x")):  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            make()
