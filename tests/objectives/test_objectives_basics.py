"""Negative log-likelihood, KL estimators, entropy, sequence sums and metrics, with numbers worked by hand."""

import math

import pytest
import torch

import posttrain.objectives as objectives
from posttrain.objectives import combine, entropy, kl_estimate, nll, sequence_mean, sequence_sum, sequence_weights


def test_nll_by_hand():
    logprobs_N = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss, metrics = nll(logprobs_N, denominator=4.0)
    assert loss.item() == 1.5
    assert combine([metrics]) == {"nll": 2.0}
    loss.backward()
    assert logprobs_N.grad.tolist() == [-0.25] * 3
    weighted, metrics = nll(logprobs_N, denominator=2.0, weights_N=torch.tensor([1.0, 0.0, 2.0]))
    assert weighted.item() == 3.5
    assert combine([metrics]) == {"nll": 2.0}


def test_kl_estimates_by_hand():
    # log π = 0, log ref = log 2: d = log 2
    logprobs_N, ref_N, log2 = torch.zeros(1), torch.tensor([math.log(2.0)]), math.log(2.0)
    assert kl_estimate(logprobs_N, ref_N, "k1").item() == pytest.approx(-log2)
    assert kl_estimate(logprobs_N, ref_N, "k2").item() == pytest.approx(log2**2 / 2)
    assert kl_estimate(logprobs_N, ref_N, "k3").item() == pytest.approx(2 - 1 - log2)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(logprobs_N, ref_N, "k4")


def test_kl_estimates_agree_with_the_exact_kl_in_expectation():
    policy_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (policy_V * (policy_V / ref_V).log()).sum()
    for estimator in ("k1", "k3"):
        expected = (policy_V * kl_estimate(policy_V.log(), ref_V.log(), estimator)).sum()
        torch.testing.assert_close(expected, exact)


def test_gradient_of_k2_is_that_of_the_kl_and_of_k1_is_none():
    logits_V = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs_V = logits_V.log_softmax(0)
    policy_V = logprobs_V.exp()
    (exact,) = torch.autograd.grad((policy_V * (logprobs_V - ref_V)).sum(), logits_V, retain_graph=True)
    expected = {}
    for estimator in ("k1", "k2"):
        loss = (policy_V.detach() * kl_estimate(logprobs_V, ref_V, estimator)).sum()
        (expected[estimator],) = torch.autograd.grad(loss, logits_V, retain_graph=True)
    torch.testing.assert_close(expected["k2"], exact)
    torch.testing.assert_close(expected["k1"], torch.zeros_like(exact))


def test_entropy_by_hand():
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf], [100.0, 0.0, 0.0, 0.0]])
    assert entropy(rows).tolist() == pytest.approx([math.log(4), math.log(2), 0.0], abs=1e-6)
    # p = (3/4, 1/4)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(torch.tensor([[math.log(3.0), 0.0]])).item() == pytest.approx(expected)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(entropy, (logits,), eps=1e-4, atol=1e-3, rtol=1e-3)


def test_sums_over_sequences_by_hand():
    values_N, sequence_N = torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([0, 0, 2, 0])
    assert sequence_sum(values_N, sequence_N, 3).tolist() == [7.0, 0.0, 6.0]
    assert sequence_mean(values_N, sequence_N, 3).tolist() == pytest.approx([7 / 3, 0.0, 6.0])
    assert objectives.sequence_lengths(sequence_N, 3, values_N).tolist() == [3.0, 1.0, 1.0]  # 1 for none: to divide by
    assert sequence_weights(sequence_N, 3, values_N).tolist() == pytest.approx([1 / 3, 1 / 3, 1.0, 1 / 3])


def test_metrics_of_unequal_micro_batches_combine_exactly():
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])
    empty = torch.zeros(0)
    rows = [
        {
            "mean": objectives.mean(values),
            "sum": objectives.total(values),
            "min": objectives.minimum(values),
            "max": objectives.maximum(values),
            "masked": objectives.mean(values, values > 2),
        }
        for values in (first, second, empty)
    ]
    assert combine(rows) == {"mean": 4.0, "sum": 16.0, "min": 1.0, "max": 10.0, "masked": 6.5}
    assert combine([{"never": objectives.mean(empty), "extreme": objectives.maximum(empty)}]) == {}
    assert combine([]) == {}


def test_nan_is_not_hidden_by_combining():
    bad = torch.tensor([1.0, math.nan])
    rows = [{"mean": objectives.mean(bad), "max": objectives.maximum(bad), "sum": objectives.total(bad)}]
    assert all(math.isnan(value) for value in combine(rows).values())


def test_the_door_is_complete_and_sorted():
    assert sorted(objectives.__all__, key=lambda n: (not n[0].isupper(), n)) == objectives.__all__
    for name in objectives.__all__:
        assert getattr(objectives, name) is not None
