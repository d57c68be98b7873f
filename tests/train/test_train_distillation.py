"""A teacher beside the student: what the forward passes give, that packing changes nothing, and that students learn."""

from __future__ import annotations

import pytest
import torch

from posttrain import models, objectives, train
from posttrain.core import ConfigError, TrainError

VOCAB = 48


def logits_of(model: models.Decoder, example) -> list[torch.Tensor]:
    """Logits that predict each target, sequence by sequence."""
    found = []
    for sequence in example.sequences:
        places = [place for place, target in enumerate(sequence.mask) if target]
        found.append(model(torch.tensor([sequence.tokens]))[0, [place - 1 for place in places]])
    return found


def expected_loss(student, teacher, examples, beta, temperature=1.0, nll_weight=0.0) -> torch.Tensor:
    """One sequence at a time, all logits at once."""
    total, count = torch.zeros(()), 0
    for example in examples:
        for sequence, mine, theirs in zip(
            example.sequences, logits_of(student, example), logits_of(teacher, example), strict=True
        ):
            targets = torch.tensor([token for token, mask in zip(sequence.tokens, sequence.mask, strict=True) if mask])
            divergence = objectives.generalised_jsd(
                (mine / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1).detach(), beta
            )
            logprobs = mine.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            each = (1 - nll_weight) * divergence - nll_weight * logprobs
            total = total + (each * example.scalars["weight"]).sum()
            count += len(targets)
    return total / count


@pytest.mark.parametrize(("beta", "temperature", "nll_weight"), [(0.0, 1.0, 0.0), (0.5, 2.0, 0.25), (1.0, 1.0, 0.5)])
def test_loss_and_gradient_are_those_of_one_sequence_at_a_time(
    make_model, make_examples, before_update, beta, temperature, nll_weight
):
    student, teacher, examples = make_model(1), make_model(2, width=16, num_heads=2, num_kv_heads=1), make_examples(6)
    loss = expected_loss(student, teacher, examples, beta, temperature, nll_weight)
    expected = torch.autograd.grad(loss, list(student.parameters()))
    trainer = train.Trainer(
        student,
        train.TrainConfig(lr=1e-3, micro_tokens=40, max_grad_norm=0.0),
        train.distillation_objective(nll_weight=nll_weight),
        forward=train.teacher_forward(teacher, beta=beta, temperature=temperature),
    )
    grads = []
    before_update(trainer, lambda: grads.extend(weight.grad.clone() for weight in student.parameters()))
    metrics = trainer.step(examples)
    assert metrics["num_micro_batches"] > 1
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for mine, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    assert {"divergence", "nll", "teacher_nll"} <= metrics.keys()


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(make_model, make_examples):
    trainer = train.Trainer(
        make_model(1),
        train.TrainConfig(lr=1e-3),
        train.distillation_objective(),
        forward=train.teacher_forward(make_model(1), beta=0.5),
    )
    metrics = trainer.step(make_examples(4))
    assert metrics["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["nll"] == pytest.approx(metrics["teacher_nll"], abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_comes_near_its_teacher(make_model, make_examples, beta):
    teacher, examples = make_model(2), make_examples(8)
    trainer = train.Trainer(
        make_model(1),
        train.TrainConfig(lr=5e-3, entropy=True),
        train.distillation_objective(),
        forward=train.teacher_forward(teacher, beta=beta),
    )
    first = trainer.step(examples)
    for _ in range(40):
        last = trainer.step(examples)
    assert last["divergence"] < 0.2 * first["divergence"]
    assert "entropy" in last
    assert trainer.evaluate(examples)["nll"] > 0  # the forward pass serves the measurement of the likelihood too
    assert len(trainer.logprobs(examples)) == 8


def with_top_k(teacher, examples, k):
    """The examples with the teacher's k most likely tokens at every target."""
    told = []
    for example in examples:
        sequences = []
        for sequence, logits in zip(example.sequences, logits_of(teacher, example), strict=True):
            rows = iter(logits.detach().log_softmax(-1))
            top_T: list[dict[int, float] | None] = []
            for target in sequence.mask:
                if not target:
                    top_T.append(None)
                    continue
                values, ids = next(rows).topk(k)
                top_T.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
            sequences.append(sequence.replace(columns={**sequence.columns, **train.top_k_columns(top_T, k)}))
        told.append(example.replace(sequences=tuple(sequences)))
    return told


def test_all_tokens_told_is_the_teacher_itself(make_model, make_examples):
    student, teacher, examples = make_model(1), make_model(2), make_examples(4)
    loss = expected_loss(student, teacher, examples, beta=0.5)
    objective = train.distillation_objective()
    forward = train.top_k_forward(VOCAB - 1, beta=0.5)
    trainer = train.Trainer(student, train.TrainConfig(micro_tokens=40), objective, forward=forward)
    metrics = trainer.step(with_top_k(teacher, examples, VOCAB - 1))
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_few_tokens_told_still_teach(make_model, make_examples):
    teacher = make_model(2)
    told = with_top_k(teacher, make_examples(8), 5)
    trainer = train.Trainer(
        make_model(1), train.TrainConfig(lr=5e-3), train.distillation_objective(), forward=train.top_k_forward(5)
    )
    losses = [trainer.step(told)["divergence"] for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_top_k_columns_by_hand():
    columns = train.top_k_columns([None, {7: -0.5, 3: -0.1, 9: -2.0}, {4: -0.2}], 2)
    assert columns == {
        "teacher_ids/0": (-1.0, 3.0, 4.0),
        "teacher_ids/1": (-1.0, 7.0, -1.0),
        "teacher_logprobs/0": (0.0, -0.1, -0.2),
        "teacher_logprobs/1": (0.0, -0.5, 0.0),
    }


def test_errors_name_the_example(make_model, make_examples):
    examples = make_examples(2)
    nothing = train.top_k_columns([None] * len(examples[0].sequences[0].tokens), 2)
    sequence = examples[0].sequences[0].replace(columns=nothing)
    forward, objective = train.top_k_forward(2), train.distillation_objective()
    trainer = train.Trainer(make_model(), train.TrainConfig(), objective, forward=forward)
    with pytest.raises(TrainError, match="'example-0': the teacher told no token"):
        trainer.step([examples[0].replace(sequences=(sequence,))])
    with pytest.raises(TrainError, match="teacher_ids/0"):
        trainer.step(examples)
    with pytest.raises(ConfigError, match="beta"):
        train.teacher_forward(make_model(), beta=2)
    with pytest.raises(ConfigError, match="k 0"):
        train.top_k_forward(0)
    with pytest.raises(ConfigError, match="nll_weight"):
        train.distillation_objective(nll_weight=2)
