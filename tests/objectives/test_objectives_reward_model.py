"""Reward objectives with numbers worked by hand, their properties, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives import (
    bradley_terry,
    combine,
    ensemble_reward,
    outcome_loss,
    plackett_luce,
    process_loss,
    ranked_pairs,
    sequence_weights,
)

LOG3, LOG4 = math.log(3.0), math.log(4.0)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# Bradley–Terry


def test_bradley_terry_by_hand() -> None:
    # gaps log 3 and 0: σ = 3/4 and 1/2, losses log 4/3 and log 2; their sum is log 8/3
    chosen_N, rejected_N = tensor(LOG3, 1.0), tensor(0.0, 1.0)
    loss, metrics = bradley_terry(chosen_N, rejected_N, denominator=2)
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2)
    assert combine([metrics]) == pytest.approx(
        {
            "accuracy": 0.5,
            "margin": LOG3 / 2,
            "min_reward": 0.0,
            "mean_reward": (LOG3 + 2) / 4,
            "max_reward": LOG3,
        }
    )
    loss.backward()
    # −(1 − σ) / 2
    assert chosen_N.grad.tolist() == pytest.approx([-1 / 8, -1 / 4])
    assert rejected_N.grad.tolist() == pytest.approx([1 / 8, 1 / 4])


def test_margin_centring_smoothing_and_weights_by_hand() -> None:
    chosen_N, rejected_N = tensor(2 * LOG3), tensor(0.0)
    margin, _ = bradley_terry(chosen_N, rejected_N, denominator=1, margins_N=torch.tensor([LOG3]))
    assert margin.item() == pytest.approx(math.log(4 / 3))
    centred, _ = bradley_terry(tensor(LOG3), tensor(0.0), denominator=1, center=0.01)
    assert centred.item() == pytest.approx(math.log(4 / 3) + 0.01 * LOG3**2)
    # −0.9 log 3/4 − 0.1 log 1/4
    smooth, _ = bradley_terry(tensor(LOG3), tensor(0.0), denominator=1, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * LOG4)
    weighted, metrics = bradley_terry(
        tensor(LOG3, 0.0), tensor(0.0, 0.0), denominator=2, weights_N=torch.tensor([2.0, 0.0])
    )
    assert weighted.item() == pytest.approx(math.log(4 / 3))
    assert combine([metrics])["accuracy"] == 0.5  # metrics are unweighted


def test_only_differences_count_without_centring_and_the_sum_with_it() -> None:
    chosen_N, rejected_N = draw(6, seed=1), draw(6, seed=2)
    plain = [bradley_terry(chosen_N + c, rejected_N + c, denominator=6)[0].item() for c in (0.0, 5.0)]
    assert plain[0] == pytest.approx(plain[1])
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss, _ = bradley_terry(chosen_N + shift, rejected_N + shift, denominator=6, center=0.5)
    loss.backward()
    assert shift.grad.item() == pytest.approx((2 * 0.5 * 2 * (chosen_N + rejected_N).mean()).item())


def test_large_gaps_stay_finite() -> None:
    chosen_N, rejected_N = tensor(1e4, -1e4), tensor(-1e4, 1e4)
    loss, _ = bradley_terry(chosen_N, rejected_N, denominator=2, label_smoothing=0.1)
    loss.backward()
    assert math.isfinite(loss.item())
    assert chosen_N.grad.isfinite().all()


def test_smoothing_has_its_optimum_where_the_model_says_what_the_labels_do() -> None:
    gap = tensor(math.log(0.9 / 0.1))
    loss, _ = bradley_terry(gap, torch.zeros(1, dtype=torch.float64), denominator=1, label_smoothing=0.1)
    loss.backward()
    assert gap.grad.item() == pytest.approx(0.0, abs=1e-12)


# Ranks


def test_ranked_pairs_by_hand() -> None:
    # list 0 holds answers 0, 1, 3 (edited, chosen, rejected), list 1 holds 2 and 4
    better_N, worse_N, weights_N = ranked_pairs(torch.tensor([0, 0, 1, 0, 1]), 2)
    found = list(zip(better_N.tolist(), worse_N.tolist(), weights_N.tolist(), strict=True))
    assert found == [
        (0, 1, pytest.approx(1 / 3)),
        (0, 3, pytest.approx(1 / 3)),
        (1, 3, pytest.approx(1 / 3)),
        (2, 4, 1.0),
    ]


def test_weights_of_pairs_add_up_to_one_per_list() -> None:
    list_S = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    better_N, _, weights_N = ranked_pairs(list_S, 4)
    sums = torch.zeros(4).index_add(0, list_S[better_N], weights_N)
    assert sums.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])  # one answer alone makes no pair


def test_plackett_luce_by_hand() -> None:
    # exp s = 2, 1, 1: P(ranking) = 2/4 · 1/2 = 1/4
    scores_S = tensor(math.log(2.0), 0.0, 0.0)
    loss, metrics = plackett_luce(scores_S, torch.tensor([0, 0, 0]), 1, denominator=1)
    assert loss.item() == pytest.approx(LOG4)
    assert combine([metrics])["accuracy"] == pytest.approx(2 / 3)  # the tie of the last two is wrong
    centred, _ = plackett_luce(scores_S, torch.tensor([0, 0, 0]), 1, denominator=1, center=0.1)
    assert centred.item() == pytest.approx(LOG4 + 0.1 * math.log(2.0) ** 2)


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    chosen_N, rejected_N = draw(5, seed=3), draw(5, seed=4)
    scores_S = torch.stack((chosen_N, rejected_N), 1).flatten()
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs, _ = bradley_terry(chosen_N, rejected_N, denominator=5, weights_N=weights, center=0.02)
    lists, _ = plackett_luce(
        scores_S, torch.arange(5).repeat_interleave(2), 5, denominator=5, weights_L=weights, center=0.02
    )
    torch.testing.assert_close(lists, pairs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, chosen_N)[0] for loss in (lists, pairs)))


def test_probabilities_of_all_rankings_add_up_to_one() -> None:
    import itertools

    scores = draw(4, seed=5).detach()
    total = sum(
        math.exp(-plackett_luce(scores[list(order)], torch.zeros(4, dtype=torch.int64), 1, denominator=1)[0].item())
        for order in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0)


# Labels


def test_outcome_loss_by_hand() -> None:
    # σ(log 3) = 3/4: right → log 4/3, wrong → log 4, half right → (log 4/3 + log 4) / 2
    scores_N = tensor(LOG3, LOG3, LOG3)
    loss, metrics = outcome_loss(scores_N, torch.tensor([1.0, 0.0, 0.5]), denominator=3)
    right, wrong = math.log(4 / 3), LOG4
    assert loss.item() == pytest.approx((right + wrong + (right + wrong) / 2) / 3)
    numbers = combine([metrics])
    assert numbers["accuracy"] == 0.5  # the half-right one has no side
    assert numbers["accuracy/right"] == 1.0
    assert numbers["accuracy/wrong"] == 0.0
    assert numbers["positive_rate"] == pytest.approx(1 / 3)
    loss.backward()
    assert scores_N.grad.tolist() == pytest.approx([-0.25 / 3, 0.75 / 3, 0.25 / 3])  # (σ − y) / 3
    double, _ = outcome_loss(tensor(LOG3, LOG3), torch.tensor([1.0, 0.0]), denominator=1, positive_weight=2.0)
    assert double.item() == pytest.approx(2 * right + wrong)


def test_one_logit_is_a_classifier_of_two() -> None:
    scores_N, labels_N = draw(7, seed=6), torch.tensor([1, 0, 0, 1, 1, 0, 1])
    loss, _ = outcome_loss(scores_N, labels_N, denominator=7)
    two_N2 = torch.stack((torch.zeros_like(scores_N), scores_N), 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(two_N2, labels_N))


def test_process_loss_by_hand() -> None:
    # answer 0: steps right, right, wrong, all seen rightly; answer 1: both right, one of them flagged
    scores_N = tensor(LOG3, LOG3, -LOG3, LOG3, -LOG3)
    labels_N, sequence_N = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    settings = {"sequence_N": sequence_N, "num_sequences": 2}
    loss, metrics = process_loss(scores_N, labels_N, denominator=5, **settings)
    hit, miss = math.log(4 / 3), LOG4
    assert loss.item() == pytest.approx((4 * hit + miss) / 5)
    numbers = combine([metrics])
    assert numbers["accuracy"] == pytest.approx(4 / 5)
    assert numbers["accuracy/wrong"] == 1.0
    assert numbers["solution_accuracy"] == 0.5
    by_answer, _ = process_loss(
        scores_N, labels_N, denominator=2, weights_N=sequence_weights(sequence_N, 2, scores_N), **settings
    )
    assert by_answer.item() == pytest.approx((hit + (hit + miss) / 2) / 2)
    unlabelled, metrics = process_loss(
        scores_N, labels_N, denominator=3, weights_N=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), **settings
    )
    assert unlabelled.item() == pytest.approx(hit)
    assert combine([metrics])["solution_accuracy"] == 1.0  # answer 1 has no labelled step


# Ensembles


def test_ensemble_reward_by_hand() -> None:
    rewards_MN = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    assert ensemble_reward(rewards_MN, "mean").tolist() == [2.0, 2.0]
    assert ensemble_reward(rewards_MN, "worst_case").tolist() == [1.0, 2.0]
    assert ensemble_reward(rewards_MN, "uncertainty", coefficient=0.5).tolist() == [1.5, 2.0]  # variance 1 and 0
    assert ensemble_reward(4 * rewards_MN, "uncertainty", coefficient=0.5).tolist() == [0.0, 8.0]  # variance 16
    assert ensemble_reward(4 * rewards_MN, "lower_bound", coefficient=0.5).tolist() == [6.0, 8.0]
    with pytest.raises(ValueError, match="unknown ensemble 'best'"):
        ensemble_reward(rewards_MN, "best")


def test_the_worst_case_is_never_above_the_mean() -> None:
    rewards_MN = draw(4, 30, seed=7).detach()
    worst, mean = ensemble_reward(rewards_MN, "worst_case"), ensemble_reward(rewards_MN, "mean")
    assert (worst <= mean).all()
    alone = ensemble_reward(rewards_MN[:1], "lower_bound", coefficient=3.0)
    torch.testing.assert_close(alone, rewards_MN[0])  # one model has no spread


# Gradients


def test_gradients_against_finite_differences() -> None:
    chosen_N, rejected_N, margins_N = draw(5, seed=8), draw(5, seed=9), draw(5, seed=10).detach()
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(
            c, r, denominator=3, margins_N=margins_N, center=0.1, label_smoothing=0.2, weights_N=margins_N.abs()
        )[0],
        (chosen_N, rejected_N),
    )
    list_S = torch.tensor([0, 1, 0, 1, 0, 2])
    assert torch.autograd.gradcheck(
        lambda s: plackett_luce(s, list_S, 3, denominator=2, center=0.1)[0], (draw(6, seed=11),)
    )
    labels_N = torch.tensor([0.0, 1.0, 0.3, 0.9, 0.5], dtype=torch.float64)
    sequence_N = torch.tensor([0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(
        lambda s: outcome_loss(s, labels_N, denominator=5, positive_weight=0.4)[0], (draw(5, seed=12),)
    )
    assert torch.autograd.gradcheck(
        lambda s: process_loss(s, labels_N, sequence_N=sequence_N, num_sequences=2, denominator=5)[0],
        (draw(5, seed=13),),
    )
    for how in ("mean", "uncertainty", "lower_bound"):
        assert torch.autograd.gradcheck(lambda r, h=how: ensemble_reward(r, h, coefficient=0.7), (draw(3, 4, seed=14),))


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_is_one_batch(parts: int) -> None:
    chosen_N, rejected_N = draw(6, seed=15), draw(6, seed=16)
    whole = torch.autograd.grad(bradley_terry(chosen_N, rejected_N, denominator=6, center=0.1)[0], chosen_N)[0]
    shares = [
        bradley_terry(c, r, denominator=6, center=0.1)[0]
        for c, r in zip(chosen_N.chunk(parts), rejected_N.chunk(parts), strict=True)
    ]
    torch.testing.assert_close(torch.autograd.grad(sum(shares), chosen_N)[0], whole)
