"""Reward models as graders: aggregation, failures as data, deadlines, ensembles, proofs, running moments."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Sequence

import pytest

from posttrain.core import ConfigError, Grader, Message, Task, assistant, user
from posttrain.grade import EnsembleScorer, Moments, RewardModel, grade_all, prove, trajectory_from_text
from posttrain.grade.reward_model import ensemble_score

TASK = Task(id="t", prompt="How much is 2 + 2?")


class Scripted:
    """A scorer that says what it is told, and remembers what it was asked."""

    def __init__(self, scores: dict[str, tuple[float, ...] | Exception], delay_s: float = 0.0) -> None:
        self.scores = scores
        self.delay_s = delay_s
        self.asked: list[tuple[Task, str]] = []

    async def score(self, items: Sequence[tuple[Task, str]]) -> list[tuple[float, ...] | Exception]:
        await asyncio.sleep(self.delay_s)
        self.asked += items
        return [self.scores[text] for _, text in items]


def grade(grader: Grader, text: str):
    return asyncio.run(grader.grade(trajectory_from_text(TASK, text)))


STEPS = Scripted({"steps": (math.log(3.0), 0.0, math.log(3.0)), "one": (2.0,)})


@pytest.mark.parametrize(
    ("aggregate", "probability", "expected"),
    [
        ("last", False, math.log(3.0)),
        ("min", False, 0.0),
        ("mean", False, 2 * math.log(3.0) / 3),
        ("last", True, 0.75),
        ("min", True, 0.5),
        ("product", True, 0.75 * 0.5 * 0.75),
        ("mean", True, 2 / 3),
    ],
)
def test_aggregates_by_hand(aggregate, probability, expected):
    grader = RewardModel(STEPS, aggregate=aggregate, probability=probability)
    found = grade(grader, "steps")
    assert found.score == pytest.approx(expected)
    assert found.parts["steps"] == 3.0
    assert grade(grader, "one").score == pytest.approx(1 / (1 + math.exp(-2)) if probability else 2.0)
    assert grade(grader, "one").parts == {}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="a product is of probabilities"):
        RewardModel(STEPS, aggregate="product")
    with pytest.raises(ConfigError, match="aggregate must be"):
        RewardModel(STEPS, aggregate="best")
    with pytest.raises(ConfigError, match="deadline_s"):
        RewardModel(STEPS, deadline_s=0)
    with pytest.raises(ConfigError, match="at least one"):
        EnsembleScorer([])
    with pytest.raises(ConfigError, match="an ensemble is mean"):
        EnsembleScorer([STEPS], "median")


def test_adjusting_comes_last_and_keeps_the_raw_number():
    moments = Moments().updated([0.0, 2.0, 4.0])  # mean 2, standard deviation 2
    found = grade(RewardModel(STEPS, adjust=moments.whiten), "one")
    assert found.score == 0.0
    assert found.parts["raw"] == 2.0


def test_failures_are_data():
    scorer = Scripted({"long": ValueError("too long"), "nan": (math.nan,), "none": (), "fine": (1.0,)})
    grades = [grade(RewardModel(scorer), text) for text in scorer.scores]
    assert [each.score for each in grades] == [None, None, None, 1.0]
    assert "ValueError: too long" in grades[0].error
    assert "nan" in grades[1].error


def test_a_deadline_is_a_grade_with_an_error():
    slow = RewardModel(Scripted({"x": (1.0,)}, delay_s=5.0), deadline_s=0.02)
    assert "no score within 0.02 s" in grade(slow, "x").error
    (found,) = asyncio.run(
        grade_all(RewardModel(Scripted({"x": (1.0,)}, delay_s=5.0)), [trajectory_from_text(TASK, "x")], deadline_s=0.02)
    )
    assert found.score is None


def test_the_last_turn_of_an_episode_answers_all_before_it():
    scorer = Scripted({"four": (1.0,)})
    opening = (user("2 + 2?"),)
    turns = (*opening, assistant("?"), Message(role="user", content="in words"), assistant("four"))
    trajectory = trajectory_from_text(Task(id="t", prompt=opening), "four").replace(messages=turns)
    asyncio.run(RewardModel(scorer).grade(trajectory))
    task, answer = scorer.asked[0]
    assert answer == "four"
    assert task.prompt == turns[:-1]
    asyncio.run(RewardModel(scorer).grade(trajectory.replace(messages=(*opening, assistant("four")))))
    assert scorer.asked[1][0].prompt == opening


def test_it_proves_that_gold_scores_above_its_near_miss():
    scorer = Scripted({"4": (7.0,), "5": (6.5,)})
    assert prove(RewardModel(scorer, better=[(TASK, "4", "5")])).ok
    wrong = prove(RewardModel(scorer, better=[(TASK, "5", "4")]))
    assert len(wrong.problems) == 2
    assert "6.5 against 7" in wrong.parts[0].cases[0].grade.rationale
    assert not prove(
        RewardModel(Scripted({"4": (1.0,), "5": (1.0,)}), better=[(TASK, "4", "5")])
    ).ok  # a tie proves nothing
    assert "has no cases" in prove(RewardModel(scorer)).problems[0]
    failing = prove(RewardModel(Scripted({"4": ValueError("no"), "5": (1.0,)}), better=[(TASK, "4", "5")]))
    assert not failing.ok


@pytest.mark.parametrize(
    ("how", "coefficient", "expected"),
    [("mean", 1.0, 2.0), ("worst_case", 1.0, 0.0), ("uncertainty", 0.5, 2.0 - 0.5 * 4.0), ("lower_bound", 0.5, 1.0)],
)
def test_ensembles_by_hand(how, coefficient, expected):
    assert ensemble_score([0.0, 4.0], how, coefficient) == pytest.approx(expected)
    members = [Scripted({"a": (0.0, 1.0)}), Scripted({"a": (4.0, 1.0)})]
    (found,) = asyncio.run(EnsembleScorer(members, how, coefficient=coefficient).score([(TASK, "a")]))
    assert found == pytest.approx((expected, 1.0))


def test_ensembles_agree_with_the_objective():
    torch = pytest.importorskip("torch")
    from posttrain.objectives import ensemble_reward

    rng = random.Random(0)
    values = [[rng.gauss(0, 2) for _ in range(6)] for _ in range(4)]
    for how in ("mean", "worst_case", "uncertainty", "lower_bound"):
        theirs = ensemble_reward(torch.tensor(values, dtype=torch.float64), how, coefficient=0.7).tolist()
        assert [ensemble_score(column, how, 0.7) for column in zip(*values, strict=True)] == pytest.approx(theirs)


def test_a_member_that_fails_fails_the_whole():
    members = [Scripted({"a": (1.0,), "b": (1.0,)}), Scripted({"a": ValueError("no"), "b": (1.0, 2.0)})]
    found = asyncio.run(EnsembleScorer(members).score([(TASK, "a"), (TASK, "b")]))
    assert isinstance(found[0], ValueError)
    assert "see [1, 2] steps" in str(found[1])


# Running moments


def test_moments_by_hand():
    moments = Moments().updated([1.0, 3.0]).updated([5.0])
    assert (moments.count, moments.mean, moments.std) == (3, 3.0, 2.0)
    assert moments.whiten(7.0) == 2.0
    assert moments.whiten(7.0, shift=False) == 3.5
    assert moments.whiten(1e9, clip=10.0) == 10.0
    assert moments.whiten(-1e9, clip=10.0) == -10.0
    assert Moments().whiten(7.0) == 7.0
    assert Moments().updated([4.0, 4.0]).whiten(5.0) == 1.0  # no spread: unscaled
    assert moments.updated([]) is moments
    assert moments.updated([math.nan, math.inf]) is moments


def test_moments_do_not_depend_on_the_batches():
    rng = random.Random(1)
    values = [rng.gauss(1e6, 1e-3) for _ in range(500)]  # where the naive formula loses every digit
    whole, parts = Moments().updated(values), Moments()
    while values[parts.count :]:
        parts = parts.updated(values[parts.count : parts.count + rng.randint(1, 40)])
    assert parts.count == 500
    assert parts.mean == pytest.approx(statistics.fmean(values), rel=1e-14)
    assert parts.std == pytest.approx(statistics.stdev(values), rel=1e-6)
    assert whole.std == pytest.approx(parts.std, rel=1e-6)


def test_moments_come_back_to_the_last_bit():
    rng = random.Random(2)
    moments = Moments().updated([rng.gauss(0, 1) for _ in range(33)])
    back = Moments.from_json(moments.to_json())
    more = [rng.gauss(0, 1) for _ in range(7)]
    assert back == moments
    assert back.updated(more) == moments.updated(more)
