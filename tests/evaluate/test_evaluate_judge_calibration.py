"""Judges against people: worked numbers, coverage of the corrected score, and real human labels."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.core import EvaluateError
from posttrain.evaluate import (
    JudgeCalibration,
    JudgedAnswer,
    JudgedPair,
    JudgeErrors,
    bias_corrected,
    calibrate_answers,
    calibrate_pairs,
    cohen_kappa,
    pair_agreement,
)

_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "preference"
_VOTES: dict[int, Any] = {0: "tie", 1: "a", 2: "b"}


def errors(tn: int, n0: int, tp: int, n1: int) -> JudgeErrors:
    return JudgeErrors(true_negatives=tn, num_negatives=n0, true_positives=tp, num_positives=n1)


def test_the_corrected_score_of_the_papers_example() -> None:
    # The example of the authors' repository: p = 0.4, n = 1000, q0 = 0.7, q1 = 0.9, m0 = m1 = 200; their interval.
    found = bias_corrected(400, 1000, errors(140, 200, 180, 200))
    assert found.value == pytest.approx(1 / 6)
    assert (found.low, found.high) == pytest.approx((0.05635072, 0.26273303), abs=1e-7)
    found = bias_corrected(186, 300, errors(57, 60, 72, 90), confidence=0.9)
    assert (found.value, found.low, found.high) == pytest.approx((0.76, 0.66916504, 0.86407082), abs=1e-7)


def test_a_perfect_judge_needs_no_correction() -> None:
    assert bias_corrected(30, 100, errors(10**6, 10**6, 10**6, 10**6)).value == pytest.approx(0.3)


@pytest.mark.parametrize(
    "calibration",
    [
        errors(50, 100, 50, 100),  # a coin
        errors(20, 100, 60, 100),  # worse than a coin
        errors(3, 4, 3, 4),  # too few to tell
        errors(0, 100, 100, 100),  # says yes to everything
    ],
)
def test_a_judge_no_better_than_chance_is_refused(calibration: JudgeErrors) -> None:
    with pytest.raises(EvaluateError, match="not shown to be better than chance"):
        bias_corrected(50, 100, calibration)


def test_counts_that_do_not_fit_are_refused() -> None:
    for wrong in (errors(0, 0, 5, 10), errors(5, 10, 11, 10)):
        with pytest.raises(EvaluateError, match="counts"):
            bias_corrected(5, 10, wrong)
    with pytest.raises(EvaluateError, match="no share"):
        bias_corrected(11, 10, errors(90, 100, 90, 100))


@pytest.mark.parametrize(("truth", "q0", "q1"), [(0.1, 0.9, 0.8), (0.95, 0.7, 0.8), (0.05, 0.9, 0.85)])
def test_the_corrected_interval_covers_the_truth_and_the_naive_one_does_not(truth: float, q0: float, q1: float) -> None:
    rng = np.random.default_rng(3)
    n, m, runs = 500, 100, 1000
    covered = naive = 0
    share = truth * q1 + (1 - truth) * (1 - q0)
    for _ in range(runs):
        judged = int(rng.binomial(n, share))
        calibration = errors(int(rng.binomial(m, q0)), m, int(rng.binomial(m, q1)), m)
        found = bias_corrected(judged, n, calibration)
        covered += found.low <= truth <= found.high
        naive += abs(judged / n - truth) <= 1.96 * (judged / n * (1 - judged / n) / n) ** 0.5
    assert covered / runs >= 0.94
    assert naive / runs < 0.8


def pair(
    number: int, votes: str, judge: str | None, order: str = "..", lengths: tuple[int, int] = (1, 1)
) -> JudgedPair:
    names: dict[str, Any] = {"a": "a", "b": "b", "t": "tie", ".": None}
    return JudgedPair(
        id=str(number),
        prompt=f"p{number // 2}",
        votes=tuple(names[vote] for vote in votes),
        judge=None if judge is None else names[judge],
        in_order=names[order[0]],
        swapped=names[order[1]],
        length_a=lengths[0],
        length_b=lengths[1],
    )


def test_pairs_worked_by_hand() -> None:
    pairs = [
        pair(0, "aab", "a", "aa", (9, 1)),
        pair(1, "ttb", "b", "bb", (1, 9)),
        pair(2, "bb", "t", "ab", (9, 1)),
        pair(3, "at", "b", "tb", (1, 9)),
        pair(4, "abt", None),
    ]
    report = calibrate_pairs(pairs, judge="j", data="d")
    values = {name: metric.value for name, metric in report.metrics.items()}
    assert values["human_agreement"] == pytest.approx((1 / 3 + 1 / 3 + 1 + 0 + 0) / 5)
    assert values["human_agreement_decided"] == pytest.approx((1 / 3 + 1 + 0) / 3)  # ttb and at leave one vote each
    assert values["agreement"] == pytest.approx((2 / 3 + 1 / 3 + 0 + 0) / 4)
    assert values["agreement_decided"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # the judge's tie is left out
    assert values["agreement_majority"] == pytest.approx(1 / 3)  # a, tie, b; "at" has none
    assert values["kappa"] == pytest.approx(cohen_kappa(["a", "tie", "b"], ["a", "b", "tie"]))
    assert values["tie_rate"] == 1 / 4
    assert values["human_tie_rate"] == pytest.approx((0 + 2 / 3 + 0 + 1 / 2 + 1 / 3) / 5)
    assert values["flip_rate"] == 1 / 4
    assert values["longer_rate"] == 1.0  # 0, 1 and 3 are decided by both
    assert values["human_longer_rate"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert values["verbosity_bias"] == pytest.approx(1 - 5 / 9)
    assert (report.num_failed, report.num_items, report.num_votes, report.num_prompts) == (1, 5, 13, 3)
    # One flip, in one prompt: there is no interval, and the report says so.
    assert "at least 2" in report.left_out["first_share"]
    assert JudgeCalibration.from_json(report.to_json()) == report


def test_a_judge_that_prefers_the_first_place() -> None:
    pairs = [pair(number, "ab"[number % 2], "t", "ab") for number in range(20)]
    report = calibrate_pairs(pairs)
    assert report.metrics["flip_rate"].value == 1.0
    assert report.metrics["first_share"].value == 1.0
    assert "agreement_decided" in report.left_out


def test_answers_worked_by_hand() -> None:
    rows = [
        ((True, True, False), True),
        ((False, False, False), True),
        ((True,), True),
        ((False, False), False),
        ((True, True), None),
    ]
    answers = [JudgedAnswer(id=str(n), prompt=str(n), votes=v, judge=j) for n, (v, j) in enumerate(rows)]
    report = calibrate_answers(answers)
    values = {name: metric.value for name, metric in report.metrics.items()}
    assert values["agreement"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert (values["agreement_majority"], values["judge_rate"], values["human_rate"]) == (3 / 4, 3 / 4, 2 / 4)
    assert report.errors == errors(1, 2, 2, 2)
    assert (values["specificity"], values["sensitivity"], values["informedness"]) == (0.5, 1.0, 0.5)
    assert values["kappa"] == pytest.approx(cohen_kappa([True, False, True, False], [True, True, True, False]))
    assert report.num_failed == 1


def test_nothing_to_calibrate_on_is_refused() -> None:
    with pytest.raises(EvaluateError, match="no pair has a vote"):
        calibrate_pairs([])
    with pytest.raises(EvaluateError, match="no answer has a vote"):
        calibrate_answers([JudgedAnswer(id="x", prompt="p", votes=(), judge=True)])


def rows_of(name: str) -> list[dict[str, Any]]:
    path = _DATA / name
    if not path.exists():
        pytest.skip(f"no data file {name} beside the repository")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def longer(a: str, b: str) -> Any:
    return "a" if len(a) > len(b) else "b" if len(b) > len(a) else "tie"


def labelled(rows: list[dict[str, Any]], judge: Callable[[str, str], Any]) -> list[JudgedPair]:
    pairs = []
    for number, row in enumerate(rows):
        a, b = (
            str(row[name]) for name in (("response1", "response2") if "response1" in row else ("output_1", "output_2"))
        )
        given = [row[name] for name in sorted(row) if name.startswith("annotator")] or [row["label"]]
        prompt = f"{row.get('instruction', '')}\n{row['input']}"
        votes = tuple(_VOTES[vote] for vote in given)
        pairs.append(
            JudgedPair(id=str(number), prompt=prompt, votes=votes, judge=judge(a, b), length_a=len(a), length_b=len(b))
        )
    return pairs


def test_the_three_annotators_of_pandalm_agree_as_published() -> None:
    # PandaLM (arXiv 2306.05087, section 4) reports Cohen's κ of 0.85, 0.86 and 0.88 between its three annotators.
    rows = rows_of("pandalm_testset_v1.jsonl.gz")
    votes = [[row[f"annotator{n}"] for row in rows] for n in (1, 2, 3)]
    kappas = [cohen_kappa(votes[i], votes[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert kappas == pytest.approx([0.85, 0.86, 0.88], abs=0.005)
    report = calibrate_pairs(labelled(rows, longer), judge="longer", data="pandalm")
    metrics = report.metrics
    assert (report.num_items, report.num_votes, report.num_prompts) == (999, 2997, 170)
    # Our count: two of three annotators, drawn at random, agree on 92.0 % of pairs; on 94.9 % where neither says tie.
    assert metrics["human_agreement"].value == pytest.approx(pair_agreement(list(zip(*votes, strict=True))))
    assert metrics["human_agreement"].value == pytest.approx(0.920, abs=5e-4)
    assert metrics["human_agreement_decided"].value == pytest.approx(0.949, abs=1e-3)
    assert metrics["human_alpha"].value == pytest.approx(0.864, abs=1e-3)
    # The longer answer is a poor judge, far below people, and its bias towards length is found.
    assert metrics["agreement"].high < metrics["human_agreement"].low
    assert metrics["verbosity_bias"].low > 0.2


def test_length_is_half_a_judge_on_mt_bench_and_none_on_llmbar() -> None:
    # MT-Bench's votes are here as one majority label a pair, without ties, so that people cannot be compared among
    # themselves (81 % in arXiv 2306.05685, table 5): a judge can.
    mt_bench = calibrate_pairs(labelled(rows_of("mt_bench_human_200.jsonl.gz"), longer)).metrics
    assert "human_agreement" not in mt_bench
    assert mt_bench["agreement_decided"].low > 0.5
    llmbar = rows_of("llmbar.jsonl.gz")
    hard = calibrate_pairs(labelled([row for row in llmbar if row["subset"].startswith("adv")], longer)).metrics
    assert hard["agreement"].high < 0.5  # made so that the longer, more polished answer is the wrong one
    assert hard["kappa"].high < 0
    oracle = {(row["output_1"], row["output_2"]): _VOTES[row["label"]] for row in llmbar}
    right = calibrate_pairs(labelled(llmbar, lambda a, b: oracle[a, b])).metrics
    assert right["agreement"].value == right["kappa"].value == 1.0
    assert right["verbosity_bias"].value == 0.0
