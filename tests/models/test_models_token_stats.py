from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.core import ModelError
from posttrain.models import token_stats


def a_head(weight_VD: torch.Tensor, exact: bool = True) -> Any:
    return SimpleNamespace(exact_logits=exact, head_weight=lambda: weight_VD)


def plain(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(hidden_ND @ weight_VD.T / temperature, -1)
    return log_p.gather(1, targets_N[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_by_hand() -> None:
    # one token, width 1, three entries: logits ln 1, ln 2, ln 5 → probabilities 1/8, 2/8, 5/8
    head = a_head(torch.tensor([[0.0], [math.log(2)], [math.log(5)]]))
    stats = token_stats(head, torch.ones(1, 1), torch.tensor([1]), entropy=True)
    assert stats.logprobs_N.item() == pytest.approx(math.log(1 / 4))
    assert stats.entropy_N is not None
    assert stats.entropy_N.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)))
    half = token_stats(head, torch.ones(1, 1), torch.tensor([2]), temperature=0.5)  # probabilities ∝ 1, 4, 25
    assert half.logprobs_N.item() == pytest.approx(math.log(25 / 30))
    assert half.entropy_N is None


@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_a_plain_softmax(
    chunk: int | None, temperature: float, generator: torch.Generator
) -> None:
    hidden_ND = torch.randn(13, 8, generator=generator, requires_grad=True)
    weight_VD = torch.randn(29, 8, generator=generator, requires_grad=True)
    targets_N = torch.randint(0, 29, (13,), generator=generator)
    pull, pull_entropy = torch.randn(13, generator=generator), torch.randn(13, generator=generator)
    logprobs, entropy = plain(hidden_ND, weight_VD, targets_N, temperature)
    expected = torch.autograd.grad((pull * logprobs + pull_entropy * entropy).sum(), (hidden_ND, weight_VD))
    stats = token_stats(a_head(weight_VD), hidden_ND, targets_N, temperature=temperature, chunk=chunk, entropy=True)
    assert stats.entropy_N is not None
    assert torch.allclose(stats.logprobs_N, logprobs, atol=1e-5)
    assert torch.allclose(stats.entropy_N, entropy, atol=1e-5)
    loss = (pull * stats.logprobs_N + pull_entropy * stats.entropy_N).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, (hidden_ND, weight_VD)), expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_gradient_without_entropy_and_with_a_frozen_head(generator: torch.Generator) -> None:
    hidden_ND = torch.randn(5, 4, generator=generator, requires_grad=True)
    weight_VD = torch.randn(7, 4, generator=generator)
    targets_N = torch.randint(0, 7, (5,), generator=generator)
    (expected,) = torch.autograd.grad(plain(hidden_ND, weight_VD, targets_N, 1.0)[0].sum(), hidden_ND)
    (mine,) = torch.autograd.grad(token_stats(a_head(weight_VD), hidden_ND, targets_N).logprobs_N.sum(), hidden_ND)
    assert torch.allclose(mine, expected, atol=1e-5)


@torch.no_grad()
def test_bf16_products_do_not_round_the_logits(generator: torch.Generator) -> None:
    hidden_ND = torch.randn(64, 32, generator=generator)
    weight_VD = torch.randn(50, 32, generator=generator).bfloat16()
    targets_N = torch.randint(0, 50, (64,), generator=generator)
    expected, _ = plain(hidden_ND.double(), weight_VD.double(), targets_N, 1.0)
    exact = token_stats(a_head(weight_VD), hidden_ND, targets_N).logprobs_N
    rounded = token_stats(a_head(weight_VD, exact=False), hidden_ND, targets_N).logprobs_N
    assert (exact - expected).abs().max() < 1e-5
    assert 1e-3 < (rounded - expected).abs().max() < 0.2


def test_extreme_logits_stay_finite() -> None:
    hidden_ND = torch.tensor([[1e4]], requires_grad=True)
    stats = token_stats(a_head(torch.tensor([[1.0], [-1.0]])), hidden_ND, torch.tensor([1]), entropy=True)
    assert stats.logprobs_N.item() == -2e4
    assert stats.entropy_N is not None
    assert stats.entropy_N.item() == 0
    (stats.logprobs_N + stats.entropy_N).sum().backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.item() == -2


def test_no_tokens_give_no_statistics() -> None:
    weight_VD = torch.ones(3, 2, requires_grad=True)
    stats = token_stats(a_head(weight_VD), torch.ones(0, 2), torch.zeros(0, dtype=torch.long))
    stats.logprobs_N.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.abs().sum() == 0


def test_misuse_is_refused() -> None:
    head = a_head(torch.ones(3, 2))
    with pytest.raises(ModelError, match="hidden ND"):
        token_stats(head, torch.ones(4, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ModelError, match="temperature"):
        token_stats(head, torch.ones(3, 2), torch.zeros(3, dtype=torch.long), temperature=0.0)
