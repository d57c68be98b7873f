"""Credit, variants and minibatches of the reinforcement learning loop, by hand."""

from __future__ import annotations

import math

import pytest

from posttrain.core import ConfigError, Example, Grade, StopReason, TokenSequence
from posttrain.recipes.rl_credit import advantages_of, rewards_of, spent_on
from posttrain.recipes.rl_learner import merged, minibatches
from posttrain.recipes.rl_settings import VARIANTS, Grpo, with_variant

BASE = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "max_tokens": 4, "lr": 1e-3}


def settings(**changes: object) -> Grpo:
    return Grpo.from_dict({**BASE, **changes})


def grades(*scores: float | None, parts: list[dict[str, float]] | None = None) -> list[Grade]:
    return [
        Grade(
            score=score,
            grader="toy",
            parts=parts[place] if parts else {},
            error=None if score is not None else "crashed",
        )
        for place, score in enumerate(scores)
    ]


# Variants


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_of_a_variant_can_be_overridden(name: str) -> None:
    plain = with_variant(name, BASE)
    for field, value in VARIANTS[name].items():
        assert getattr(plain, field) == value
    changed = with_variant(name, {**BASE, "normalise": "group", "clip_high": 0.5, "minibatches": 2, "keep_zero": False})
    assert (changed.normalise, changed.clip_high, changed.minibatches) == ("group", 0.5, 2)
    assert not changed.keep_zero


def test_what_a_variant_does_not_say_is_as_ever() -> None:
    assert with_variant(None, BASE) == settings()
    assert with_variant("dapo", {**BASE, "max_tokens": 20_480}).over_long_buffer == 4096
    assert with_variant("dapo", {**BASE, "over_long_buffer": 0}).over_long_buffer == 0
    assert with_variant(None, {**BASE, "importance_cap": 0}).importance_cap is None
    assert with_variant(None, {**BASE, "model": "somewhere", "seed": None}).seed == 0
    with pytest.raises(ConfigError, match="no variant 'grop'"):
        with_variant("grop", BASE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_in_reward": True}, "beta above 0"),
        ({"over_long_buffer": 5}, "more than max_tokens"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"curriculum_low": 0.95}, "curriculum_low"),
        ({"advantage": "max_rl", "eos_penalty": 0.5}, "takes no penalties"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


# Advantages


def test_each_way_to_compare_by_hand(make_group) -> None:
    groups = [make_group("a", ["x", "y"]), make_group("b", ["x", "y"])]
    scores = grades(1.0, 0.0, 3.0, 2.0)
    root = math.sqrt(1.25)  # of 1, 0, 3, 2 over n: mean 1.5

    def found(advantage: str) -> list[float]:
        return [value for row in advantages_of(groups, scores, settings(advantage=advantage)) for value in row]

    assert found("rloo") == [1.0, -1.0, 1.0, -1.0]
    assert found("reinforce") == [-0.5, -1.5, 1.5, 0.5]
    assert found("reinforce_pp") == pytest.approx([-0.5 / root, -1.5 / root, 1.5 / root, 0.5 / root])
    assert found("reinforce_pp_baseline") == pytest.approx([1.0, -1.0, 1.0, -1.0])
    assert found("max_rl") == pytest.approx([1.0, -1.0, 0.2, -0.2])
    spread = math.sqrt(5 / 3) + 1e-4  # over n − 1
    assert found("group_batch_std") == pytest.approx([0.5 / spread, -0.5 / spread] * 2)


def test_several_rewards_are_normalised_apart(make_group) -> None:
    groups = [make_group("a", ["x", "y"]), make_group("b", ["x", "y"])]
    parts = [{"form": f, "sense": s} for f, s in [(1.0, 0.0), (0.0, 9.0), (1.0, 9.0), (0.0, 0.0)]]
    found = advantages_of(groups, grades(1, 9, 10, 0, parts=parts), settings(advantage="decoupled"))
    # In group a the rewards, scaled alike, cancel; in b they add up.
    assert found[0] == pytest.approx([0.0, 0.0], abs=1e-3)
    assert found[1][0] == pytest.approx(-found[1][1])
    assert found[1][0] > 0.5
    with pytest.raises(ConfigError, match="same named parts"):
        advantages_of(groups, grades(1, 0, 1, 0), settings(advantage="decoupled"))


def test_penalties_by_hand(make_group) -> None:
    group = make_group("a", ["x", "y"])
    first, second = group.trajectories
    group = group.replace(trajectories=(first, second.replace(stop_reason=StopReason.LENGTH)))
    config = settings(eos_penalty=0.5, over_long_buffer=3)
    # two tokens each of at most four: free up to 1, so −1/3 for both, and −½ for the one without an end
    found = rewards_of([group], grades(1.0, 1.0), config)
    assert found.flatten().tolist() == pytest.approx([2 / 3, 1 / 6])
    assert rewards_of([group], grades(None, 1.0), config).isnan().tolist() == [[True, False]]


def test_kl_in_the_reward_by_hand(make_group) -> None:
    groups = [make_group("a", ["x", "y"]), make_group("b", ["x", None])]
    scores = grades(1.0, 1.0, 2.0, None)
    token_kl = {"a/0/0": (0.0, 1.0, 1.0), "a/0/1": (0.0, 0.0, 0.0), "b/0/0": (0.0, 4.0, 0.0)}
    config = settings(advantage="rloo", kl_in_reward=True, beta=0.5)
    # rewards 1 − 0.5 · 2 = 0 and 1: leave-one-out ∓1; b has one answer alone
    assert advantages_of(groups, scores, config, token_kl=token_kl) == [[-1.0, 1.0], [0.0, None]]

    config = settings(advantage="reinforce_pp", kl_in_reward=True, beta=0.5)
    found = advantages_of(groups, scores, config, token_kl=token_kl)
    # what is to come: a0: −0.5 − 0.5 + 1 = 0, −0.5 + 1 = 0.5; a1: 1, 1; b0: −2 + 2 = 0, 2. Mean 0.75, variance
    # (0.5625 · 2 + 0.0625 · 3 + 1.5625) / 6 = 2.875 / 6
    values, spread = [0.0, 0.5, 1.0, 1.0, 0.0, 2.0], math.sqrt(2.875 / 6)
    expected = [(value - 0.75) / spread for value in values]
    tokens = [value for row in (found[0][0], found[0][1], found[1][0]) for value in row[1:]]
    assert tokens == pytest.approx(expected)
    assert [row[0] for row in (found[0][0], found[0][1], found[1][0])] == [0.0, 0.0, 0.0]  # the prompt's token
    assert found[1][1] is None


def test_what_was_spent_is_read_off_the_columns() -> None:
    sequence = TokenSequence(
        tokens=(5, 6, 7),
        mask=(False, True, True),
        columns={"old_logprobs": (0.0, -1.0, -2.0), "ref_logprobs": (0.0, -1.5, -1.0)},
    )
    found = spent_on([Example(id="a", sequences=(sequence,))], settings(kl_estimator="k1"))
    assert found["a"] == pytest.approx([0.0, 0.5, -1.0])


# Updates


def test_minibatches_keep_siblings_together_and_lose_nothing() -> None:
    sequence = TokenSequence(tokens=(1, 2), mask=(False, True))
    examples = [Example(id=f"{g}-{i}", sequences=(sequence,), group=f"g{g}") for g in range(5) for i in range(3)]
    parts = minibatches(examples, 2, seed=0, step=3, epoch=0)
    assert [len(part) for part in parts] in ([6, 9], [9, 6])
    assert sorted(example.id for part in parts for example in part) == sorted(example.id for example in examples)
    assert not {example.group for example in parts[0]} & {example.group for example in parts[1]}
    assert parts == minibatches(examples, 2, seed=0, step=3, epoch=0)
    assert parts != minibatches(examples, 2, seed=0, step=3, epoch=1)
    assert minibatches(examples, 1, seed=0, step=3, epoch=0) == [examples]
    assert len(minibatches(examples, 16, seed=0, step=0, epoch=0)) == 5  # no more parts than groups


def test_metrics_of_several_updates() -> None:
    found = merged(
        [
            {"loss": 1.0, "lr": 0.2, "num_tokens": 5.0, "num_targets": 2.0, "ratio/max": 3.0, "ratio/min": 0.5},
            {"loss": 3.0, "lr": 0.1, "num_tokens": 9.0, "num_targets": 3.0, "ratio/max": 2.0, "ratio/min": 0.7},
        ]
    )
    assert found == {
        "loss": 2.0,
        "lr": 0.1,
        "num_tokens": 9.0,
        "num_targets": 5.0,
        "ratio/max": 3.0,
        "ratio/min": 0.5,
        "num_updates": 2.0,
    }
