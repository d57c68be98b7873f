"""The surrogates beside the clipped one, weights for stale samples, entropy: numbers worked by hand, and properties."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from posttrain.objectives import (
    active_entropy_coef,
    adapt_entropy_coef,
    bounded_importance_weights,
    cispo_surrogate,
    combine,
    entropy_bonus,
    high_entropy_mask,
    kl_penalty,
    policy_ratio,
    policy_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
    stale_sequence_mask,
    stale_version_mask,
    vespo_surrogate,
)

LOG2 = math.log(2.0)
SEQUENCES = torch.tensor([0, 0, 1])
SURROGATES = {
    "clip": policy_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
    "vespo": vespo_surrogate,
    "reinforce": reinforce_surrogate,
}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_and_gradient(surrogate, logprobs, old, advantages, **options):
    options = {"denominator": 1.0, "sequence_N": torch.zeros(len(logprobs), dtype=torch.int64)} | options
    options.setdefault("num_sequences", int(options["sequence_N"].max()) + 1)
    options.setdefault("level", "token")
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = surrogate(logprobs, old, advantages, **options)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), grad, combine([metrics])


# Ratios


def test_ratio_levels_by_hand():
    # Answer 0: log-ratios log 4 and 0; answer 1: −log 2.
    logprobs, old = tensor(2 * LOG2, 0, -LOG2), tensor(0, 0, 0)

    def ratio(level):
        return policy_ratio(logprobs, old, SEQUENCES, 2, level).tolist()

    assert ratio("token") == pytest.approx([4.0, 1.0, 0.5])
    assert ratio("sequence") == pytest.approx([2.0, 2.0, 0.5])  # geometric means
    assert ratio("sequence_token") == pytest.approx([2.0, 2.0, 0.5])
    assert ratio("sequence_product") == pytest.approx([4.0, 4.0, 0.5])
    with pytest.raises(ValueError, match="needs sequence_N"):
        policy_ratio(logprobs, old, level="sequence")


def test_gspo_token_has_gspos_value_and_each_tokens_own_gradient():
    logprobs, old = tensor(2 * LOG2, 0, -LOG2), tensor(0, 0, 0)
    options = {"sequence_N": SEQUENCES, "num_sequences": 2, "clip_low": 9.0, "clip_high": 9.0}
    surrogate = partial(policy_surrogate, **{k: v for k, v in options.items() if k.startswith("clip")})
    equal = tensor(-1, -1, -1)
    whole = loss_and_gradient(surrogate, logprobs, old, equal, sequence_N=SEQUENCES, level="sequence")
    token = loss_and_gradient(surrogate, logprobs, old, equal, sequence_N=SEQUENCES, level="sequence_token")
    assert token[0] == pytest.approx(whole[0])
    torch.testing.assert_close(token[1], whole[1])  # with one advantage per answer they are the same (section 4.3)
    # With advantages of their own: 2 · A_t for the first answer's tokens, ½ · A for the second's.
    own = loss_and_gradient(surrogate, logprobs, old, tensor(-1, -3, -1), sequence_N=SEQUENCES, level="sequence_token")
    assert own[1].tolist() == pytest.approx([2.0, 6.0, 0.5])


def test_product_ratio_is_one_action_by_hand():
    # Answer 0 as one action: ratio 4, advantage −1, so −(−4); its gradient −A · r = 4 at each of its two tokens, halved
    # by the weights 1/length. Answer 1: ratio ½, advantage 1, unclipped: −½.
    loss, grad, _ = loss_and_gradient(
        policy_surrogate,
        tensor(2 * LOG2, 0, -LOG2),
        tensor(0, 0, 0),
        tensor(-1, -1, 1),
        sequence_N=SEQUENCES,
        level="sequence_product",
        weights_N=tensor(0.5, 0.5, 1),
        denominator=2.0,
    )
    assert loss == pytest.approx((4 - 0.5) / 2)
    assert grad.tolist() == pytest.approx([2.0, 2.0, -0.25])


# Surrogates


def test_cispo_by_hand():
    # ratios 4, 1, ½; bounds [0.8, 1.5]: weights 1.5, 1, 0.8. Advantages 1, −1, 2; log π = log 4, 0, −log 2.
    args = (tensor(2 * LOG2, 0, -LOG2), tensor(0, 0, 0), tensor(1, -1, 2))
    loss, grad, metrics = loss_and_gradient(
        partial(cispo_surrogate, clip_low=0.2, clip_high=0.5), *args, denominator=2.0
    )
    assert loss == pytest.approx(-(1.5 * 2 * LOG2 - 0 - 0.8 * 2 * LOG2) / 2)
    assert grad.tolist() == pytest.approx([-0.75, 0.5, -0.8])  # also the clipped tokens pull
    assert metrics["cispo_clip_ratio"] == pytest.approx(1 / 3)
    unbounded = loss_and_gradient(partial(cispo_surrogate, clip_high=0.5), *args, denominator=2.0)
    assert unbounded[1].tolist() == pytest.approx([-0.75, 0.5, -0.5])  # no lower bound


def test_sapo_by_hand():
    # r = 1: σ(0) · 4/τ = 2/τ; slope 1. r = 2, A = 1, τ = 1: 4σ(1). r = 2, A = −1, τ = 2: 2σ(2).
    logprobs, old = tensor(0, LOG2, LOG2), tensor(0, 0, 0)
    surrogate = partial(sapo_surrogate, temperature_positive=1.0, temperature_negative=2.0)
    loss, grad, _ = loss_and_gradient(surrogate, logprobs, old, tensor(1, 1, -1))
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.0, 1.0, 2.0)]
    assert loss == pytest.approx(-(2.0 + 4 * sigmoid[1] - 2 * sigmoid[2]))
    # d/d log π: −A · r · 4σ(1 − σ)
    expected = [-1.0, -2 * 4 * sigmoid[1] * (1 - sigmoid[1]), 2 * 4 * sigmoid[2] * (1 - sigmoid[2])]
    assert grad.tolist() == pytest.approx(expected)


def test_vespo_by_hand():
    # Answer 0: w = 4 · ½ = 2, advantage 1, k 2, λ 3: φ = e³ · 2² · e⁻⁶. Answer 1: w = ½, advantage −1, k 3, λ 2:
    # φ = e² · ½³ · e⁻¹.
    first, second = math.exp(3) * 4 * math.exp(-6), math.exp(2) / 8 * math.exp(-1)
    logprobs = tensor(2 * LOG2, -LOG2, -LOG2)
    loss, grad, metrics = loss_and_gradient(
        vespo_surrogate, logprobs, tensor(0, 0, 0), tensor(1, 1, -1), sequence_N=SEQUENCES
    )
    assert grad.tolist() == pytest.approx([-first, -first, second])
    assert loss == pytest.approx(-first * LOG2 - second * LOG2)
    assert metrics["vespo/phi_seq_mean"] == pytest.approx((2 * first + second) / 3)
    # An importance weight goes into w: ½ at one token makes the first answer's w 1, where φ is 1.
    _, grad, _ = loss_and_gradient(
        vespo_surrogate,
        logprobs,
        tensor(0, 0, 0),
        tensor(1, 1, -1),
        sequence_N=SEQUENCES,
        importance_weights_N=tensor(0.5, 1, 1),
    )
    assert grad.tolist() == pytest.approx([-1.0, -1.0, second])


def test_reinforce_by_hand():
    loss, grad, _ = loss_and_gradient(
        reinforce_surrogate, tensor(-1, -2), tensor(0, 0), tensor(3, -1), denominator=2.0, weights_N=tensor(1, 0.5)
    )
    assert loss == pytest.approx((3 - 0.5 * 2) / 2)
    assert grad.tolist() == pytest.approx([-1.5, 0.25])


def test_one_token_at_ratio_one_by_hand():
    """Advantage 2, log π = −1, denominator 4: each called as it stands."""
    one = (tensor(-1), tensor(-1), tensor(2))
    assert cispo_surrogate(*one, denominator=4.0)[0].item() == 0.5
    assert sapo_surrogate(*one, denominator=4.0)[0].item() == -1.0  # σ(0) · 4 = 2
    assert reinforce_surrogate(*one, denominator=4.0)[0].item() == 0.5
    alone = {"sequence_N": torch.tensor([0]), "num_sequences": 1}
    assert vespo_surrogate(*one, denominator=4.0, **alone)[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_product"])
def test_on_policy_every_surrogate_is_reinforce(name, level):
    """At ratio 1 all have the policy gradient; those with a ratio per sequence summed over the sequence."""
    logprobs, advantages = tensor(-1.0, -3.0, -0.2), tensor(0.5, 0.5, 1.0)
    options = {"sequence_N": SEQUENCES, "denominator": 3.0}
    _, grad, _ = loss_and_gradient(SURROGATES[name], logprobs, logprobs, advantages, level=level, **options)
    if level == "sequence_product" and name in ("clip", "sapo"):
        assert grad.tolist() == pytest.approx([-1 / 3, -1 / 3, -1 / 3])  # two tokens that each carry the answer
    else:
        torch.testing.assert_close(grad, -advantages / 3)


@pytest.mark.parametrize("name", SURROGATES)
def test_zero_advantage_gives_exactly_zero_gradient(name):
    generator = torch.Generator().manual_seed(0)
    logprobs, old = (torch.randn(3, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    _, grad, _ = loss_and_gradient(SURROGATES[name], logprobs, old, tensor(0, 0, 0), sequence_N=SEQUENCES)
    assert grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["clip", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_product"])
def test_gradient_against_finite_differences(name, level):
    """Of those whose loss is a function of the ratio; the others stop the gradient of theirs on purpose."""
    generator = torch.Generator().manual_seed(2)
    logprobs, old = (torch.randn(6, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))
    advantages, weights = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {
        "denominator": 4.0,
        "weights_N": weights,
        "importance_weights_N": weights.abs(),
        "sequence_N": torch.tensor([0, 0, 1, 1, 1, 2]),
        "num_sequences": 3,
        "level": level,
    }
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SURROGATES[name](x, old, advantages, **options)[0], (logprobs,), eps=1e-7)


@pytest.mark.parametrize("name", ["cispo", "vespo", "reinforce"])
def test_stopped_gradients_against_their_definition(name):
    """− weight · A / denominator, with the weight read off the loss: it is linear in log π once the weight is fixed."""
    generator = torch.Generator().manual_seed(3)
    logprobs, old = (torch.randn(3, generator=generator, dtype=torch.float64) * 0.3 - 1 for _ in range(2))
    advantages = tensor(1.0, 1.0, -2.0)
    loss, grad, _ = loss_and_gradient(SURROGATES[name], logprobs, old, advantages, sequence_N=SEQUENCES)
    assert (grad * logprobs).sum().item() == pytest.approx(loss)
    assert (-grad / advantages > 0).all()


@pytest.mark.parametrize("name", SURROGATES)
def test_accumulated_is_whole(name):
    generator = torch.Generator().manual_seed(5)
    logprobs, old = (torch.randn(5, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))
    advantages, sequences = tensor(1, 1, -2, -2, -2), torch.tensor([0, 0, 1, 1, 1])
    whole = loss_and_gradient(SURROGATES[name], logprobs, old, advantages, sequence_N=sequences, denominator=5.0)
    parts = [
        loss_and_gradient(
            SURROGATES[name],
            logprobs[part],
            old[part],
            advantages[part],
            sequence_N=sequences[part] - sequences[part][0],
            denominator=5.0,
        )
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(whole[0])
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in parts]), whole[1])


# The KL


def test_kl_penalty_by_hand():
    # k3 with d = log 2: 1 − log 2, at one of two tokens; with ratio ½ half of it
    logprobs, ref = tensor(0, 0), tensor(LOG2, 0)
    loss, metrics = kl_penalty(logprobs, ref, coef=0.1, denominator=2.0)
    assert loss.item() == pytest.approx(0.1 * (1 - LOG2) / 2)
    assert combine([metrics])["kl"] == pytest.approx((1 - LOG2) / 2)
    assert kl_penalty(logprobs, ref, coef=0.1, denominator=2.0, ratio_N=tensor(0.5, 1))[0].item() == pytest.approx(
        0.05 * (1 - LOG2) / 2
    )


def test_the_weighted_k3_has_the_gradient_of_the_reverse_kl_off_policy():
    """Over samples of the old policy, the weighted estimator's gradient is that of the exact KL (V3.2, equation 7)."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    ref, old = tensor(0.2, 0.5, 0.3).log(), tensor(0.4, 0.4, 0.2).log()
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    ratio = policy_ratio(logprobs, old)
    loss, _ = kl_penalty(logprobs, ref, coef=1.0, denominator=1.0, weights_N=old.exp(), ratio_N=ratio)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(found, exact)
    plain, _ = kl_penalty(logprobs, ref, coef=1.0, denominator=1.0, weights_N=old.exp())
    (biased,) = torch.autograd.grad(plain, logits)
    assert (biased - exact).abs().max() > 0.01


# Weights and masks


def test_bounded_weights_by_hand():
    # Ratios 4, 1, ½ of tokens; of answers 4 and ½ (products), 2 and ½ (geometric means).
    old, sampler = tensor(2 * LOG2, 0, -LOG2), tensor(0, 0, 0)

    def weights(**options):
        return bounded_importance_weights(old, sampler, sequence_N=SEQUENCES, num_sequences=2, **options).tolist()

    assert weights() == pytest.approx([4, 1, 0.5])
    assert weights(low=0.8, high=3.0) == pytest.approx([3, 1, 0.8])
    assert weights(low=0.8, high=3.0, bound="mask") == pytest.approx([0, 1, 0])
    assert weights(high=3.0, bound="mask") == pytest.approx([0, 1, 0.5])
    assert weights(low=0.8, bound="mask") == pytest.approx([4, 1, 0])
    assert weights(high=3.0, level="sequence") == pytest.approx([3, 3, 0.5])
    assert weights(high=3.0, level="sequence", bound="mask") == pytest.approx([0, 0, 0.5])
    assert weights(high=3.0, level="geometric", bound="mask") == pytest.approx([2, 2, 0.5])
    with pytest.raises(ValueError, match="needs sequence_N"):
        bounded_importance_weights(old, sampler, level="sequence")


def test_masked_tokens_have_no_gradient_and_dilute_nothing_else():
    args = (tensor(0.1, 0.2, 0.3), tensor(0, 0, 0), tensor(1, 1, 1))
    _, grad, _ = loss_and_gradient(
        partial(policy_surrogate, clip_high=9.0), *args, importance_weights_N=tensor(0, 1, 1), denominator=3.0
    )
    assert grad[0].item() == 0.0
    assert grad[1].item() == pytest.approx(-math.exp(0.2) / 3)


def test_stale_sequences_by_hand():
    # Means of log π_sampler − log π: (2 + 0)/2 = 1 and 3. δ = 1.
    args = (tensor(-1.0, -1.0, -1.0), tensor(-2, 0, -3), tensor(0, 0, 0), SEQUENCES, 2)
    assert stale_sequence_mask(*args, threshold=1.0).tolist() == [1.0, 1.0, 0.0]
    assert stale_sequence_mask(*args, threshold=0.5).tolist() == [0.0, 0.0, 0.0]
    good = (tensor(-1.0, -1.0, 0.5), *args[1:])
    assert stale_sequence_mask(*good, threshold=0.5).tolist() == [0.0, 0.0, 1.0]  # good answers are kept


def test_stale_versions_by_hand():
    found = stale_version_mask(torch.tensor([7.0, 4.0]), SEQUENCES, version=8, max_staleness=1)
    assert found.tolist() == [1.0, 1.0, 0.0]


# Entropy


def test_entropy_bonus_by_hand():
    entropy = tensor(1, 2, 3).requires_grad_()
    loss, metrics = entropy_bonus(entropy, coef=0.1, denominator=3.0)
    assert loss.item() == pytest.approx(-0.2)
    assert combine([metrics]) == {"entropy": 2.0}
    loss.backward()
    assert entropy.grad.tolist() == pytest.approx([-0.1 / 3] * 3)
    assert entropy_bonus(entropy, coef=1.0, denominator=1.0, weights_N=tensor(0, 1, 0))[0].item() == -2.0


def test_adaptive_entropy_by_hand():
    assert adapt_entropy_coef(0.01, 0.1, target=0.2, delta=0.005) == pytest.approx(0.015)
    assert adapt_entropy_coef(0.01, 0.2, target=0.2, delta=0.005) == pytest.approx(0.015)  # at the target: raised
    assert adapt_entropy_coef(0.01, 0.3, target=0.2, delta=0.005) == pytest.approx(0.005)
    assert adapt_entropy_coef(0.002, 0.3, target=0.2, delta=0.005) == 0.0
    assert adapt_entropy_coef(0.998, 0.1, target=0.2, delta=0.005) == 1.0
    assert active_entropy_coef(0.01, 0.1, target=0.2) == 0.01
    assert active_entropy_coef(0.01, 0.3, target=0.2) == 0.0
    assert active_entropy_coef(0.01, None, target=0.2) == 0.0


def test_tokens_of_high_entropy_by_hand():
    entropy = tensor(0.1, 0.9, 0.5, 0.3, 0.7)
    # quantile 0.6 of 0.1 0.3 0.5 0.7 0.9 lies at place 2.4: 0.58
    assert high_entropy_mask(entropy, 0.4).tolist() == [False, True, False, False, True]
    assert high_entropy_mask(entropy, 1.0).all()
    assert high_entropy_mask(entropy, 0.0).tolist() == [False, True, False, False, False]
    assert high_entropy_mask(tensor(), 0.5).tolist() == []
    random = torch.rand(101, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.2, 0.55):
        expected = random >= torch.quantile(random, 1 - share)
        assert torch.equal(high_entropy_mask(random, share), expected)
