from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import ConfigError, Grade, Grader, Task, Trajectory
from posttrain.grade import (
    Contains,
    Exact,
    Function,
    Gate,
    Length,
    Product,
    Regex,
    Threshold,
    Veto,
    Weighted,
    WordF1,
    grade_all,
    normalise_by_group,
    prove,
    reward_metrics,
    right,
    trajectory_from_text,
    wrong,
)

GradeText = Callable[..., Grade]


def _fails(trajectory: Trajectory) -> float:
    raise RuntimeError("oh")


def _fixed(score: float, name: str) -> Grader:
    return Function(lambda trajectory: Grade(score=score, grader=name, parts={"p": score}, cost=0.5), name)


def test_gate_by_hand(grade_text: GradeText) -> None:
    gate = Gate(Regex(r"^<a>"), Contains(), closed=-0.5, passed=0.25)
    opened = grade_text(gate, "<a> Paris", "Paris")
    assert (opened.score, opened.parts) == (1.25, {"regex": 1.0, "contains": 1.0, "open": 1.0})
    assert grade_text(gate, "<a> Lyon", "Paris").score == 0.25
    closed = grade_text(gate, "Paris", "Paris")
    assert (closed.score, closed.parts) == (-0.5, {"regex": 0.0, "open": 0.0})
    assert "the pattern is not found" in closed.rationale


def test_what_is_behind_a_closed_gate_is_not_asked(grade_text: GradeText) -> None:
    asked: list[str] = []
    behind = Function(lambda trajectory: bool(asked.append(trajectory.text)), "behind")
    gate = Gate(Length(max=1, unit="words", slope=0.5), behind, at=0.5)
    grade_text(gate, "one two three")
    assert asked == []
    grade_text(gate, "one two")  # scores 0.5
    assert asked == ["one two"]


def test_veto_by_hand(grade_text: GradeText) -> None:
    veto = Veto(Exact(), {_fixed(0.5, "a"): 0.4, _fixed(0.2, "b"): 0.2}, score=-1.0)
    assert grade_text(veto, "x", "x").score == 1.0
    stopped = grade_text(Veto(Exact(), [(_fixed(0.5, "a"), 0.6)], score=-1.0), "x", "x")
    assert (stopped.score, stopped.parts) == (-1.0, {"exact": 1.0, "a": 0.5, "a/p": 0.5, "vetoed": 1.0})
    with pytest.raises(ConfigError, match="may veto"):
        Veto(Exact(), {})


def test_product_by_hand(grade_text: GradeText) -> None:
    three = [_fixed(0.5, "a"), _fixed(0.8, "b"), _fixed(0.4, "c")]
    assert grade_text(Product(three), "x").score == pytest.approx(0.16)
    assert grade_text(Product(three, geometric=True), "x").score == pytest.approx(0.16 ** (1 / 3))
    assert grade_text(Product([*three, _fixed(0.0, "d")]), "x").score == 0.0
    assert grade_text(Product(three), "x").cost == pytest.approx(1.5)
    negative = grade_text(Product([_fixed(-1.0, "a"), _fixed(-1.0, "b")]), "x")
    assert negative.score is None
    assert "below 0" in (negative.error or "")


def test_threshold_by_hand(grade_text: GradeText) -> None:
    cut = Threshold(WordF1(), at=0.8)
    assert grade_text(cut, "in New Delhi", "New Delhi").score == 1.0  # its F1 is 0.8
    below = grade_text(cut, "in old New Delhi", "New Delhi")
    assert (below.score, below.parts["word_f1"]) == (0.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    "composed",
    [
        Gate(Function(_fails, "f"), Exact()),
        Gate(Exact(), Function(_fails, "f")),
        Veto(Exact(), {Function(_fails, "f"): 0.5}),
        Veto(Function(_fails, "f"), {Exact(): 0.5}),
        Product([Exact(), Function(_fails, "f")]),
        Threshold(Function(_fails, "f"), 0.5),
    ],
)
def test_a_failing_part_is_an_error_of_the_whole(grade_text: GradeText, composed: Grader) -> None:
    grade = grade_text(composed, "x", "x")
    assert grade.score is None
    assert grade.error == "f: RuntimeError: oh"


def test_names_must_differ_and_widths_pass_on() -> None:
    with pytest.raises(ConfigError, match="different names"):
        Product([Exact(), Exact()])
    narrow = Function(_fails, "f")
    narrow.max_concurrency = 2  # type: ignore[attr-defined]
    assert Gate(Exact(), narrow).max_concurrency == 2


def test_combinations_of_combinations_prove_themselves() -> None:
    capital = Task(id="capital", prompt="?", answer="Paris")
    whole = Gate(
        Regex("^<a>", cases=[right(capital, "<a>"), wrong(capital, "a")]),
        Weighted({Contains(): 1.0, Length(max=3, unit="words"): 0.0}),
        cases=[right(capital, "<a> Paris"), wrong(capital, "Paris"), wrong(capital, "<a> Lyon")],
    )
    report = prove(whole)
    assert report.problems == ()
    assert [part.grader for part in report.parts] == ["regex", "weighted"]


def test_the_breakdown_is_in_the_metrics() -> None:
    whole = Gate(Regex("^<a>"), Weighted({Contains(): 1.0, Length(max=3, unit="words"): 0.5}))
    task = Task(id="t", prompt="?", answer="Paris")
    texts = ["<a> Paris", "<a> Lyon", "Paris"]
    grades = asyncio.run(grade_all(whole, [trajectory_from_text(task, text) for text in texts]))
    metrics = reward_metrics(grades, ["g"] * 3)
    assert metrics["reward"] == pytest.approx((1.5 + 0.5 + 0.0) / 3)
    assert metrics["rewards/regex/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/open/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/weighted/contains/mean"] == pytest.approx(1 / 2)  # of the two that were graded by it


def _grades(*scores: float | None, **parts: list[float]) -> list[Grade]:
    return [
        Grade(
            score=score,
            grader="g",
            error=None if score is not None else "no",
            parts={name: values[place] for name, values in parts.items()},
        )
        for place, score in enumerate(scores)
    ]


def test_normalising_by_hand() -> None:
    grades = normalise_by_group(
        _grades(1.0, 3.0, 10.0, 10.0, None, 7.0), ["a", "a", "b", "b", "a", "c"], epsilon=0.0 + 1e-9
    )
    # Group a: mean 2, std 1; group b does not vary; the error stays; a group of one gives 0.
    assert [grade.score for grade in grades] == [pytest.approx(-1), pytest.approx(1), 0.0, 0.0, None, 0.0]
    assert grades[0].parts["raw/score"] == 1.0


def test_each_part_weighs_the_same_whatever_its_scale() -> None:
    grades = _grades(0.0, 0.0, 0.0, big=[0.0, 100.0, 50.0], small=[0.0, 0.0, 0.03])
    scores = [g.score for g in normalise_by_group(grades, ["g"] * 3, {"big": 1.0, "small": 2.0}, epsilon=1e-12)]
    # big: mean 50, std 40.82 → ∓1.2247, 0; small: mean 0.01, std 0.01414 → −0.7071, −0.7071, 1.4142.
    assert scores == [
        pytest.approx(-1.2247 - 1.4142, abs=1e-3),
        pytest.approx(1.2247 - 1.4142, abs=1e-3),
        pytest.approx(2.8284, abs=1e-3),
    ]
    with pytest.raises(ConfigError, match="no grade has a part 'nothing'"):
        normalise_by_group(grades, ["g"] * 3, {"nothing": 1.0})


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=8), st.integers(1, 9), st.integers(-3, 3))
def test_normalised_scores_do_not_depend_on_scale_and_shift(scores: list[int], tenths: int, shift: int) -> None:
    groups, scale = ["g"] * len(scores), tenths / 10
    if len(set(scores)) == 1:
        return
    one = normalise_by_group(_grades(*scores), groups, epsilon=0.0)
    other = normalise_by_group(_grades(*(scale * score + shift for score in scores)), groups, epsilon=0.0)
    assert [g.score for g in one] == pytest.approx([g.score for g in other], abs=1e-5)
    assert sum(g.score or 0.0 for g in one) == pytest.approx(0.0, abs=1e-6)
