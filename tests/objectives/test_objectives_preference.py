"""Losses of pairs: numbers worked by hand, properties, gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import objectives as obj
from posttrain.objectives import Pairs

LOG_SIGMOID = {0.5: -0.4740770, -0.5: -0.9740770, 1.0: -0.3132617, -1.0: -1.3132617}
SIGMOID = {0.5: 0.6224593, 1.0: 0.7310586}


def one_pair() -> Pairs:
    """log π: −2 and −5; log π_ref: −3 and −4; so ρ_w = 1, ρ_l = −1, Δ = 2. The answers have 4 and 5 tokens."""
    return Pairs(*(torch.tensor([value], dtype=torch.float64) for value in (-2.0, -5.0, -3.0, -4.0, 4.0, 5.0)))


# Every loss of pairs with settings, for the properties.
LOSSES = {
    "dpo": lambda pairs: obj.dpo_losses(pairs, beta=0.5),
    "cdpo": lambda pairs: obj.dpo_losses(pairs, beta=0.5, label_smoothing=0.1),
    "dpo_norm": lambda pairs: obj.dpo_losses(pairs.per_token(), beta=5.0),
    "robust": lambda pairs: obj.robust_losses(pairs, beta=0.5, label_smoothing=0.2),
    "ipo": lambda pairs: obj.ipo_losses(pairs, tau=0.3),
    "ipo_sum": lambda pairs: obj.ipo_losses(pairs, tau=0.3, per_token=False),
    "hinge": lambda pairs: obj.hinge_losses(pairs, beta=0.01),
    "exo": lambda pairs: obj.exo_losses(pairs, beta=0.5, label_smoothing=0.01),
    "nca": lambda pairs: obj.nca_losses(pairs, beta=0.5),
    "bco_pair": lambda pairs: obj.bco_pair_losses(pairs, beta=0.5),
    "apo_zero": lambda pairs: obj.apo_zero_losses(pairs, beta=0.5),
    "apo_down": lambda pairs: obj.apo_down_losses(pairs, beta=0.5),
    "sppo": lambda pairs: obj.sppo_losses(pairs, beta=0.2),
    "discopop": lambda pairs: obj.discopop_losses(pairs, beta=0.5, tau=0.7),
    "simpo": lambda pairs: obj.simpo_losses(pairs, beta=2.0, gamma=0.5),
    "orpo": obj.orpo_losses,
    "aot": lambda pairs: obj.aot_losses(pairs, beta=0.5, label_smoothing=0.1),
    "aot_unpaired": lambda pairs: obj.aot_unpaired_losses(pairs, beta=0.5),
    "forward_kl": lambda pairs: obj.dpo_losses(obj.f_divergence(pairs, "forward_kl"), beta=0.5),
    "js": lambda pairs: obj.dpo_losses(obj.f_divergence(pairs, "js"), beta=0.5),
    "alpha": lambda pairs: obj.dpo_losses(obj.f_divergence(pairs, "alpha", alpha=0.3), beta=0.5),
}
SORTING = {"aot", "aot_unpaired"}
OF_MARGIN = {"dpo", "cdpo", "robust", "ipo_sum", "hinge", "exo", "discopop"}


def random_pairs(count: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = (
        -torch.rand(count, generator=generator, dtype=dtype) * 8 - 0.5 for _ in range(4)
    )
    tokens = torch.randint(1, 9, (2, count), generator=generator).to(dtype)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, tokens[0], tokens[1])


# Numbers worked by hand


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (lambda p: obj.dpo_losses(p, beta=0.5), -LOG_SIGMOID[1.0]),  # β·Δ = 1
        (lambda p: obj.dpo_losses(p, beta=0.5, label_smoothing=0.1), 0.9 * 0.3132617 + 0.1 * 1.3132617),
        # means over tokens: 1/4 and −1/5, margin 0.45; 5 · 0.45 = 2.25; log(1 + e^−2.25)
        (lambda p: obj.dpo_losses(p.per_token(), beta=5.0), 0.1002066),
        (lambda p: obj.robust_losses(p, beta=0.5, label_smoothing=0.1), (0.9 * 0.3132617 - 0.1 * 1.3132617) / 0.8),
        (lambda p: obj.ipo_losses(p, tau=0.5), (0.45 - 1) ** 2),
        (lambda p: obj.ipo_losses(p, tau=0.25, per_token=False), 0.0),  # Δ = 2 = 1 / (2 · 0.25)
        (lambda p: obj.hinge_losses(p, beta=0.25), 0.5),  # 1 − 0.25 · 2
        (lambda p: obj.hinge_losses(p, beta=1.0), 0.0),
        # SLiC without reference: δ − (−2 + 5) = 4 − 3
        (
            lambda p: obj.hinge_losses(
                Pairs.without_reference(p.chosen_E, p.rejected_E, p.chosen_tokens_E, p.rejected_tokens_E),
                beta=1.0,
                delta=4.0,
            ),
            1.0,
        ),
        # q = σ(1); q (log q − log ¾) + (1 − q)(log(1 − q) − log ¼)
        (
            lambda p: obj.exo_losses(p, beta=0.5, label_smoothing=0.25),
            0.7310586 * (-0.3132617 + 0.2876821) + 0.2689414 * (-1.3132617 + 1.3862944),
        ),
        # r_w = ½, r_l = −½
        (lambda p: obj.nca_losses(p, beta=0.5), 0.4740770 + 0.5 * 0.9740770 + 0.5 * 0.4740770),
        (lambda p: obj.bco_pair_losses(p, beta=0.5), 2 * 0.4740770),
        (lambda p: obj.apo_zero_losses(p, beta=0.5), 2 * (1 - SIGMOID[0.5])),
        (lambda p: obj.apo_down_losses(p, beta=0.5), SIGMOID[0.5] + 1 - SIGMOID[1.0]),
        (lambda p: obj.sppo_losses(p, beta=0.25), 2.0),  # (1 − 2)² + (−1 + 2)²
        (lambda p: obj.sppo_losses(p, beta=0.5), 0.0),
        # m = σ(1); (1 − m) · 0.3132617 + m · e^−1
        (lambda p: obj.discopop_losses(p, beta=0.5, tau=1.0), 0.2689414 * 0.3132617 + 0.7310586 * 0.3678794),
        # 2 · (−2/4 + 5/5) − ½ = ½
        (lambda p: obj.simpo_losses(p, beta=2.0, gamma=0.5), -LOG_SIGMOID[0.5]),
        # p_w = e^−½, p_l = e^−1: odds 1.5414941 and 0.5819767, log of their ratio 0.9740770
        (lambda p: obj.orpo_log_odds(p), 0.9740770),
        (lambda p: obj.orpo_losses(p), math.log1p(math.exp(-0.9740770))),
        (lambda p: obj.nll_losses(p.chosen_E, p.chosen_tokens_E), 0.5),
        (lambda p: obj.nll_losses(p.chosen_E, 1.0), 2.0),
        # f′ of the log-ratios 1 and −1
        (lambda p: obj.f_divergence(p, "forward_kl").margin_E, (1 - math.exp(-1)) - (1 - math.exp(1))),
        (lambda p: obj.f_divergence(p, "js").chosen_E, 0.6931472 - 0.3132617),
        (lambda p: obj.f_divergence(p, "alpha", alpha=0.5).chosen_E, (math.exp(-0.5) - 1) / -0.5),
        (lambda p: obj.f_divergence(p, "alpha", alpha=1.0).margin_E, 2.0),
    ],
)
def test_numbers_worked_by_hand(losses, expected) -> None:
    assert losses(one_pair()).item() == pytest.approx(expected, abs=2e-7)


def test_aot_sorts_across_pairs() -> None:
    zeros, ones = torch.zeros(2), torch.ones(2)
    # policy's differences 0 and 3, reference's 2 and 0; sorted 0, 3 and 0, 2: quantile differences 0 and 1
    pairs = Pairs(torch.tensor([0.0, 3.0]), zeros, torch.tensor([2.0, 0.0]), zeros, ones, ones)
    assert obj.aot_losses(pairs, beta=1.0).tolist() == pytest.approx([math.log(2), 0.3132617])
    # chosen ratios 3 and 1, rejected 2 and 0: sorted 1, 3 and 0, 2
    pairs = Pairs(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]), zeros, zeros, ones, ones)
    assert obj.aot_unpaired_losses(pairs, beta=1.0).tolist() == pytest.approx([0.3132617, 0.3132617])


def test_the_loss_of_a_step_and_its_metrics() -> None:
    pairs = Pairs(
        torch.tensor([-2.0, -4.0]),
        torch.tensor([-5.0, -3.0]),
        torch.tensor([-3.0, -3.0]),
        torch.tensor([-4.0, -4.0]),
        torch.ones(2),
        torch.ones(2),
    )  # log-ratios 1, −1 of the chosen, −1, 1 of the rejected
    losses = torch.tensor([0.5, 1.5])
    loss, metrics = obj.preference_loss(pairs, losses, denominator=4, beta=0.1)
    assert loss.item() == 0.5
    assert obj.combine([metrics]) == pytest.approx(
        {
            "rewards/chosen": 0.0,
            "rewards/rejected": 0.0,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.0,
            "logps/chosen": -3.0,
            "logps/rejected": -4.0,
        }
    )
    weighted, _ = obj.preference_loss(pairs, losses, denominator=2, beta=0.1, weights_E=torch.tensor([2.0, 0.0]))
    assert weighted.item() == 0.5
    with pytest.raises(ValueError, match="empty"):
        obj.preference_loss(Pairs(*[torch.zeros(0)] * 6), torch.zeros(0), denominator=1, beta=0.1)
    with pytest.raises(AssertionError, match="denominator"):
        obj.preference_loss(pairs, losses, denominator=0, beta=0.1)


def test_wpo_weights_by_hand() -> None:
    logprobs, sequence = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([0, 0, 1])
    plain = obj.wpo_weights(logprobs, sequence, 2)
    assert plain.tolist() == pytest.approx([math.exp(-2), math.exp(-2)])
    aligned = obj.wpo_weights(logprobs, sequence, 2, log_collision_N=torch.tensor([-1.0, -1.0, -2.0]))
    assert aligned.tolist() == pytest.approx([math.exp(-1), 1.0])
    assert not obj.wpo_weights(logprobs.requires_grad_(), sequence, 2).requires_grad


def test_weighted_sums_of_losses_are_mpo() -> None:
    pairs = random_pairs()
    nll = obj.nll_losses(pairs.chosen_E, pairs.chosen_tokens_E)
    mixed = 0.8 * obj.dpo_losses(pairs, beta=0.1) + 0.2 * obj.bco_pair_losses(pairs, beta=0.1) + nll
    loss, _ = obj.preference_loss(pairs, mixed, denominator=6, beta=0.1)
    parts = [
        (0.8, obj.dpo_losses(pairs, beta=0.1)),
        (0.2, obj.bco_pair_losses(pairs, beta=0.1)),
        (1.0, -pairs.chosen_E / pairs.chosen_tokens_E),
    ]
    assert loss.item() == pytest.approx(sum(weight * part.mean().item() for weight, part in parts))


# Properties


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_finite_differences(name: str) -> None:
    pairs = random_pairs()

    def loss(chosen_E: torch.Tensor, rejected_E: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](pairs._replace(chosen_E=chosen_E, rejected_E=rejected_E))

    chosen, rejected = pairs.chosen_E.clone().requires_grad_(), pairs.rejected_E.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_permuted_give_losses_permuted(name: str) -> None:
    pairs, order = random_pairs(), [3, 1, 0, 5, 4, 2]
    losses = LOSSES[name](pairs)
    permuted = LOSSES[name](Pairs(*(values[order] for values in pairs)))
    torch.testing.assert_close(permuted, losses if name in SORTING else losses[order])


@pytest.mark.parametrize("name", sorted(OF_MARGIN))
def test_only_the_margin_counts(name: str) -> None:
    pairs = random_pairs()
    moved = pairs._replace(chosen_E=pairs.chosen_E - 1.7, rejected_E=pairs.rejected_E - 1.7)
    torch.testing.assert_close(LOSSES[name](moved), LOSSES[name](pairs))
    both = pairs._replace(chosen_E=pairs.chosen_E - 1.7, ref_chosen_E=pairs.ref_chosen_E - 1.7)
    torch.testing.assert_close(LOSSES[name](both), LOSSES[name](pairs))


def test_at_the_reference_there_is_log_two() -> None:
    pairs = random_pairs()
    same = pairs._replace(chosen_E=pairs.ref_chosen_E, rejected_E=pairs.ref_rejected_E)
    for name in ("dpo", "cdpo", "dpo_norm", "aot", "forward_kl", "js", "alpha"):
        torch.testing.assert_close(LOSSES[name](same), torch.full((6,), math.log(2), dtype=torch.float64), msg=name)
    torch.testing.assert_close(LOSSES["bco_pair"](same), torch.full((6,), 2 * math.log(2), dtype=torch.float64))
    torch.testing.assert_close(LOSSES["discopop"](same), torch.full((6,), 0.5 * math.log(2) + 0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"apo_down"}))
def test_the_first_step_widens_the_margin(name: str) -> None:
    """At the reference the chosen answer rises and the rejected one falls (of APO-down both fall)."""
    pairs = random_pairs(seed=1)
    chosen, rejected = pairs.ref_chosen_E.clone().requires_grad_(), pairs.ref_rejected_E.clone().requires_grad_()
    LOSSES[name](pairs._replace(chosen_E=chosen, rejected_E=rejected)).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


@given(st.floats(-20, 20), st.floats(0.01, 0.45))
def test_robust_dpo_is_unbiased_under_flips(margin: float, flips: float) -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    right = Pairs(zero + margin, zero, zero, zero, one, one)
    flipped = Pairs(zero, zero + margin, zero, zero, one, one)
    mean = (1 - flips) * obj.robust_losses(right, beta=1.0, label_smoothing=flips) + flips * obj.robust_losses(
        flipped, beta=1.0, label_smoothing=flips
    )
    torch.testing.assert_close(mean, obj.dpo_losses(right, beta=1.0))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"discopop"}))  # an exponential: the trainer refuses its infinity
def test_far_from_the_reference_nothing_overflows(name: str) -> None:
    far = Pairs(
        *(torch.tensor(values) for values in ([-1e4, -1e-8], [-1e-8, -1e4], [-1.0, -1.0], [-1.0, -1.0])),
        torch.ones(2),
        torch.ones(2),
    )
    chosen, rejected = far.chosen_E.clone().requires_grad_(), far.rejected_E.clone().requires_grad_()
    loss = LOSSES[name](far._replace(chosen_E=chosen, rejected_E=rejected)).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    if name not in ("forward_kl", "alpha"):  # whose scores are themselves exponentials, clamped
        assert chosen.grad.isfinite().all()
        assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_impossible_label_smoothing_is_refused(smoothing: float) -> None:
    for losses in (obj.dpo_losses, obj.robust_losses, obj.aot_losses, obj.exo_losses):
        with pytest.raises(AssertionError, match="label smoothing"):
            losses(one_pair(), beta=0.1, label_smoothing=smoothing)
    with pytest.raises(AssertionError, match="label smoothing"):
        obj.exo_losses(one_pair(), beta=0.1, label_smoothing=0.0)


# Single answers

RATIO, LABEL = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)


def test_kto_by_hand() -> None:
    # good: 2 · (1 − σ(1 − ½)); bad: 1 − σ(½ + 1)
    loss, metrics = obj.kto(RATIO, LABEL, kl=0.5, denominator=2, beta=1.0, desirable_weight=2.0)
    assert loss.item() == pytest.approx((2 * 0.3775407 + 0.1824255) / 2, abs=1e-7)
    assert obj.combine([metrics]) == {"rewards/chosen": 1.0, "rewards/rejected": -1.0, "kl": 0.5}
    weighted, _ = obj.kto(RATIO, LABEL, kl=0.5, denominator=1, beta=1.0, weights_E=torch.tensor([0.0, 3.0]))
    assert weighted.item() == pytest.approx(3 * 0.1824255, abs=1e-6)


def test_kl_baseline_by_hand() -> None:
    assert obj.kl_baseline(torch.tensor([1.0, 2.0])).item() == 1.5
    assert obj.kl_baseline(torch.tensor([1.0, -2.0])).item() == 0.0, "a KL is never below 0"
    for bad in (torch.zeros(0), torch.tensor([math.nan]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="finite"):
            obj.kl_baseline(bad)


def test_bco_by_hand() -> None:
    # good: − log σ(1 − ½); bad: − log σ(1 + ½) = log(1 + e^−1.5)
    loss, metrics = obj.bco(RATIO, LABEL, reward_shift=0.5, denominator=2, beta=1.0)
    assert loss.item() == pytest.approx((0.4740770 + 0.2014133) / 2, abs=1e-7)
    assert obj.combine([metrics])["delta"] == 0.5
    rewards, labels = torch.tensor([1.0, 3.0, -1.0]), torch.tensor([1.0, 1.0, 0.0])
    assert obj.bco_shift(rewards, labels).item() == 0.5  # (2 − 1) / 2
    assert obj.bco_shift(rewards[:2], labels[:2]).item() == 2.0
    with pytest.raises(ValueError, match="finite"):
        obj.bco_shift(torch.tensor([math.nan]), torch.ones(1))


def test_bco_running_shift_by_hand() -> None:
    """The mean of 1, 3, −1 is 1; with −2 of the next step, which has one answer only, (1 · 3 − 2) / 4 = ¼."""
    shift, count = obj.bco_running_shift(torch.tensor([1.0, 3.0, -1.0]))
    assert (shift, count) == (1.0, 3.0)
    assert obj.bco_running_shift(torch.tensor([-2.0]), shift=shift, count=count) == (0.25, 4.0)
    for bad in (torch.tensor([]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="finite"):
            obj.bco_running_shift(bad)


@settings(max_examples=30)
@given(steps=st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), min_size=1, max_size=6))
def test_bco_running_shift_is_the_mean_of_all_rewards_so_far(steps: list[list[float]]) -> None:
    shift, count = 0.0, 0.0
    for step in steps:
        shift, count = obj.bco_running_shift(torch.tensor(step), shift=shift, count=count)
    flat = [value for step in steps for value in step]
    assert count == len(flat)
    assert shift == pytest.approx(sum(flat) / len(flat), abs=1e-6)


def test_apo_zero_unpaired_by_hand() -> None:
    loss, metrics = obj.apo_zero_unpaired(RATIO, LABEL, denominator=2, beta=1.0)
    assert loss.item() == pytest.approx(0.2689414, abs=1e-7)
    assert "kl" not in metrics
    pairs = one_pair()  # of the same ratios
    assert loss.item() * 2 == pytest.approx(obj.apo_zero_losses(pairs, beta=1.0).item())


@pytest.mark.parametrize(
    "loss",
    [
        lambda ratio, label: obj.kto(ratio, label, kl=0.3, denominator=5, beta=0.5, undesirable_weight=1.5)[0],
        lambda ratio, label: obj.bco(ratio, label, reward_shift=0.2, denominator=5, beta=0.5)[0],
        lambda ratio, label: obj.apo_zero_unpaired(ratio, label, denominator=5, beta=0.5)[0],
    ],
)
def test_gradient_of_single_answers(loss) -> None:
    ratio = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: loss(r, label), (ratio,))
    loss(ratio, label).backward()
    assert ((ratio.grad < 0) == (label > 0.5)).all(), "good answers rise, bad ones fall"


def test_single_answers_refuse_nothing_and_misfits() -> None:
    with pytest.raises(ValueError, match="empty"):
        obj.kto(torch.zeros(0), torch.zeros(0), kl=0.0, denominator=1)
    with pytest.raises(AssertionError, match="label_E"):
        obj.bco(RATIO, LABEL[:1], reward_shift=0.0, denominator=1)
