"""Divergences against TRL: GKD's loss, the distillation trainer's chunked loss, the server trainer's top-k loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain import models, objectives
from posttrain.core import Example, TokenSequence
from posttrain.train import TrainConfig, Trainer, distillation_objective, teacher_forward

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
FIGURES: list[tuple[float, float]] = []  # |Δloss| and cosine of the gradients, for the table of parity


@pytest.fixture(scope="module")
def gkd() -> Any:
    module = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    return module.GKDTrainer.generalized_jsd_loss


def cosine(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(mine.flatten().double(), theirs.flatten().double(), dim=0).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_of_logits(gkd: Any, beta: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 9, 64, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 9, 64, generator=generator) * 2
    labels = torch.where(torch.rand(3, 9, generator=generator) < 0.6, 1, -100)
    mask = labels != -100
    theirs = gkd(student, teacher, labels=labels, beta=beta, temperature=temperature)
    (their_grad,) = torch.autograd.grad(theirs, student)
    divergence_N = objectives.generalised_jsd(
        (student[mask] / temperature).log_softmax(-1), (teacher[mask] / temperature).log_softmax(-1), beta
    )
    mine, _ = objectives.distillation(divergence_N, denominator=int(mask.sum()))
    (my_grad,) = torch.autograd.grad(mine, student)
    FIGURES.append((abs(mine.item() - theirs.item()), cosine(my_grad, their_grad)))
    assert abs(mine.item() - theirs.item()) <= 1e-5
    assert cosine(my_grad, their_grad) >= 0.9999
    torch.testing.assert_close(my_grad, their_grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_chunked_loss_from_hidden_states(beta: float) -> None:
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 11, 16, generator=generator)
    teacher_hidden = torch.randn(2, 11, 24, generator=generator)
    head, teacher_head = torch.randn(97, 16, generator=generator), torch.randn(97, 24, generator=generator)
    mask = (torch.rand(2, 11, generator=generator) < 0.7).long()
    grads = []
    losses = []
    for ours in (True, False):
        states, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if ours:
            chosen = mask.bool()
            found = models.token_divergence(
                SimpleNamespace(exact_logits=True, head_weight=lambda weight=weight: weight),
                states[chosen],
                SimpleNamespace(exact_logits=True, head_weight=lambda: teacher_head),
                teacher_hidden[chosen],
                torch.zeros(int(mask.sum()), dtype=torch.long),
                beta=beta,
                temperature=1.3,
                chunk=5,
            )
            loss = found.divergence_N.sum() / mask.sum()
        else:
            loss, _, _ = trainer._chunked_divergence_loss(
                states, teacher_hidden, weight, teacher_head, mask, beta, temperature=1.3
            )
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, (states, weight)))
    assert abs(losses[0] - losses[1]) <= 1e-5
    for mine, theirs in zip(*grads, strict=True):
        FIGURES.append((abs(losses[0] - losses[1]), cosine(mine, theirs)))
        assert cosine(mine, theirs) >= 0.9999
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rest", ["tail", "renormalise"])
@pytest.mark.parametrize("beta", BETAS)
def test_top_k_loss(beta: float, rest: str) -> None:
    server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    generator = torch.Generator().manual_seed(2)
    teacher = (torch.randn(12, 40, generator=generator) * 2).log_softmax(-1)
    logits = torch.randn(12, 40, generator=generator, requires_grad=True)
    values, ids = teacher.topk(6, -1)
    student = logits.log_softmax(-1).gather(1, ids)
    mask = torch.ones_like(values, dtype=torch.bool)
    if rest == "tail":
        their_student, their_mask = server._add_tail_bucket(student, mask)
        their_teacher, _ = server._add_tail_bucket(values, mask)
    else:
        their_student, their_teacher, their_mask = student.log_softmax(-1), values.log_softmax(-1), mask
    theirs = server._jsd_divergence(their_student, their_teacher, beta, their_mask).sum(-1)
    mine = objectives.top_k_divergence(student, values, beta=beta, rest=rest)  # type: ignore[arg-type]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    (my_grad,) = torch.autograd.grad(mine.mean(), logits, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs.mean(), logits)
    FIGURES.append((abs(mine.mean().item() - theirs.mean().item()), cosine(my_grad, their_grad)))
    assert cosine(my_grad, their_grad) >= 0.9999


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_whole_step_from_examples_to_weights(gkd: Any, beta: float) -> None:
    """Packed rows, masks and the step's denominator, against TRL's loss on `transformers`-style padded logits."""
    shape: dict[str, Any] = {
        "vocab_size": 32,
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "mlp_width": 32,
        "max_positions": 32,
        "init_std": 0.2,
    }
    student = models.Decoder.random(models.DecoderConfig(**shape), seed=1)
    teacher = models.Decoder.random(models.DecoderConfig(**shape), seed=2)
    generator = torch.Generator().manual_seed(3)
    lengths, starts = [12, 7, 9], [4, 2, 8]
    tokens = torch.randint(0, 32, (3, 12), generator=generator)
    labels = torch.full((3, 12), -100)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        labels[row, start:length] = tokens[row, start:length]
    loss = gkd(student(tokens)[:, :-1], teacher(tokens)[:, :-1].detach(), labels=labels[:, 1:], beta=beta)
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(student.parameters()))])
    examples = [
        Example(
            id=str(row),
            sequences=(
                TokenSequence(
                    tokens=tuple(tokens[row, :length].tolist()), mask=tuple(place >= start for place in range(length))
                ),
            ),
        )
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    trainer = Trainer(
        student,
        TrainConfig(lr=0.0, micro_tokens=20, max_grad_norm=0.0),
        distillation_objective(),
        forward=teacher_forward(teacher, beta=beta),
    )
    taken: list[torch.Tensor] = []
    update = trainer._optimiser.step

    def step(lr: float) -> None:
        taken.extend(weight.grad.flatten().clone() for weight in student.parameters() if weight.grad is not None)
        update(lr)

    trainer._optimiser.step = step  # type: ignore[method-assign]
    metrics = trainer.step(examples)
    assert metrics["num_micro_batches"] == 2
    FIGURES.append((abs(metrics["loss"] - loss.item()), cosine(torch.cat(taken), expected)))
    assert abs(metrics["loss"] - loss.item()) <= 1e-5
    assert cosine(torch.cat(taken), expected) >= 0.9999
