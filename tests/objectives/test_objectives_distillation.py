"""Divergences between student and teacher: numbers worked by hand, properties, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objectives import (
    combine,
    distillation,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    teacher_advantages,
    top_k_divergence,
)

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
LN2, LN3 = math.log(2), math.log(3)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logprobs(seed: int, num: int = 5, vocab: int = 7, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num, vocab, generator=generator, dtype=torch.float64) * scale).log_softmax(-1)


def test_by_hand() -> None:
    student, teacher = logs([1 / 2, 1 / 2]), logs([1 / 4, 3 / 4])
    # KL(p‖q) = ¼ ln(½) + ¾ ln(3/2);  KL(q‖p) = ½ ln 2 + ½ ln(2/3)
    assert forward_kl(student, teacher).item() == pytest.approx(0.75 * LN3 - LN2)
    assert reverse_kl(student, teacher).item() == pytest.approx(LN2 - 0.5 * LN3)
    # beta ½: m = (3/8, 5/8)
    half = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) + 0.5 * (
        0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    )
    assert generalised_jsd(student, teacher, 0.5).item() == pytest.approx(half)
    # beta ¼: m = ¼ p + ¾ q = (7/16, 9/16)
    quarter = 0.25 * (0.25 * math.log(4 / 7) + 0.75 * math.log(4 / 3)) + 0.75 * (
        0.5 * math.log(8 / 7) + 0.5 * math.log(8 / 9)
    )
    assert generalised_jsd(student, teacher, 0.25).item() == pytest.approx(quarter)


def test_top_k_by_hand() -> None:
    # the teacher tells ½ and ¼ of its first two tokens, which leaves ¼; the student has ¼, ¼ and ½ there
    student, teacher = logs([1 / 4, 1 / 4]), logs([1 / 2, 1 / 4])
    tail = top_k_divergence(student, teacher)
    assert tail.item() == pytest.approx(0.5 * LN2 + 0.25 * math.log(1 / 2))
    # renormalised: teacher (2/3, 1/3), student (1/2, 1/2)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert top_k_divergence(student, teacher, rest="renormalise").item() == pytest.approx(expected)
    # one unknown column changes nothing
    padded = [torch.cat((x, torch.zeros(1, 1, dtype=torch.float64)), 1) for x in (student, teacher)]
    known = torch.tensor([[True, True, False]])
    assert top_k_divergence(*padded, known_NK=known).item() == pytest.approx(tail.item())
    again = top_k_divergence(*padded, known_NK=known, rest="renormalise")
    assert again.item() == pytest.approx(expected)


def test_the_loss_by_hand() -> None:
    divergence_N = torch.tensor([0.5, 0.1], requires_grad=True)
    logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights_N = torch.tensor([1.0, 3.0])
    loss, metrics = distillation(divergence_N, logprobs_N, denominator=4, nll_weight=0.25, weights_N=weights_N)
    # ((0.75 · 0.5 + 0.25 · 1) + 3 · (0.75 · 0.1 + 0.25 · 2)) / 4
    assert loss.item() == pytest.approx((0.625 + 3 * 0.575) / 4)
    loss.backward()
    assert divergence_N.grad is not None
    assert divergence_N.grad.tolist() == pytest.approx([0.75 / 4, 3 * 0.75 / 4])
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([-0.25 / 4, -3 * 0.25 / 4])
    assert combine([metrics]) == pytest.approx({"divergence": 0.3, "nll": 1.5})
    alone, _ = distillation(divergence_N, denominator=2)
    assert alone.item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="logprobs_N"):
        distillation(divergence_N, denominator=1, nll_weight=0.5)


def test_teacher_advantages_by_hand() -> None:
    student, teacher = torch.tensor([-1.0, -0.1, -2.0]), torch.tensor([-0.5, -30.0, -2.0])
    assert teacher_advantages(student, teacher).tolist() == pytest.approx([0.5, -29.9, 0.0])
    clipped = teacher_advantages(student, teacher, coefficient=2.0, clip=5.0)
    assert clipped.tolist() == pytest.approx([1.0, -5.0, 0.0])


@given(seed=st.integers(0, 2**31), beta=st.sampled_from(BETAS), scale=st.floats(0.1, 20))
@settings(max_examples=60, deadline=None)
def test_never_negative_and_zero_when_equal(seed: int, beta: float, scale: float) -> None:
    student, teacher = random_logprobs(seed, scale=scale), random_logprobs(seed + 1, scale=scale)
    assert bool((generalised_jsd(student, teacher, beta) >= -1e-12).all())
    assert generalised_jsd(student, student.clone(), beta).abs().max().item() <= 1e-12


@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 50))
@settings(max_examples=60, deadline=None)
def test_the_half_is_symmetric_and_at_most_log_2(seed: int, scale: float) -> None:
    student, teacher = random_logprobs(seed, scale=scale), random_logprobs(seed + 1, scale=scale)
    there, back = generalised_jsd(student, teacher), generalised_jsd(teacher, student)
    torch.testing.assert_close(there, back, atol=1e-12, rtol=1e-9)
    assert bool((there <= LN2 + 1e-12).all())


def test_two_that_share_nothing_are_log_2_apart() -> None:
    student, teacher = logs([1.0, 0.0]), logs([0.0, 1.0])
    assert generalised_jsd(student, teacher).item() == pytest.approx(LN2)


def test_the_ends_are_limits() -> None:
    student, teacher = random_logprobs(1), random_logprobs(2)
    small = 1e-6
    near_0 = generalised_jsd(student, teacher, small) / (small * (1 - small))
    torch.testing.assert_close(near_0, generalised_jsd(student, teacher, 0.0), rtol=1e-4, atol=0)
    near_1 = generalised_jsd(student, teacher, 1 - small) / (small * (1 - small))
    torch.testing.assert_close(near_1, generalised_jsd(student, teacher, 1.0), rtol=1e-4, atol=0)


@given(seed=st.integers(0, 2**31), beta=st.sampled_from(BETAS), k=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_tail_makes_a_lower_bound(seed: int, beta: float, k: int) -> None:
    student, teacher = random_logprobs(seed), random_logprobs(seed + 1)
    whole = generalised_jsd(student, teacher, beta)
    ids = teacher.topk(k, -1).indices
    part = top_k_divergence(student.gather(1, ids), teacher.gather(1, ids), beta=beta)
    assert bool((part <= whole + 1e-9).all())
    assert bool((part >= -1e-9).all())


@pytest.mark.parametrize("rest", ["tail", "renormalise"])
@pytest.mark.parametrize("beta", BETAS)
def test_all_but_one_told_is_the_whole(beta: float, rest: str) -> None:
    student, teacher = random_logprobs(3), random_logprobs(4)
    whole = generalised_jsd(student, teacher, beta)
    told = slice(0, 6) if rest == "tail" else slice(0, 7)  # with one token left, the tail is that token
    part = top_k_divergence(student[:, told], teacher[:, told], beta=beta, rest=rest)  # type: ignore[arg-type]
    torch.testing.assert_close(part, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_against_finite_differences(beta: float) -> None:
    teacher = random_logprobs(6, num=3)
    logits = random_logprobs(5, num=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: generalised_jsd(z.log_softmax(-1), teacher, beta), (logits,))
    for rest in ("tail", "renormalise"):
        assert torch.autograd.gradcheck(
            lambda z: top_k_divergence(z.log_softmax(-1)[:, :3], teacher[:, :3], beta=beta, rest=rest),  # type: ignore[arg-type]
            (logits,),
        )


@pytest.mark.parametrize("beta", BETAS)
def test_no_gradient_where_they_agree_and_none_for_the_teacher(beta: float) -> None:
    logits = random_logprobs(7).requires_grad_()
    teacher_logits = logits.detach().clone().requires_grad_()
    generalised_jsd(logits.log_softmax(-1), teacher_logits.log_softmax(-1), beta).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() <= 1e-12
    assert teacher_logits.grad is None


def test_forward_kl_pulls_to_the_soft_targets() -> None:
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    forward_kl(logits.log_softmax(-1), logs([0.5, 0.3, 0.2])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([1 / 3 - 0.5, 1 / 3 - 0.3, 1 / 3 - 0.2])


def test_a_policy_gradient_with_teacher_advantages_is_the_gradient_of_the_reverse_kl() -> None:
    """E_q[A ∇ log q] summed exactly over the vocabulary, against autograd through KL(q ‖ p)."""
    teacher = random_logprobs(9, num=1)
    logits = random_logprobs(8, num=1).requires_grad_()
    (exact,) = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), teacher).sum(), logits)
    log_q = logits.log_softmax(-1)
    advantages = teacher_advantages(log_q[0], teacher[0])
    surrogate = -(log_q.detach().exp()[0] * advantages * log_q[0]).sum()
    (estimate,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(estimate, exact, atol=1e-12, rtol=1e-9)


def test_an_impossible_token_of_the_teacher_costs_forward_nothing() -> None:
    student, teacher = logs([0.5, 0.5]).requires_grad_(), logs([1.0, 0.0])
    kl = forward_kl(student, teacher)
    kl.sum().backward()
    assert kl.item() == pytest.approx(LN2)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_out_of_range() -> None:
    with pytest.raises(AssertionError, match="beta"):
        generalised_jsd(logs([1.0]), logs([1.0]), 1.5)
    with pytest.raises(ValueError, match="renormalise"):
        top_k_divergence(logs([0.5]), logs([0.5]), rest="ignore")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="denominator"):
        distillation(torch.zeros(1), denominator=0)
