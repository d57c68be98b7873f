from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from posttrain.core import ConfigError, Grade, GradeError, StopReason, Task, Trajectory
from posttrain.grade import Exact, Length, Regex, accepted_answers, answer_text, normalised, trajectory_from_text
from posttrain.grade.regex_worker import exponent

GradeText = Callable[..., Grade]


@pytest.mark.parametrize(
    ("text", "score"),
    [("Paris", 1), (" “PARIS.” ", 1), ("pa\u0301ris", 0), ("Paris, France", 0), ("Pari", 0), ("", 0), ("...", 0)],
)
def test_exact_forgives_dress_and_nothing_else(grade_text: GradeText, text: str, score: float) -> None:
    assert grade_text(Exact(), text, "Paris").score == score


def test_exact_without_normalising_and_with_a_function(grade_text: GradeText) -> None:
    assert grade_text(Exact(normalise=False), "paris", "Paris").score == 0
    assert grade_text(Exact(normalise=False), "Paris", "Paris").score == 1
    assert grade_text(Exact(normalise=lambda text: text[:1]), "Prague", "Paris").score == 1


def test_any_accepted_answer_counts(grade_text: GradeText) -> None:
    assert grade_text(Exact(), "NYC", "New York", answers=["NYC", "Big Apple"]).score == 1
    assert grade_text(Exact(), "Big apple", answers=["NYC", "Big Apple"]).score == 1
    assert grade_text(Exact(), "Boston", "New York", answers=["NYC"]).score == 0


def test_a_task_without_an_answer_is_an_error_not_a_zero(grade_text: GradeText) -> None:
    with pytest.raises(GradeError, match="'task' has no answer"):
        grade_text(Exact(), "x")
    with pytest.raises(GradeError, match="list of texts"):
        accepted_answers(Task(id="t", prompt="?", facts={"answers": "one text"}))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>is it 3?</think>4", "4"),
        ("template opened it: 3?</think> 4", " 4"),
        ("<think>cut short while thinking", ""),
        ("<think>a</think>b<think>c</think>d", "d"),
    ],
)
def test_reasoning_is_no_answer(text: str, answer: str) -> None:
    assert answer_text(trajectory_from_text(Task(id="t", prompt="?"), text)) == answer


def test_normalised_by_hand() -> None:
    assert normalised("  \uff21 \t b.\n") == "a b"


def test_regex_finds_and_compares_the_last_group(grade_text: GradeText) -> None:
    found = Regex(r"\bshall\b")
    assert grade_text(found, "I shall").score == 1
    assert grade_text(found, "I will").score == 0
    tagged = Regex(r"<a>(?P<x>.*?)</a>", group="x")
    assert grade_text(tagged, "<a>4</a> no <a>5</a>", "5").score == 1
    assert grade_text(tagged, "<a>5</a> no <a>4</a>", "5").score == 0
    assert grade_text(tagged, "5", "5").score == 0


def test_regex_refuses_what_is_no_pattern() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Regex("(")
    with pytest.raises(ConfigError, match="no group 2"):
        Regex("(a)", group=2)


@pytest.mark.parametrize(
    ("words", "score"), [(0, 0.0), (3, 0.5), (4, 0.75), (5, 1.0), (7, 1.0), (8, 0.75), (10, 0.25), (11, 0.0), (99, 0.0)]
)
def test_length_falls_by_its_slope(grade_text: GradeText, words: int, score: float) -> None:
    grader = Length(min=5, max=7, unit="words", slope=0.25)
    assert grade_text(grader, " ".join(["w"] * words)).score == pytest.approx(score)


def test_length_without_slope_is_all_or_nothing(grade_text: GradeText) -> None:
    assert grade_text(Length(3, unit="characters"), "abc").score == 1
    assert grade_text(Length(3, unit="characters"), "abcd").score == 0
    assert grade_text(Length(max=3, unit="characters"), "").score == 1


def test_length_in_tokens_counts_what_the_policy_wrote(grade_text: GradeText) -> None:
    trajectory = Trajectory(
        id="t",
        task=Task(id="t", prompt="?"),
        tokens=(1, 2, 3, 4),
        mask=(False, True, True, False),
        logprobs=(0.0,) * 4,
        policy_logprobs=(0.0,) * 4,
        text="one long text of many words",
        stop_reason=StopReason.EOS,
    )
    assert Length(2)._measure(trajectory) == 2


@pytest.mark.parametrize(
    "wrong", [{}, {"target": 3, "max": 4}, {"min": 5, "max": 4}, {"max": 3, "slope": 0.0}, {"max": 3, "unit": "lines"}]
)
def test_length_refuses_contradictions(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Length(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("abc", 1), ("a*b", 2), (r"<answer>(.*?)</answer>", 2), (r"\s*(\w+)\s*", 4), ("(a|b)c{2,5}", 1), ("(?=a+)b", 2),
        ("(a+)+$", None), ("(a|a)*b", None), (r"(\s*\w+)*:", None), (r"(a)\1", None), ("((ab)?c+)*", None),
    ],
)  # fmt: skip
def test_how_the_time_of_a_search_grows(pattern: str, found: int | None) -> None:
    assert exponent(pattern, 0) == found


def test_a_pattern_that_hangs_is_an_error_in_time(grade_text: GradeText) -> None:
    hostile = "a" * 60 + "b"
    nested = Regex("^(a+)+$", timeout_s=0.5)
    started_s = time.monotonic()
    with pytest.raises(GradeError, match=r"on 61 characters: the worker process gave no answer within 0\.5 s"):
        grade_text(nested, hostile)
    assert time.monotonic() - started_s < 60  # the start of a process on a busy machine
    assert grade_text(nested, "aaa").score == 1.0
    assert grade_text(nested, "aab").score == 0.0
    caught = Regex(r"(?:\s*\w+)*=(\d+)", group=1)
    assert grade_text(caught, "x = 3, so y=4", answer="4").score == 1.0
    assert grade_text(caught, "x = 3, so y=4", answer="3").score == 0.0
