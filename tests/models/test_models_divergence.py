"""Divergence from hidden states, chunk by chunk, against the plain computation with all logits at once."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.core import ModelError
from posttrain.models import chosen_logprobs, token_divergence
from posttrain.objectives import generalised_jsd

N, D, E, V = 13, 8, 5, 29
BETAS = [0.0, 0.3, 0.5, 1.0]


def a_head(weight: torch.Tensor, exact: bool = True) -> Any:
    return SimpleNamespace(exact_logits=exact, head_weight=lambda: weight)


@pytest.fixture
def case(generator: torch.Generator) -> SimpleNamespace:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return SimpleNamespace(
        hidden_ND=draw(N, D).requires_grad_(),
        weight_VD=draw(V, D).requires_grad_(),
        teacher_NE=draw(N, E),
        teacher_VE=draw(V, E),
        targets_N=torch.randint(0, V, (N,), generator=generator),
        pull_N=draw(N),
        pull_logprobs_N=draw(N),
    )


def plain(case: SimpleNamespace, beta: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64: divergence, logprobs and entropy."""
    logits = case.hidden_ND.double() @ case.weight_VD.double().T
    teacher = case.teacher_NE.double() @ case.teacher_VE.double().T
    divergence = generalised_jsd((logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), beta)
    log_q = logits.log_softmax(-1)
    return divergence, log_q.gather(1, case.targets_N[:, None])[:, 0], -(log_q.exp() * log_q).sum(-1)


@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients(case: SimpleNamespace, beta: float, temperature: float, chunk: int | None) -> None:
    divergence, logprobs, entropy = plain(case, beta, temperature)
    wanted = (case.pull_N * divergence + case.pull_logprobs_N * logprobs).sum()
    expected = torch.autograd.grad(wanted, (case.hidden_ND, case.weight_VD))
    found = token_divergence(
        a_head(case.weight_VD),
        case.hidden_ND,
        a_head(case.teacher_VE),
        case.teacher_NE,
        case.targets_N,
        beta=beta,
        temperature=temperature,
        chunk=chunk,
        entropy=True,
    )
    assert found.entropy_N is not None
    torch.testing.assert_close(found.divergence_N.double(), divergence, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.logprobs_N.double(), logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy_N.double(), entropy, atol=1e-5, rtol=1e-5)
    loss = (case.pull_N * found.divergence_N + case.pull_logprobs_N * found.logprobs_N).sum()
    for mine, theirs in zip(torch.autograd.grad(loss, (case.hidden_ND, case.weight_VD)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=1e-4)


def test_the_teachers_logprobs_and_no_gradient_into_the_teacher(case: SimpleNamespace) -> None:
    case.teacher_NE.requires_grad_()
    case.teacher_VE.requires_grad_()
    found = token_divergence(
        a_head(case.weight_VD), case.hidden_ND, a_head(case.teacher_VE), case.teacher_NE, case.targets_N, beta=0.5
    )
    log_p = (case.teacher_NE @ case.teacher_VE.T).log_softmax(-1)
    torch.testing.assert_close(
        found.teacher_logprobs_N, log_p.gather(1, case.targets_N[:, None])[:, 0].detach(), atol=1e-5, rtol=1e-5
    )
    assert not found.teacher_logprobs_N.requires_grad
    assert found.entropy_N is None
    found.divergence_N.sum().backward()
    assert case.teacher_NE.grad is None
    assert case.teacher_VE.grad is None


def test_a_frozen_head_and_frozen_states(case: SimpleNamespace) -> None:
    def divergence(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        found = token_divergence(
            a_head(weight), hidden, a_head(case.teacher_VE), case.teacher_NE, case.targets_N, beta=1.0
        )
        return found.divergence_N.sum()

    (both, _) = torch.autograd.grad(divergence(case.hidden_ND, case.weight_VD), (case.hidden_ND, case.weight_VD))
    (alone,) = torch.autograd.grad(divergence(case.hidden_ND, case.weight_VD.detach()), case.hidden_ND)
    torch.testing.assert_close(both, alone)


def test_no_more_than_a_chunk_of_logits(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.models import token_divergence as function

    module = sys.modules[function.__module__]
    sizes: list[int] = []
    product = module.head_product

    def watched(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(hidden))
        return product(hidden, *rest)

    monkeypatch.setattr(module, "head_product", watched)
    found = function(
        a_head(case.weight_VD),
        case.hidden_ND,
        a_head(case.teacher_VE),
        case.teacher_NE,
        case.targets_N,
        beta=0.5,
        chunk=4,
    )
    found.divergence_N.sum().backward()
    assert max(sizes) == 4
    assert len(sizes) == 2 * 2 * 4  # both models, forward and backward, four chunks of 13 tokens


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_chosen_logprobs(
    case: SimpleNamespace, chunk: int | None, temperature: float, generator: torch.Generator
) -> None:
    ids_NK = torch.randint(0, V, (N, 3), generator=generator)  # with repetitions
    pull_NK = torch.randn(N, 3, generator=generator)
    wanted = ((case.hidden_ND @ case.weight_VD.T) / temperature).log_softmax(-1).gather(1, ids_NK)
    expected = torch.autograd.grad((pull_NK * wanted).sum(), (case.hidden_ND, case.weight_VD))
    found = chosen_logprobs(a_head(case.weight_VD), case.hidden_ND, ids_NK, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad((pull_NK * found).sum(), (case.hidden_ND, case.weight_VD))
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=1e-4)


def test_bfloat16_heads_stay_near(case: SimpleNamespace) -> None:
    found = token_divergence(
        a_head(case.weight_VD.detach().bfloat16(), exact=False),
        case.hidden_ND,
        a_head(case.teacher_VE.bfloat16(), exact=False),
        case.teacher_NE,
        case.targets_N,
        beta=0.5,
    )
    divergence, _, _ = plain(case, 0.5, 1.0)
    assert found.divergence_N.dtype == torch.float32
    torch.testing.assert_close(found.divergence_N.double(), divergence, atol=0.05, rtol=0.05)
    found.divergence_N.sum().backward()
    assert case.hidden_ND.grad is not None
    assert bool(case.hidden_ND.grad.isfinite().all())


def test_errors_say_what_does_not_fit(case: SimpleNamespace) -> None:
    def call(teacher_VE: torch.Tensor = case.teacher_VE, **changes: Any) -> None:
        token_divergence(
            a_head(case.weight_VD),
            case.hidden_ND,
            a_head(teacher_VE),
            case.teacher_NE,
            case.targets_N,
            **{"beta": 0.5, **changes},
        )

    with pytest.raises(ModelError, match="29 entries, the teacher's 20"):
        call(case.teacher_VE[:20])
    with pytest.raises(ModelError, match="beta"):
        call(beta=-0.1)
    with pytest.raises(ModelError, match="temperature"):
        call(temperature=0.0)
    with pytest.raises(ModelError, match="ids NK"):
        chosen_logprobs(a_head(case.weight_VD), case.hidden_ND, case.targets_N)
