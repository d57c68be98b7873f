"""The gradient is the same however the examples are laid out: packed, padded, one by one, accumulated."""

from __future__ import annotations

import pytest
import torch

from posttrain import objectives, train
from posttrain.core import TrainError

OBJECTIVES = {
    "nll": train.nll_objective,
    "token": train.policy_objective(kl_coef=0.1, importance_cap=2.0, dual_clip=3.0),
    "sequence": train.policy_objective(normalise="sequence", ratio="sequence", clip_low=0.05, clip_high=0.05),
    "constant": train.policy_objective(normalise="constant", max_length=24),
    "group": train.policy_objective(normalise="group"),
}


@pytest.fixture
def stepped(make_model, before_update):
    """A function that takes one step and gives the gradient (AdamW's first update hides its scale) and the metrics."""

    def take(examples, objective, **settings):
        model = make_model()
        trainer = train.Trainer(model, train.TrainConfig(max_grad_norm=0, **settings), objective)
        grads = {}
        before_update(
            trainer, lambda: grads.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
        )
        return grads, trainer.step(examples)

    return take


def same(first, second, rtol=1e-5):
    scale = max(grad.abs().max().item() for grad in first.values())
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulated_is_one_batch(stepped, make_examples, name):
    examples = make_examples(24, group_size=4)
    whole, whole_metrics = stepped(examples, OBJECTIVES[name], micro_tokens=100_000)
    parts, metrics = stepped(examples, OBJECTIVES[name], micro_tokens=40)
    assert whole_metrics["num_micro_batches"] == 1
    assert metrics["num_micro_batches"] > 5
    same(whole, parts)
    timing = train.TIMING_METRICS | {"num_micro_batches"}
    for key in whole_metrics.keys() - timing:
        assert metrics[key] == pytest.approx(whole_metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_is_one_by_one(stepped, make_examples, name):
    examples = make_examples(8, group_size=4)
    packed, _ = stepped(examples, OBJECTIVES[name], micro_tokens=100_000)
    single, metrics = stepped(examples, OBJECTIVES[name], micro_tokens=1)
    assert metrics["num_micro_batches"] == 8
    same(packed, single)


def test_packed_is_padded(stepped, make_model, make_examples):
    """Against a padded batch through the decoder's plain forward, written out here."""
    examples = make_examples(6)
    packed, metrics = stepped(examples, OBJECTIVES["token"], micro_tokens=100_000)
    sequences = [example.sequences[0] for example in examples]
    longest = max(len(sequence.tokens) for sequence in sequences)
    model = make_model()

    def padded(values, fill):
        return torch.tensor([[*row, *([fill] * (longest - len(row)))] for row in values])

    tokens_BT = padded([sequence.tokens for sequence in sequences], 7)
    mask_BT = padded([sequence.mask for sequence in sequences], False)[:, 1:]
    columns = {
        name: padded([sequence.columns[name] for sequence in sequences], 0.0)[:, 1:][mask_BT]
        for name in sequences[0].columns
    }
    logprobs_BTV = model(tokens_BT)[:, :-1].log_softmax(-1)
    logprobs_N = logprobs_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0][mask_BT]
    loss, _ = objectives.policy_surrogate(
        logprobs_N,
        columns["old_logprobs"],
        columns["advantages"],
        denominator=int(mask_BT.sum()),
        dual_clip=3.0,
        importance_weights_N=objectives.importance_weights(
            columns["old_logprobs"], columns["sampler_logprobs"], cap=2.0
        ),
        ref_logprobs_N=columns["ref_logprobs"],
        kl_coef=0.1,
    )
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    same({name: weight.grad for name, weight in model.named_parameters()}, packed)


def test_gradient_against_finite_differences(stepped, make_model, make_examples):
    examples = make_examples(4)
    grads, _ = stepped(examples, OBJECTIVES["nll"])
    direction = {name: torch.sign(grad) for name, grad in grads.items()}
    slope = sum((grads[name] * direction[name]).sum().item() for name in grads)

    def loss_at(shift):
        model = make_model()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight += shift * direction[name]
        return train.Trainer(model, train.TrainConfig(lr=0.0), OBJECTIVES["nll"]).step(examples)["loss"]

    h = 1e-4
    assert (loss_at(h) - loss_at(-h)) / (2 * h) == pytest.approx(slope, rel=2e-3)


def test_zero_advantage_moves_nothing(make_model, make_examples):
    examples = make_examples(4)
    zeroed = [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={**sequence.columns, "advantages": (0.0,) * len(sequence.tokens)})
                for sequence in example.sequences
            )
        )
        for example in examples
    ]
    model = make_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    metrics = train.Trainer(model, train.TrainConfig(lr=0.1), train.policy_objective()).step(zeroed)
    assert metrics["grad_norm"] == 0.0
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_examples_without_targets_are_counted_and_change_nothing(stepped, make_examples):
    examples = make_examples(6)
    empty = [
        example.replace(
            id=f"failed-{index}",
            sequences=tuple(sequence.replace(mask=(False,) * len(sequence.tokens)) for sequence in example.sequences),
        )
        for index, example in enumerate(examples[:2])
    ]
    for objective in OBJECTIVES.values():
        alone, _ = stepped(examples, objective)
        mixed, metrics = stepped([*empty, *examples], objective)
        assert metrics["num_empty_examples"] == 2.0
        assert metrics["num_examples"] == 8.0
        same(alone, mixed)


def test_prompt_tokens_are_not_learned(stepped, make_examples):
    """What a masked-out position says does not matter to the loss at targets before it."""
    example = make_examples(1)[0]
    sequence = example.sequences[0]
    tail = sequence.replace(
        tokens=(*sequence.tokens, 1, 2, 3),
        mask=(*sequence.mask, False, False, False),
        columns={name: (*values, 9.0, 9.0, 9.0) for name, values in sequence.columns.items()},
    )
    longer = example.replace(sequences=(tail,))
    first, _ = stepped([example], OBJECTIVES["token"])
    second, _ = stepped([longer], OBJECTIVES["token"])
    same(first, second)


def test_first_step_after_logprobs_has_ratio_one(make_model, make_examples):
    for dtype in ("float32", "bfloat16"):
        examples = make_examples(12)
        trainer = train.Trainer(
            make_model(), train.TrainConfig(micro_tokens=64, dtype=dtype, temperature=0.7), train.policy_objective()
        )
        exact = [
            example.replace(
                sequences=tuple(
                    sequence.replace(columns={**sequence.columns, "old_logprobs": column})
                    for sequence, column in zip(example.sequences, columns, strict=True)
                )
            )
            for example, columns in zip(examples, trainer.logprobs(examples), strict=True)
        ]
        metrics = trainer.step(exact)
        assert (metrics["ratio/min"], metrics["ratio/max"]) == (1.0, 1.0)
        assert metrics["clip_ratio/region_mean"] == 0.0


def test_logprobs_are_those_of_the_model(make_model, make_examples):
    examples = make_examples(5, num_sequences=2)
    model = make_model()
    trainer = train.Trainer(model, train.TrainConfig(temperature=2.0, micro_tokens=50), train.nll_objective)
    for example, columns in zip(examples, trainer.logprobs(examples), strict=True):
        for sequence, column in zip(example.sequences, columns, strict=True):
            with torch.no_grad():
                logprobs_TV = (model(torch.tensor([sequence.tokens]))[0] / 2.0).log_softmax(-1)
            for position, (token, target) in enumerate(zip(sequence.tokens, sequence.mask, strict=True)):
                expected = logprobs_TV[position - 1, token].item() if target else 0.0
                assert column[position] == pytest.approx(expected, abs=1e-5)


def test_the_objective_sees_which_sequence_is_which(stepped, make_model, make_examples):
    seen = []

    def pair_margin(stats, batch):
        sums_S = objectives.sequence_sum(stats.logprobs_N, batch.sequence_P, batch.num_sequences)
        chosen_E, rejected_E = sums_S[batch.index_S == 0], sums_S[batch.index_S == 1]
        seen.extend(zip(batch.ids, batch.scalars["weight"].tolist(), chosen_E.tolist(), strict=True))
        margin_E = chosen_E - rejected_E
        loss = -torch.nn.functional.logsigmoid(margin_E).sum() / batch.denominators.examples
        return loss, {"margin": objectives.mean(margin_E)}

    examples = make_examples(9, num_sequences=2)
    whole, whole_metrics = stepped(examples, pair_margin, micro_tokens=100_000)
    by_id = {example_id: (weight, chosen) for example_id, weight, chosen in seen}
    parts, metrics = stepped(examples, pair_margin, micro_tokens=60)
    same(whole, parts)
    assert metrics["margin"] == pytest.approx(whole_metrics["margin"], rel=1e-4)
    assert metrics["num_micro_batches"] > 1
    columns = train.Trainer(make_model(), train.TrainConfig(), pair_margin).logprobs(examples)
    for example, sequences in zip(examples, columns, strict=True):
        weight, chosen = by_id[example.id]
        assert weight == pytest.approx(example.scalars["weight"])
        assert chosen == pytest.approx(sum(sequences[0]), rel=1e-4)


def test_a_missing_column_is_named(make_model, make_examples):
    examples = [
        example.replace(sequences=tuple(sequence.replace(columns={}) for sequence in example.sequences))
        for example in make_examples(2)
    ]
    trainer = train.Trainer(make_model(), train.TrainConfig(), train.policy_objective())
    with pytest.raises(TrainError, match=r"'advantages'.*example-"):
        trainer.step(examples)
