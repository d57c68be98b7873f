from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from posttrain.core import ConfigError, Grade, GradeError, Task
from posttrain.grade import Number, boxed, numbers_in, trajectory_from_text

GradeText = Callable[..., Grade]
Rows = Callable[[str], list[dict[str, Any]]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", ["72"]),
        ("It is 72.", ["72"]),
        ("$1,234,567.50 in total", ["1234567.5"]),
        ("-$5 and $-6 and −7", ["-5", "-6", "-7"]),
        ("10-5", ["10", "5"]),
        ("10 - 5 = 5", ["10", "5", "5"]),
        ("x-5", ["5"]),
        ("50%", ["50"]),
        ("50\\%", ["50"]),
        (".5 and 0.50", ["1/2", "1/2"]),
        ("and so...5", ["5"]),
        ("3/4 and 1 1/2", ["3/4", "3/2"]),
        ("\\frac{3}{4} \\dfrac12 -\\frac{1}{3} 2\\frac{1}{2}", ["3/4", "1/2", "-1/3", "5/2"]),
        ("1.5e3, 2E-2", ["1500", "1/50"]),
        ("1.5 \\times 10^{3}", ["1500"]),
        ("72 m^2 of H2O", ["72"]),
        ("18\\text{ cm}", ["18"]),
        ("1{,}000 and 1\\,000 and 32,\\!348", ["1000", "1000", "32348"]),
        ("**72** and `8`", ["72", "8"]),
        ("3, 4", ["3", "4"]),
        ("2020,300", ["2020", "300"]),
        ("1/0", []),
        ("v1.2.3", []),
        ("no numbers", []),
        ("90^\\circ", ["90"]),
        ("Answer:\\$18", ["18"]),
    ],
)
def test_numbers_by_hand(text: str, expected: list[str]) -> None:
    assert numbers_in(text) == [Fraction(number) for number in expected]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{3}", "3"),
        ("\\boxed{\\frac{1}{2}} or \\boxed {x_{1}}.", "x_{1}"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\fbox{7}", "7"),
        ("nothing {here}", None),
    ],
)
def test_boxed_by_hand(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("extract", "text", "score"),
    [
        ("last", "6 x 12 = 72", 1),
        ("last", "72 is it, out of 100", 0),
        ("last", "#### 72\n", 1),
        ("####", "1 #### 7 #### 72 apples, of 80", 1),
        ("####", "72", 0),
        ("####", "72 ####", 0),
        ("####", "#### \n 72", 1),
        ("####", "#### none\n72", 0),
        ("boxed", "\\boxed{72}, not 80", 1),
        ("boxed", "72", 0),
        ("boxed", "\\boxed{}", 0),
    ],
)
def test_number_reads_the_place_it_is_told(grade_text: GradeText, extract: Any, text: str, score: float) -> None:
    assert grade_text(Number(extract=extract), text, "72").score == score


def test_whole_numbers_are_exact_and_others_close(grade_text: GradeText) -> None:
    assert grade_text(Number(), "10000001", "10000000").score == 0
    assert grade_text(Number(), "0.3333333", "1/3").score == 1
    assert grade_text(Number(), "0.33", "1/3").score == 0
    assert grade_text(Number(tolerance=0.01), "101", "100").score == 1
    assert grade_text(Number(tolerance=0.01), "102", "100").score == 0
    assert grade_text(Number(tolerance=0), "0.3333333", "1/3").score == 0


def test_a_gold_answer_without_one_number_is_an_error(grade_text: GradeText) -> None:
    for gold in ("many", "3 and 4", "#### "):
        with pytest.raises(GradeError, match="numbers; Number needs one"):
            grade_text(Number(), "3", gold)


def test_number_refuses_settings_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="extract"):
        Number(extract="first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tolerance"):
        Number(tolerance=-1)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 50_000,
        "1e999999999",
        "1" + ",111" * 12_000 + "1",
        "1 " * 25_000,
        "\\boxed{" * 7_000 + "1",
        "{" * 50_000,
        "\\frac{" * 8_000,
        "\\text{" * 8_000,
        "-" * 50_000 + "1",
        "$ " * 25_000,
        "1/" * 25_000,
        "." * 50_000,
        "**" * 25_000,
        "1.5 \\times 10^{" * 3_000,
        " " * 50_000,
    ],
)
def test_hostile_texts_take_no_time(text: str) -> None:
    started_s = time.thread_time()
    numbers_in(text)
    boxed(text)
    assert time.thread_time() - started_s < 1.0


async def _scores(grader: Number, pairs: list[tuple[str, str]]) -> list[float | None]:
    task = Task(id="t", prompt="?")
    return [(await grader.grade(trajectory_from_text(task.replace(answer=gold), text))).score for gold, text in pairs]


@pytest.mark.parametrize(
    "name", [pytest.param("math/gsm8k_train.jsonl.gz", marks=pytest.mark.slow), "math/gsm8k_test.jsonl.gz"]
)
def test_every_gsm8k_gold_solution_is_right_and_near_misses_are_wrong(data_rows: Rows, name: str) -> None:
    rows = data_rows(name)
    golds = [row["answer"] for row in rows]
    near = []
    for gold in golds:
        number = gold.rpartition("####")[2].strip()
        value = numbers_in(number)[0]
        near += [(gold, f"#### {value + 1}"), (gold, f"#### {-value - 1}"), (gold, gold.rpartition("####")[0] + "####")]
    assert set(asyncio.run(_scores(Number(extract="####"), [(gold, gold) for gold in golds]))) == {1.0}
    assert set(asyncio.run(_scores(Number(), [(gold, gold) for gold in golds]))) == {1.0}
    assert set(asyncio.run(_scores(Number(extract="####"), near))) == {0.0}


def test_number_agrees_with_the_labels_of_sampled_solutions(data_rows: Rows) -> None:
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    pairs, labels = [], []
    for row in data_rows("math/gsm8k_example_model_solutions.jsonl.gz"):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for model in models:
            pairs.append((gold, row[model]["solution"]))
            labels.append(float(row[model]["is_correct"]))
    scores = asyncio.run(_scores(Number(), pairs))
    assert len(scores) == 4220
    assert 0.2 < sum(labels) / len(labels) < 0.8  # both labels are common
    assert scores == labels
